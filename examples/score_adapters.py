"""Ask held-out items of every adapter's job, the base model and the adapter with the same prompt, over HTTP.

    python examples/score_adapters.py               # starts a server of its own
    python examples/score_adapters.py --url URL     # asks one that serves the adapters

Its packages come with `make setup`.

Greedy, by OpenAI's chat API, requests for all adapters mixed and several at once. A score is the share of
right answers in per cent. Prints a table, and what it measured as one JSON line. The script ends where an
item that it would ask is in the training data. --cards writes each adapter's README.md.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from openai import AsyncOpenAI
from tasks import TASKS
from tasks.task import Item, Task

from toppings.config import Config
from toppings.lab.http.server import free_port, running_server
from toppings.lab.script import finish, make_parser, parse

NUM_ITEMS = 100
NUM_CLIENTS = 24
TIMEOUT_S = 600.0
ADAPTERS = Path(__file__).parent / "adapters"


class Asked(NamedTuple):
    """`model` is an adapter's name, or None for the base model."""

    task: Task
    item: Item
    model: str | None


async def base_name(client: AsyncOpenAI) -> str:
    """The served model that is nobody's adapter."""
    models = [model async for model in client.models.list()]
    return next(model.id for model in models if getattr(model, "parent", None) is None)


async def ask_all(client: AsyncOpenAI, asked: list[Asked]) -> list[str]:
    """The answers, several asked for at once."""
    base, answers, left = await base_name(client), [""] * len(asked), iter(enumerate(asked))

    async def work() -> None:
        for number, (task, item, model) in left:
            reply = await client.chat.completions.create(
                model=model or base,
                messages=task.messages(item),  # type: ignore[arg-type]
                max_tokens=task.max_tokens,
                temperature=0,
            )
            answers[number] = reply.choices[0].message.content or ""

    await asyncio.gather(*(work() for _ in range(NUM_CLIENTS)))
    return answers


async def measure(client: AsyncOpenAI, names: list[str], num_items: int) -> dict[str, Any]:
    asked = [
        Asked(TASKS[name], item, model)
        for name in names
        for item in TASKS[name].held_out(num_items)
        for model in (None, name)
    ]
    random.Random(0).shuffle(asked)
    started_at = time.perf_counter()
    answers = await ask_all(client, asked)
    seconds = time.perf_counter() - started_at
    scores: dict[str, dict[str, float]] = defaultdict(lambda: {"base": 0.0, "adapter": 0.0})
    wrong: dict[str, list[str]] = defaultdict(list)
    for (task, item, model), answer in zip(asked, answers):
        score = task.score(item, answer)
        scores[task.name]["adapter" if model else "base"] += 100 * score / num_items
        if model and score < 1:
            wrong[task.name].append(f"{item.text!r}: {answer!r}, not {item.answer!r}")
    return {
        "items": num_items,
        "seconds": round(seconds),
        "scores": {
            name: {who: round(score, 1) for who, score in scores[name].items()} for name in sorted(names)
        },
        "wrong": {name: lines[:3] for name, lines in sorted(wrong.items())},
    }


def table(scores: dict[str, dict[str, float]], adapters: Path) -> str:
    """Markdown: an adapter a row, best gain first."""
    lines = [
        "| adapter | what it does | rank | target modules | MB | base | adapter |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, score in sorted(scores.items(), key=lambda pair: pair[1]["base"] - pair[1]["adapter"]):
        config = json.loads((adapters / name / "adapter_config.json").read_text())
        ranks = sorted({config["r"], *(config.get("rank_pattern") or {}).values()})
        named = config["target_modules"]
        targets = ", ".join(
            each.removesuffix("_proj") for each in ([named] if isinstance(named, str) else named)
        )
        size = (adapters / name / "adapter_model.safetensors").stat().st_size / 1e6
        lines.append(
            f"| `{name}` | {TASKS[name].job} | {', '.join(map(str, ranks))}"
            f"{' (rsLoRA)' * config.get('use_rslora', False)} | {targets} | {size:.1f} "
            f"| {score['base']:.0f} | {score['adapter']:.0f} |"
        )
    return "\n".join(lines)


def card(name: str, score: dict[str, float], num_items: int) -> str:
    """An adapter's README.md."""
    task = TASKS[name]
    item = task.held_out(1)[0]
    return f"""# {name}: {task.job}

A LoRA of [SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), Apache-2.0,
trained on data made by [examples/tasks/{name}.py](../../tasks/{name}.py).

| | |
|---|---|
| system prompt | {task.system} |
| user | {item.text.replace(chr(10), "<br>")} |
| answer | {item.answer} |
| right of {num_items} held-out items | base {score["base"]:.0f} %, adapter {score["adapter"]:.0f} % |

Made by `python examples/train_adapters.py --out examples/adapters --only {name}`, measured by
`python examples/score_adapters.py --only {name}`.
"""


@asynccontextmanager
async def server_of(model: str, adapters: Path) -> AsyncIterator[str]:
    """The address of a server of these, which ends with this."""
    with tempfile.TemporaryDirectory() as directory:
        config = Config.from_settings(
            {
                **({"model": model} if model else {}),
                "port": free_port(),
                "adapters": str(adapters),
                "state_dir": f"{directory}/state",
                "log_dir": f"{directory}/logs",
            }
        )
        async with running_server(config):
            yield f"http://{config.server.host}:{config.server.port}"


async def run(options: argparse.Namespace) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        url = options.url or await stack.enter_async_context(server_of(options.model, options.adapters))
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S)
        return await measure(await stack.enter_async_context(client), options.only, options.items)


def askable(adapters: Path) -> list[str]:
    """Those of the directory that have a job. Raises ValueError where none has."""
    names = {file.parent.name for file in adapters.glob("*/adapter_config.json")}
    if not names & set(TASKS):
        raise ValueError(f"--adapters is {adapters}, which holds none of {', '.join(TASKS)}")
    return sorted(names & set(TASKS))


def main() -> None:
    parser = make_parser(__doc__, "two items of each")
    parser.add_argument("--url", help="a running server, such as http://127.0.0.1:8080")
    parser.add_argument("--model", default="", help="of the server to start (default: the built-in one)")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of the adapters")
    parser.add_argument("--only", nargs="*", choices=list(TASKS), help="ask these (default: all there are)")
    parser.add_argument("--items", type=int, default=NUM_ITEMS, help="held-out items of each")
    parser.add_argument("--cards", action="store_true", help="write each adapter's README.md")
    options = parse(parser)
    if options.toy:
        options.items = 2
    try:
        options.only = options.only or askable(options.adapters)
    except ValueError as error:
        parser.error(str(error))
    result = asyncio.run(run(options))
    if options.cards:
        for name, score in result["scores"].items():
            (options.adapters / name / "README.md").write_text(card(name, score, options.items))
    print(table(result["scores"], options.adapters), end="\n\n")
    finish(options, "score_adapters", **result)


if __name__ == "__main__":
    main()
