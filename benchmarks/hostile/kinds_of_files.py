"""Adapters whose files are odd: missing, damaged, of another kind, enormous."""

import gzip
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from hostile.values import DEPTH
from hostile.workshop import CONFIG, WEIGHTS, Kind, Workshop

TERABYTE = 2**40


def file_kinds() -> Iterator[Kind]:
    yield from _damaged()
    yield from _headers()
    yield from _replaced()
    yield from _folders()


def _damaged() -> Iterator[Kind]:
    for name, content in {
        **{"empty": b"", "of one byte": b"1", "of eight NULs": b"\0" * 8, "of 4 kB of NULs": b"\0" * 4096},
        **{
            "a zip": b"PK\x03\x04" + b"\0" * 100,
            "GGUF": b"GGUF\x03\0\0\0" + b"\0" * 100,
            "a web page": b"<html>" * 50,
        },
        **{
            "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\n",
            "random": bytes(range(256)) * 20,
        },
    }.items():
        yield Kind(
            f"weights {name}",
            lambda shop, path, content=content: shop.write_weights(path, content),  # type: ignore[misc]
            WEIGHTS,
        )
    for share in (0.01, 0.3, 0.5, 0.999):

        def cut(shop: Workshop, path: Path, share: float = share) -> None:
            whole = (shop.write(path) / WEIGHTS).read_bytes()
            (path / WEIGHTS).write_bytes(whole[: int(len(whole) * share)])

        yield Kind(f"weights cut at {share:.1%}", cut, WEIGHTS)
    yield Kind(
        "weights packed by gzip",
        lambda shop, path: shop.write_weights(path, gzip.compress(shop.file(shop.header(), shop.data()))),
        WEIGHTS,
    )
    yield Kind(
        "weights with more behind them",
        lambda shop, path: shop.write_weights(path, shop.file(shop.header(), shop.data() + b"more")),
        WEIGHTS,
    )
    yield Kind("weights of a terabyte without a header", _sparse(b""), WEIGHTS)
    yield Kind(
        "weights of a terabyte behind a good header",
        lambda shop, path: _sparse(shop.file(shop.header(), shop.data()))(shop, path),
        WEIGHTS,
    )
    yield Kind("configuration of a terabyte", _sparse(b"{", CONFIG), CONFIG)


def _sparse(start: bytes, name: str = WEIGHTS) -> Callable[[Workshop, Path], None]:
    def make(shop: Workshop, path: Path) -> None:
        shop.write(path)
        (path / name).write_bytes(start)
        os.truncate(path / name, TERABYTE)

    return make


def _headers() -> Iterator[Kind]:
    """Of weights files; the data is whole."""

    def kind(name: str, write: Callable[[Workshop], bytes], reason: str = WEIGHTS) -> Kind:
        return Kind(f"header {name}", lambda shop, path: shop.write_weights(path, write(shop)), reason)

    for length in (0, 1, 2**31, 2**63, 2**64 - 1):
        yield kind(
            f"said to be of {length} bytes",
            lambda shop, n=length: shop.file(shop.header(), shop.data(), n),  # type: ignore[misc]
        )
    for name, text in {
        **{
            "that is no JSON": b"{nonsense",
            "a list": b"[]",
            "null": b"null",
            "a number": b"7",
            "not UTF-8": b"{\xff}",
        },
        **{"deep": b"[" * DEPTH + b"]" * DEPTH, "deep object": b'{"a":' * DEPTH + b"1" + b"}" * DEPTH},
        **{
            "empty": b"{}",
            "of numbers": b'{"a": 1}',
            "of spaces": b" " * 2000,
            "of 2 MB of keys": b'{"' + b"k" * 2**21 + b'": 1}',
        },
    }.items():
        yield kind(name, lambda shop, text=text: shop.file(text, shop.data()))  # type: ignore[misc]
    changes: dict[str, dict[str, object]] = {
        "with an unknown type": {"dtype": "F99"},
        "without a type": {"dtype": None},
        "with a negative size": {"shape": [-4, 32]},
        "with a fraction as size": {"shape": [4.5, 32]},
        "with an enormous size": {"shape": [2**62, 32]},
        "with sizes whose product overflows": {"shape": [2**33, 2**33]},
        "with many dimensions": {"shape": [1] * 5000},
        "with no dimensions": {"shape": []},
        "with offsets past the end": {"data_offsets": [0, 2**40]},
        "with negative offsets": {"data_offsets": [-8, 0]},
        "with offsets the wrong way round": {"data_offsets": [64, 0]},
        "with one offset": {"data_offsets": [0]},
        "with offsets above 2^64": {"data_offsets": [0, 2**64 + 1]},
        "with offsets that overlap": {"data_offsets": [4, 516]},
    }
    for name, change in changes.items():

        def changed(shop: Workshop, change: dict[str, object] = change) -> bytes:
            header = shop.header()
            first = next(iter(header))
            header[first] = {**header[first], **change}
            return shop.file(header, shop.data())

        yield kind(name, changed, f"{WEIGHTS}|q_proj")
    yield kind(
        "with metadata of numbers",
        lambda shop: shop.file({**shop.header(), "__metadata__": {"a": 1}}, shop.data()),
    )
    yield kind(
        "with metadata as list", lambda shop: shop.file({**shop.header(), "__metadata__": []}, shop.data())
    )
    yield kind(
        "of 20,000 empty tensors",
        lambda shop: shop.file(
            {f"k{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
        ),
        f"{WEIGHTS}|key|target_modules",
    )
    yield kind("twice", lambda shop: struct.pack("<Q", 2) + shop.file(shop.header(), shop.data()))


def _replaced() -> Iterator[Kind]:
    """Something else stands where a file should."""

    def fifo(place: Path) -> None:
        os.mkfifo(place)

    def unix_socket(place: Path) -> None:
        with (
            socket.socket(socket.AF_UNIX) as made,
            suppress(OSError),
        ):  # a long path has no room in an address
            made.bind(str(place))

    for name, put in {
        "missing": lambda place: None,
        "a directory": lambda place: place.mkdir(),
        "a pipe": fifo,
        "a socket": unix_socket,
        "a link to nothing": lambda place: place.symlink_to("nowhere"),
        "a link to itself": lambda place: place.symlink_to(place.name),
        "a link to /dev/zero": lambda place: place.symlink_to("/dev/zero"),
        "a link to /dev/full": lambda place: place.symlink_to("/dev/full"),
        "a link to /proc/self/mem": lambda place: place.symlink_to("/proc/self/mem"),
        "a link to a folder": lambda place: place.symlink_to("."),
    }.items():
        for file in (CONFIG, WEIGHTS):

            def make(shop: Workshop, path: Path, file: str = file, put: Callable[[Path], None] = put) -> None:
                shop.write(path)
                (path / file).unlink()
                put(path / file)

            yield Kind(f"{file} is {name}", make, f"{file}")
    for suffix in ("bin", "pt", "pth"):

        def pickled(shop: Workshop, path: Path, suffix: str = suffix) -> None:
            (shop.write(path) / WEIGHTS).rename(path / f"adapter_model.{suffix}")

        yield Kind(f"weights as adapter_model.{suffix}", pickled, f"adapter_model.{suffix}.*pickle")

    def sharded(shop: Workshop, path: Path) -> None:
        (shop.write(path) / WEIGHTS).rename(path / "adapter_model-00001-of-00002.safetensors")
        (path / "adapter_model.safetensors.index.json").write_text("{}")

    yield Kind("weights in shards", sharded, WEIGHTS)

    def linked(shop: Workshop, path: Path) -> None:
        shop.write(path)
        for file in (CONFIG, WEIGHTS):
            (path / file).rename(path / f"blob-{file}")
            (path / file).symlink_to(f"blob-{file}")

    yield Kind("files as links to blobs", linked, must_serve=True)


def _folders() -> Iterator[Kind]:
    def other(path: Path, name: str) -> None:
        path.mkdir(parents=True)
        (path / name).write_text("# A model card")

    def empty(shop: Workshop, path: Path) -> None:
        path.mkdir()

    def loop(shop: Workshop, path: Path) -> None:
        path.symlink_to(path.name)

    yield Kind("an empty folder", empty, CONFIG)
    yield Kind("a folder with a model card alone", lambda shop, path: other(path, "README.md"), CONFIG)
    yield Kind("a folder of folders", lambda shop, path: shop.write(path / "inner"), CONFIG)
    yield Kind("a file", lambda shop, path: path.write_text("x"), "adapter|directory")
    yield Kind("a folder that links to itself", loop, "adapter|directory|path")
    yield Kind("nothing", lambda shop, path: None, "adapter|directory")

    def extra(shop: Workshop, path: Path) -> None:
        shop.write(path)
        for name in ("README.md", "training_args.bin", "optimizer.pt", ".git"):
            (path / name).write_text("x")

    yield Kind("other files beside it", extra, must_serve=True)
