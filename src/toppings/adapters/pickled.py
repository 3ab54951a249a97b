"""An adapter whose weights are a pickle (`adapter_model.bin`), made once into one that is served.

A pickle can run code when it is read. It is read by torch's unpickler of tensors alone (`weights_only`), in a
process of its own (`python -m toppings.adapters.pickled FILE TARGET`), and never by a server.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from toppings.adapters.errors import AdapterError
from toppings.adapters.peft_config import CONFIG_FILE
from toppings.adapters.stored_tensors import WEIGHTS_FILE
from toppings.adapters.text_files import TEXT_FILES

PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
TIMEOUT_S = 600.0
MAX_RECORDS = 100_000


def convert_pickled(source: Path, target: Path) -> None:
    """Writes the adapter in `source` to the new directory `target`, its weights as safetensors; all of it or
    nothing.

    Raises AdapterError with the reason: nothing to convert, a target that is there, or a file with anything
    but tensors.
    """
    if target.exists():
        raise AdapterError(f"{target} is there already; name a new directory")
    file = next((source / name for name in PICKLES if (source / name).is_file()), None)
    if file is None:
        raise AdapterError(f"{source} holds none of {', '.join(PICKLES)}")
    if not (source / CONFIG_FILE).is_file():
        raise AdapterError(f"adapter {source}: {CONFIG_FILE} is missing")
    check_archive(file)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _convert_apart(file, part / WEIGHTS_FILE)
        for name in (CONFIG_FILE, *TEXT_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, part / name)
        part.rename(target)
    except OSError as error:
        raise AdapterError(f"cannot convert {source}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_archive(file: Path) -> None:
    """Raises AdapterError for what would grow as it is read: torch stores tensors as they are."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            is_plain = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise AdapterError(f"{file} is no file of torch.save since version 1.6: {error}") from error
    if not is_plain or len(records) > MAX_RECORDS:
        raise AdapterError(
            f"{file} is compressed or has more than {MAX_RECORDS} records; torch writes neither"
        )


def _convert_apart(file: Path, target: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "toppings.adapters.pickled",
        str(file.absolute()),
        str(target.absolute()),
    ]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise AdapterError(f"cannot convert {file}: it took longer than {TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        reason = done.stdout.strip() or f"the process that read it ended with code {done.returncode}"
        raise AdapterError(f"cannot convert {file}: {reason}")


def main(file: str, target: str) -> int:
    """What goes wrong is told on standard output."""
    import torch
    from safetensors.torch import save_file

    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict):
            raise ValueError(f"it holds a {type(tensors).__name__} instead of tensors by name")
        for key, tensor in tensors.items():
            if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{key!r} is a {type(tensor).__name__}, not a tensor")
        save_file({key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}, target)
    except Exception as error:  # the unpickler raises whatever a file makes it raise
        print(str(error).splitlines()[0][:1000] if str(error) else type(error).__name__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
