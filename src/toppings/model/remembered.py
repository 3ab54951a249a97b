"""What a library that takes seconds to import made of a checkpoint's small files, kept for the next start."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from toppings import __version__
from toppings.model.files import MAX_JSON_BYTES

LIBRARY = "transformers"
MAX_KEPT = 256


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toppings"


def remembered(
    kind: str, path: Path, names: Iterable[str], make: Callable[[], dict[str, Any]], *parts: str
) -> dict[str, Any]:
    """What `make` gave for files of the same content, from `names` in `path` (those that there are) and
    `parts`, and for the same versions of the library and of this package; else what it gives now. It must
    give an object that JSON can hold, and may raise: that is not remembered. The `MAX_KEPT` newest are kept,
    where the disk lets them."""
    file = cache_dir() / "remembered" / f"{kind}-{_digest(path, names, parts)}.json"
    with suppress(OSError, ValueError):
        kept = json.loads(file.read_text())
        if isinstance(kept, dict):
            return kept
    made = make()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.with_suffix(f".{os.getpid()}.part")
        whole.write_text(json.dumps(made))
        whole.replace(file)
        for old in sorted(file.parent.iterdir(), key=_age)[:-MAX_KEPT]:
            old.unlink(missing_ok=True)
    return made


def _digest(path: Path, names: Iterable[str], parts: Iterable[str]) -> str:
    digest = hashlib.sha256(json.dumps([__version__, metadata.version(LIBRARY), *parts]).encode())
    for name in names:
        content = b""
        with suppress(OSError):
            if (path / name).stat().st_size <= MAX_JSON_BYTES:
                content = (path / name).read_bytes()
        digest.update(b"%d %s" % (len(content), content))
    return digest.hexdigest()


def _age(file: Path) -> float:
    with suppress(OSError):
        return file.stat().st_mtime
    return 0.0
