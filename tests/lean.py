"""An environment without what only development installs: links to the packages that the project's own
dependencies and some extras bring, and nothing else."""

import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def needed(*extras: str) -> dict[str, Distribution]:
    """By name: what pip would install for the project with these extras, of what is installed here."""
    lines = [*PROJECT["dependencies"], *(n for e in extras for n in PROJECT["optional-dependencies"][e])]
    todo = [Requirement(line) for line in lines]
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        need = todo.pop()
        key = canonicalize_name(need.name), frozenset(need.extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            found[key[0]] = dist = distribution(need.name)
        except PackageNotFoundError:
            continue  # of another platform, or a newer name for the same
        for line in dist.requires or ():
            inner = Requirement(line)
            wanted = [{"extra": extra} for extra in ("", *need.extras)]
            if inner.marker is None or any(map(inner.marker.evaluate, wanted)):
                todo.append(inner)
    return found


def lean_site(folder: Path, *extras: str) -> Path:
    """`folder`, filled with the packages of `needed`."""
    folder.mkdir()
    for dist in needed(*extras).values():
        for top in {file.parts[0] for file in dist.files or () if ".." not in file.parts}:
            link = folder / top
            if top != "__pycache__" and not link.exists():
                link.symlink_to(Path(str(dist.locate_file(top))))
    return folder


def run_lean(site: Path, module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`python -m module arguments` with the packages in `site` alone, and the project's sources."""
    path, argv = [str(ROOT / "src"), str(site)], [module, *arguments]
    start = f"import runpy, sys; sys.path[:0] = {path!r}; sys.argv = {argv!r}"
    code = f"{start}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
