"""Clients of today, unchanged, against a server that runs: each case of each, passed or what went wrong.

    make serve ARGS='--model demo'
    python scripts/clients/run.py --folder /tmp/clients --json FILE

The clients are installed into a virtual environment and a folder of npm's below --folder on first use, not
into this project's own. Ends in one JSON line; the exit code is 1 where a case failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PYTHON_PACKAGES = (
    *("openai", "langchain-openai", "pydantic-ai-slim[openai]", "instructor", "litellm", "openai-agents"),
    "anthropic",
)
NODE_PACKAGES = ("openai", "ai", "@ai-sdk/openai-compatible", "zod")
TIMEOUT_S = 900


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--url", default="http://127.0.0.1:8080")
    options.add_argument("--models", nargs="+", default=["toppings-demo"])
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--only", nargs="+", default=[], help="programs, by the beginnings of their names")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    python, node = install(chosen.folder.absolute())
    programs = [([python, str(program)], HERE) for program in sorted(HERE.glob("*_python.py"))] + [
        (["node", program.name], node) for program in sorted(HERE.glob("*_node.mjs"))
    ]
    results: dict[str, Any] = {}
    for model in chosen.models:
        for command, folder in programs:
            name = Path(command[1]).stem
            if not chosen.only or name.startswith(tuple(chosen.only)):
                results.setdefault(name, {})[model] = run(command, folder, chosen.url, model)
    outcomes = [
        o for by_model in results.values() for each in by_model.values() for o in each["cases"].values()
    ]
    result = {"clients": results, "num_passed": outcomes.count("passed"), "num_cases": len(outcomes)}
    print(json.dumps(result))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(result["num_passed"] < result["num_cases"])


def install(folder: Path) -> tuple[str, Path]:
    """The virtual environment's Python, and the folder with npm's packages and the programs that use them."""
    folder.mkdir(parents=True, exist_ok=True)
    python, node = folder / "venv" / "bin" / "python", folder / "node"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PYTHON_PACKAGES], check=True)
    if not (node / "node_modules").exists():
        node.mkdir(exist_ok=True)
        (node / "package.json").write_text('{"private": true}\n')
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", *NODE_PACKAGES], cwd=node, check=True)
    for program in HERE.glob("*.mjs"):  # modules are looked for beside the program
        shutil.copy(program, node)
    return str(python), node


def run(command: list[str], folder: Path, url: str, model: str) -> dict[str, Any]:
    environment = {**os.environ, "TOPPINGS_URL": url, "TOPPINGS_MODEL": model, "PYTHONPATH": str(HERE)}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        told = getattr(error, "stderr", None) or (
            done.stderr if not isinstance(error, subprocess.TimeoutExpired) else ""
        )
        return {"packages": {}, "cases": {"all": f"{type(error).__name__}: {str(told)[-300:]}"}}
    for case, outcome in result["cases"].items():
        print(f"{command[1].rpartition('/')[2]} {model} {case}: {outcome}", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
