#!/usr/bin/env bash
# The first ten minutes on a GPU:  benchmarks/gpu/first_run.sh FOLDER [OPTIONS FOR EVERY SCRIPT]
#
# Right first, then fast: compiles, tests the kernels and stream operations, compares tokens, then measures what tells
# most. docs/gpu.md says what each figure should be. Goes on after a failure, and leaves FOLDER and FOLDER.tar.gz.
set -u
folder=${1:?usage: first_run.sh FOLDER [OPTIONS]}
shift
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
export PYTHONPATH="$here/../../src${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$folder"
failed=0

step() { # NAME SECONDS COMMAND…
    local name=$1 seconds=$2 began=$SECONDS status=0
    shift 2
    timeout --kill-after=5 "$seconds" "$@" >"$folder/$name.log" 2>&1 || status=$?
    ((status)) && failed=1
    echo "$name: status $status after $((SECONDS - began)) s"
}

step machine 20 nvidia-smi
step compile 60 "$python" "$here/compile_here.py" "$@"
step stream_ops 30 "$python" "$here/stream_ops.py" "$@"
step kernels 150 "$python" -m pytest -q -x "$here/../../tests/ops" -k gpu
ONLY="load prefill decode_step kernel_speed correctness" SECONDS_IN_ALL=270 "$here/all.sh" "$folder" "$@" || failed=1
step decode_queued 60 "$python" "$here/decode_step.py" --graphs off "$@"
step prefill_short 40 "$python" "$here/prefill.py" --tokens 128 "$@"
tar -czf "${folder%/}.tar.gz" -C "$(dirname "$folder")" "$(basename "$folder")"
exit "$failed"
