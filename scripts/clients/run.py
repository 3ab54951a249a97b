"""Clients of today, unchanged, against a server: each case of each, passed or what went wrong.

    python scripts/clients/run.py --folder /tmp/clients --json FILE

Serves the built-in demo itself, with an adapter for each way in which chat templates write calls (Qwen's and
Hermes', with thoughts, Llama 3's, Mistral's two, and one that knows no tools), unless --url names a server.
Every client talks to the base model; those of `WITH_TEMPLATES` to the adapters as well. The clients are
installed into virtual environments and a folder of npm's below --folder on first use, not into this project's
own. Ends in one JSON line; the exit code is 1 where a case failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from server import BASE, FAMILIES, served

HERE = Path(__file__).parent
PYTHON_PACKAGES = {
    "agents_python": "openai-agents",
    "anthropic_python": "anthropic",
    "instructor_python": "instructor",
    "langchain_python": "langchain-openai",
    "litellm_python": "litellm",
    "openai_python": "openai",
    "pydantic_ai_python": "pydantic-ai-slim[openai]",
}
"""Each in an environment of its own: they want different versions of the same packages."""
NODE_PACKAGES = ("openai", "ai", "@ai-sdk/openai-compatible", "zod")
NODE_PROGRAMS = ("ai_sdk_node", "openai_node")
WITH_TEMPLATES = ("langchain_python", "openai_python")
TIMEOUT_S = 900


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--url", help="of a server that runs, with the models that are asked")
    options.add_argument("--models", nargs="+", help="for every client, instead of those said above")
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--only", nargs="+", default=[], help="programs, by the beginnings of their names")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    folder = chosen.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    with served(folder) if chosen.url is None else nullcontext(chosen.url) as url:
        for program in sorted([*PYTHON_PACKAGES, *NODE_PROGRAMS]):
            if not chosen.only or program.startswith(tuple(chosen.only)):
                command, models = installed(program, folder), chosen.models or models_of(program)
                results[program] = {model: run(command, folder, url, model) for model in models}
    runs = [each for by_model in results.values() for each in by_model.values()]
    outcomes = [outcome for each in runs for outcome in each["cases"].values()]
    result = {"clients": results, "num_passed": outcomes.count("passed"), "num_cases": len(outcomes)}
    print(json.dumps(result))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(result["num_passed"] < result["num_cases"])


def models_of(program: str) -> list[str]:
    return [BASE, *(FAMILIES if program in WITH_TEMPLATES else ())]


def installed(program: str, folder: Path) -> list[str]:
    """The command that runs `program`, with what it needs."""
    if program in NODE_PROGRAMS:
        node = folder / "node"
        if not (node / "node_modules").exists():
            node.mkdir(parents=True, exist_ok=True)
            (node / "package.json").write_text('{"private": true}\n')
            subprocess.run(
                ["npm", "install", "--no-audit", "--no-fund", *NODE_PACKAGES], cwd=node, check=True
            )
        for script in HERE.glob("*.mjs"):  # modules are looked for beside the program
            shutil.copy(script, node)
        return ["node", str(node / f"{program}.mjs")]
    python, is_done = folder / program / "bin" / "python", folder / program / "installed"
    if not is_done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / program)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", PYTHON_PACKAGES[program]]
        subprocess.run(pip, check=True)
        is_done.touch()
    return [str(python), str(HERE / f"{program}.py")]


def run(command: list[str], folder: Path, url: str, model: str) -> dict[str, Any]:
    environment = {**os.environ, "TOPPINGS_URL": url, "TOPPINGS_MODEL": model, "PYTHONPATH": str(HERE)}
    try:
        done = subprocess.run(
            command,
            cwd=folder / "node" if command[0] == "node" else folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"packages": {}, "cases": {"all": f"no end within {TIMEOUT_S} s"}}
    lines = done.stdout.splitlines()
    if not lines or not lines[-1].startswith("{"):
        return {"packages": {}, "cases": {"all": f"it ended with {done.returncode}: {done.stderr[-300:]}"}}
    result: dict[str, Any] = json.loads(lines[-1])
    for case, outcome in result["cases"].items():
        print(f"{Path(command[1]).stem} {model} {case}: {outcome}", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
