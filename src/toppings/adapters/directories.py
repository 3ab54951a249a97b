"""Which adapters a start-up directory holds."""

import os

from toppings.adapters.errors import AdapterError, AdapterNotFound
from toppings.adapters.peft_config import CONFIG_FILE
from toppings.adapters.stored_tensors import WEIGHTS_FILE


def find_adapters(directory: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, AdapterError]]:
    """The paths of the adapters by name, and what is wrong with others.

    A directory that is an adapter itself has that one, by its own name. Else each sub-directory is one, or an
    organisation's with adapters "organisation/name" in it. Those whose name begins with a dot do not count.
    Raises AdapterNotFound where `directory` is none, AdapterError where it may not be read.
    """
    root = os.path.abspath(directory)
    if not os.path.isdir(root):
        raise AdapterNotFound(f"no directory of adapters at {directory}")
    found: dict[str, str] = {}
    failures: dict[str, AdapterError] = {}
    try:
        if _is_adapter(root):
            return {os.path.basename(root): root}, failures
    except OSError as error:
        raise _unreadable(root, error) from error
    _search(root, "", found, failures)
    if root in failures:
        raise failures[root]
    return found, failures


def _search(path: str, prefix: str, found: dict[str, str], failures: dict[str, AdapterError]) -> bool:
    """Whether `path`, whose adapters' names begin with `prefix`, has anything to do with adapters."""
    try:
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        failures[prefix.rstrip("/") or path] = _unreadable(path, error)
        return True
    num_before = len(found) + len(failures)
    for name in names:
        _look_at(f"{path}/{name}", prefix + name, found, failures, is_nested=bool(prefix))
    return len(found) + len(failures) > num_before


def _look_at(
    path: str, name: str, found: dict[str, str], failures: dict[str, AdapterError], *, is_nested: bool
) -> None:
    try:
        if not os.path.isdir(path):
            if os.path.islink(path) and not os.path.exists(path):
                failures[name] = AdapterError(f"{path} is a link to nothing")
            return
        if _is_adapter(path):
            found[name] = path
            return
    except OSError as error:
        failures[name] = _unreadable(path, error)
        return
    has_more = not is_nested and _search(path, f"{name}/", found, failures)
    if not has_more and os.path.exists(f"{path}/{WEIGHTS_FILE}"):
        failures[name] = AdapterError(f"adapter {path}: {CONFIG_FILE} is missing")


def _is_adapter(path: str) -> bool:
    """Raises OSError where the directory may not be entered."""
    try:
        os.stat(f"{path}/{CONFIG_FILE}")
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _unreadable(path: str, error: OSError) -> AdapterError:
    return AdapterError(f"cannot read adapter {path}: {error.strerror}")
