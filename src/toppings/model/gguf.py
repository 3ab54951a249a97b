"""A GGUF file, made once into an ordinary checkpoint: transformers dequantises it and writes safetensors.

That happens in a process of its own (`python -m toppings.model.gguf FILE DIRECTORY`), which takes its memory
with it and whose progress bars show on a terminal. It ends with the one that started it.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import uuid
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toppings.model.gguf_header import MAGIC
from toppings.process_state import die_with_parent

SUFFIX = ".gguf"
PART = ".part"
FAMILIES = ("llama", "qwen2", "qwen3")  # what files call them; Mistral's are of "llama"
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
QUANTISED_DTYPE = "bfloat16"
"""Of what was quantised, whose own error is larger by orders."""
DIGITS_APART = "smollm"
"""The pre-tokeniser that transformers does not read from a file: single digits, the rest as GPT-2 has it."""
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GgufError(ValueError):
    """The file cannot be converted; the message names it and why."""


def convert_gguf(file: Path, directory: Path) -> None:
    """Writes `file` as a checkpoint to the new `directory`, all of it or nothing; safetensors in the file's
    own float type, in bfloat16 where it is quantised. One process at a time may do that; what one that was
    killed has left goes.

    Raises GgufError for a file that is none, or of a kind that cannot be served, OSError.
    """
    check_magic(file)
    for left in directory.parent.glob(f".*{PART}"):
        shutil.rmtree(left, ignore_errors=True)
    part = directory.with_name(f".{uuid.uuid4().hex}{PART}")
    part.mkdir(parents=True)
    try:
        command = [sys.executable, "-m", "toppings.model.gguf", str(file.absolute()), str(part)]
        command.append(str(os.getpid()))
        is_watched = sys.stderr is not None and sys.stderr.isatty()
        quiet = {} if is_watched else {"TQDM_DISABLE": "1"}
        done = subprocess.run(
            command,
            env={**os.environ, **quiet, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if is_watched else subprocess.DEVNULL,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = done.stdout.strip() or f"the process that read it ended with code {done.returncode}"
            raise GgufError(f"cannot convert {file}: {reason}")
        for written in part.iterdir():
            written.chmod(0o644)
            with written.open("rb") as stream:
                os.fsync(stream.fileno())
        part.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_magic(file: Path) -> None:
    """Raises GgufError for a file that is no GGUF, or cannot be read."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except OSError as error:
        raise GgufError(f"cannot read {file}: {error.strerror}") from error
    if start != MAGIC:
        raise GgufError(f"{file} is no GGUF file: it begins with {start!r}")


def rope_parameters(factors: Sequence[float], theta: float, head_dim: int) -> dict[str, Any]:
    """What `factors` (one per pair of a head's dimensions), by which a file divides the rotary frequencies,
    are in config.json: Llama 3.1's scaling. Raises GgufError for others.
    """
    factor = max(factors)
    found = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3_ROPE}
    expected = [_llama3_factor(theta ** (2 * i / head_dim), factor) for i in range(head_dim // 2)]
    if len(factors) != len(expected) or any(
        not math.isclose(one, other, rel_tol=1e-3) for one, other in zip(factors, expected, strict=True)
    ):
        raise GgufError("it scales rotary positions (rope_freqs) in a way that is not Llama 3.1's")
    return found


def _llama3_factor(wave: float, factor: float) -> float:
    """`wave`: the wavelength in positions over 2π. The formula is that of transformers' `llama3` rope."""
    wavelength = 2 * math.pi * wave
    length, low, high = (
        LLAMA3_ROPE[key]
        for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    if wavelength < length / high:
        return 1.0
    if wavelength > length / low:
        return factor
    smooth = (length / wavelength - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)


def _read(file: Path) -> tuple[dict[str, Any], str, list[float]]:
    """The file's metadata, the type that its weights become, and the factors of its rotary frequencies.

    Raises GgufError for what could not be served, and what the readers raise for a file that is damaged.
    """
    try:
        from gguf import GGMLQuantizationType
    except ModuleNotFoundError as error:
        raise GgufError("it needs the package gguf; install it with: pip install 'toppings[gguf]'") from error
    from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(file))
    if (family := metadata["general.architecture"]) not in FAMILIES:
        raise GgufError(f"its architecture is {family!r}; served are {', '.join(FAMILIES)}")
    header = GgufHeader.from_file(str(file))
    kinds = {GGMLQuantizationType(number).name for number in header.ggml_types.values()}
    if unknown := sorted(kinds - set(TYPES)):
        raise GgufError(f"it holds tensors of type {unknown[0]}; served are {', '.join(TYPES)}")
    _check_tokeniser(metadata)
    factors: list[float] = []
    with file.open("rb") as stream:
        for tensor in header.tensors:
            if tensor.name == ROPE_FACTORS:
                stream.seek(header.data_start + tensor.offset)
                factors = list(array("f", stream.read(tensor.nbytes)))
    halves = kinds - {"F32"}
    is_plain = kinds <= set(DTYPES)
    return metadata, (DTYPES[max(halves or kinds)] if is_plain else QUANTISED_DTYPE), factors


def _check_tokeniser(metadata: dict[str, Any]) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if "tokenizer.ggml.model" not in metadata:
        raise GgufError("it holds no tokeniser (tokenizer.ggml.model)")
    name = metadata.get("tokenizer.ggml.pre", "")
    known = {DIGITS_APART, "gpt-2", *GGUF_PRE_TOKENIZER_SPLITS}
    if metadata["tokenizer.ggml.model"] == "gpt2" and name not in known:
        raise GgufError(f"its pre-tokeniser is {name!r}, which is not known: texts would get other tokens")


def _write(file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    metadata, dtype, factors = _read(file)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
        local_files_only=True,
    )
    config = model.config
    if factors:
        theta = float(config.rope_parameters["rope_theta"])
        config.rope_parameters = rope_parameters(factors, theta, config.head_dim)
    ends = _end_tokens(metadata)
    if ends:
        config.eos_token_id = model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    if metadata.get("tokenizer.ggml.pre") == DIGITS_APART:
        from tokenizers import pre_tokenizers

        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.save_pretrained(directory)


def _end_tokens(metadata: dict[str, Any]) -> list[int]:
    """A chat model's file may name the end of a turn beside that of the text."""
    ids = (metadata.get(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id"))
    return list(dict.fromkeys(int(each) for each in ids if each is not None))


def main(file: str, directory: str, parent_pid: str) -> int:
    """A failure is one line on standard output."""
    die_with_parent(int(parent_pid))
    try:
        _write(Path(file), Path(directory))
        json.loads((Path(directory) / "config.json").read_text())
    except Exception as error:  # a stranger's file: the libraries raise whatever their parsers do
        text = str(error) if isinstance(error, GgufError) else f"{type(error).__name__}: {error}"
        print(" ".join(text.split())[:2000])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
