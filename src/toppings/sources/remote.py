"""Files below an address that fsspec reads: s3://, gs://, https:// and the like."""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from toppings.sources.fetch import CHUNK_BYTES, FetchError, FetchNotFound, open_url

SCHEME = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://.+")
SCHEMES = ("s3", "gs", "https", "http")
SHARD = re.compile(r"[\w.-]+\.safetensors")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_INDEX_BYTES = 64 << 20
TEXTS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)


def scheme_of(reference: str) -> str:
    """ "": it is no address."""
    match = SCHEME.fullmatch(reference)
    return "" if match is None else match["scheme"]


class RemoteFiles:
    """Files of the names `wanted` below `address`; one that cannot be listed is asked for each of them."""

    def __init__(self, address: str, wanted: Iterable[str]) -> None:
        """Raises FetchError, FetchNotFound where there is none."""
        self.where = address.rstrip("/")
        self._system, self._root = _system(self.where)
        self._infos = {name: info for name in sorted(wanted) if (info := self._info(name)) is not None}
        if not self._infos:
            raise FetchNotFound(f"nothing is at {self.where}")
        marks = {name: [_size(info), _mark(info)] for name, info in self._infos.items()}
        self.version = hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()

    def sizes(self) -> Mapping[str, int | None]:
        return {name: _size(info) for name, info in self._infos.items()}

    def open(self, name: str) -> IO[bytes]:
        stream: IO[bytes]
        if self._system is None:
            stream = open_url(f"{self.where}/{name}")
            return stream
        try:
            stream = self._system.open(f"{self._root}/{name}", "rb")
        except Exception as error:  # whatever the storage's client raises
            raise _failed(f"{self.where}/{name}", error) from error
        return stream

    def _info(self, name: str) -> dict[str, Any] | None:
        if self._system is None:
            return _head(f"{self.where}/{name}")
        try:
            info: dict[str, Any] = self._system.info(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        except Exception as error:
            raise _failed(f"{self.where}/{name}", error) from error
        return info if info.get("type", "file") == "file" else None


def fetch_model(address: str, cache: Path) -> Path:
    """A base model's files below `cache`, or a `.gguf` file; what was interrupted goes on where it ended.

    Raises FetchError, OSError.
    """
    if address.endswith(".gguf"):
        parent, _, name = address.rpartition("/")
        files = RemoteFiles(parent, [name])
        return _mirror(files, cache) / name
    config = RemoteFiles(address, ["config.json", INDEX, SINGLE, *TEXTS])
    names = set(config.sizes())
    if "config.json" not in names or not names & {INDEX, SINGLE}:
        raise FetchError(f"{address} is no base model: it needs config.json and {SINGLE} or {INDEX}")
    if INDEX in names:
        files = RemoteFiles(address, {*names - {SINGLE}, *_shards(config)})
        return _mirror(files, cache)
    return _mirror(config, cache)


def _shards(files: RemoteFiles) -> set[str]:
    with files.open(INDEX) as stream:
        text = stream.read(MAX_INDEX_BYTES + 1)
    try:
        shards = {str(name) for name in json.loads(text)["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FetchError(f"{files.where}/{INDEX} is no index of weights: {error}") from error
    if bad := [name for name in shards if not SHARD.fullmatch(name)]:
        raise FetchError(f"{files.where}/{INDEX} names {bad[0]!r}, which is no safetensors file beside it")
    return shards


def _mirror(files: RemoteFiles, cache: Path) -> Path:
    """A directory of this content, complete; named as the address's last part."""
    # Here, since an engine alone runs without it.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    key = hashlib.sha256(f"{files.where} {files.version}".encode()).hexdigest()[:16]
    name = files.where.rpartition("/")[2]
    done = cache / key / name
    if done.is_dir():
        return done
    part = cache / key / f".{name}.part"
    part.mkdir(parents=True, exist_ok=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        disable=not (sys.stderr and sys.stderr.isatty()),
    ) as progress:
        for each, size in files.sizes().items():
            task = progress.add_task(each, total=size)
            _copy(files, each, part / each, size, lambda n, task=task: progress.update(task, completed=n))
    part.rename(done)
    return done


def _copy(files: RemoteFiles, name: str, target: Path, size: int | None, on_progress: Any) -> None:
    have = target.stat().st_size if target.exists() else 0
    if size is None or have > size:
        have = 0
    if size is not None and have == size:
        return
    with files.open(name) as source, target.open("r+b" if have else "wb") as out:
        if have:
            _skip(source, have)
        out.seek(have)
        while chunk := source.read(CHUNK_BYTES):
            out.write(chunk)
            have += len(chunk)
            on_progress(have)
            if size is not None and have > size:
                break
    if size is not None and have != size:
        raise FetchError(f"{files.where}/{name} gave {have} bytes; {size} were announced")


def _skip(source: IO[bytes], num_bytes: int) -> None:
    if source.seekable():
        source.seek(num_bytes)
        return
    while num_bytes:
        skipped = len(source.read(min(num_bytes, CHUNK_BYTES)))
        if not skipped:
            return
        num_bytes -= skipped


def _system(address: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it; None for the web, which is read without it."""
    scheme = scheme_of(address)
    if scheme not in SCHEMES:
        raise FetchError(f"{address!r} is no address that is read; these are: {', '.join(SCHEMES)}")
    if scheme in ("http", "https"):
        return None, ""
    try:
        import fsspec

        system, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise FetchError(
            f"{scheme}:// needs more packages ({error}); install them with: pip install 'toppings[remote]'"
        ) from error
    except Exception as error:
        raise _failed(address, error) from error
    return system, root


def _head(url: str) -> dict[str, Any] | None:
    try:
        with open_url(url, method="HEAD") as answer:
            length = answer.headers.get("Content-Length")
            mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            return {"size": int(length) if length and length.isdigit() else None, "ETag": mark}
    except FetchNotFound:
        return None


def _size(info: Mapping[str, Any]) -> int | None:
    size = info.get("size")
    return size if isinstance(size, int) else None


def _mark(info: Mapping[str, Any]) -> str:
    return str(info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("updated") or "")


def _failed(what: str, error: Exception) -> FetchError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return FetchError(f"{what} cannot be read: {reason}")
