"""lm-eval over a server gives what lm-eval over transformers and PEFT gives, base model and adapter, in fp32.

    pip install 'lm-eval[api]'                 # beside toppings, in an environment of its own
    python benchmarks/harness/check.py         # SmolLM2-135M-Instruct and the adapter `sentiment`
    python benchmarks/harness/check.py --items 3

Writes two local tasks of its own: facts with four choices each (loglikelihood), and sums to be gone on with
(generate_until). Starts `toppings serve` with the same checkpoint, then has lm-eval run both tasks over its
`hf` model and over its `local-completions`, both in batches. Ends in one JSON line: by model, the largest
difference of a log-likelihood, how often only one of both finds a choice greedy, how many texts differ. The
exit status is 1 where a log-likelihood differs by more than 1e-3, or anything else differs.
"""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toppings.config import Config
from toppings.engine.base import model_path
from toppings.lab.http.server import free_port, running_server
from toppings.lab.machine import describe_machine
from toppings.lab.script import finish, make_parser, parse
from toppings.sources.models import with_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

MOST_DIFFERENCE = 1e-3
BATCH = 8
FACTS = (
    *(("The capital of France is", "Paris"), ("The capital of Italy is", "Rome")),
    *(("The capital of Japan is", "Tokyo"), ("The capital of Egypt is", "Cairo")),
    *(("The colour of grass is", "green"), ("The colour of snow is", "white")),
    *(("The opposite of hot is", "cold"), ("The opposite of big is", "small")),
    *(("A week has this many days:", "seven"), ("A spider has this many legs:", "eight")),
    *(("Bees make", "honey"), ("Cows give", "milk")),
)
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICES = """doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}]"""
TEXTS = """doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]"""
TASKS = ("toppings_facts", "toppings_sums")


def write_tasks(directory: Path, num_items: int) -> None:
    answers = [answer for _, answer in FACTS]
    facts = []
    for i in range(num_items):
        question, answer = FACTS[i % len(FACTS)]
        prefix = f"Fact {i + 1}. " if i >= len(FACTS) else ""
        others = [each for each in answers if each != answer]
        choices = [answer, *(others[(i + step) % len(others)] for step in (0, 3, 5))]
        at = i % 4
        choices[0], choices[at] = choices[at], choices[0]
        facts.append({"question": prefix + question, "choices": choices, "answer": at})
    sums = [{"question": f"{i} + {i + 3} =", "answer": str(2 * i + 3)} for i in range(num_items)]
    for name, kind, rest, docs in (
        (TASKS[0], "multiple_choice", CHOICES, facts),
        (TASKS[1], "generate_until", TEXTS, sums),
    ):
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        (directory / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, file=file, rest=rest))


def run_tasks(directory: Path, model: str, **arguments: Any) -> dict[str, list[Any]]:
    """lm-eval's answers by task: per document its (log-likelihood, is greedy) pairs or its text."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(directory), include_defaults=False)
    result = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=manager,
        batch_size=BATCH,
        bootstrap_iters=0,
        log_samples=True,
    )
    return {
        name: [each["filtered_resps"] for each in sorted(samples, key=lambda s: s["doc_id"])]
        for name, samples in result["samples"].items()
    }


def compare(expected: dict[str, list[Any]], found: dict[str, list[Any]]) -> dict[str, Any]:
    pairs = [
        (float(a[0]), float(b[0]), str(a[1]) == str(b[1]))
        for left, right in zip(expected[TASKS[0]], found[TASKS[0]], strict=True)
        for a, b in zip(left, right, strict=True)
    ]
    texts = [a == b for a, b in zip(expected[TASKS[1]], found[TASKS[1]], strict=True)]
    return {
        "log_likelihoods": len(pairs),
        "largest_difference": max(abs(a - b) for a, b, _ in pairs),
        "greedy_differ": sum(not same for *_, same in pairs),
        "texts": len(texts),
        "texts_differ": sum(not same for same in texts),
    }


async def check(config: Config, directory: Path, adapter: str) -> dict[str, Any]:
    path = model_path(config.engine)
    names: dict[str, dict[str, str]] = {"base": {}, adapter: {"peft": f"{config.server.adapters}/{adapter}"}}
    url = f"http://127.0.0.1:{config.server.port}/v1/completions"
    results: dict[str, Any] = {}
    async with running_server(config):
        for name, weights in names.items():
            run: Callable[..., Any] = run_tasks
            served = {"base": config.engine.served_model_name}.get(name, name)
            remote = {"base_url": url, "model": served, "tokenizer": str(path), "num_concurrent": 2}
            found = await asyncio.to_thread(run, directory, "local-completions", **remote)
            local = {"pretrained": str(path), "dtype": "float32", "device": "cpu", **weights}
            expected = await asyncio.to_thread(run, directory, "hf", **local)
            results[name] = compare(expected, found)
    return results


def main() -> int:
    parser = make_parser(__doc__, "two items of each task")
    parser.add_argument("--model", default="", help="as toppings serve takes it")
    parser.add_argument("--adapters", default="examples/adapters", help="directory of the adapters")
    parser.add_argument("--adapter", default="sentiment", help="name of one of them")
    parser.add_argument("--items", type=int, default=24, help="of each task")
    options = parse(parser)
    with tempfile.TemporaryDirectory(prefix="toppings-lm-eval-") as name:
        write_tasks(Path(name), 2 if options.toy else options.items)
        given = Config.from_settings({"model": options.model}).engine
        settings = {
            **{"model": str(model_path(with_model(given))), "dtype": "float32", "port": free_port()},
            **{"served_model_name": "base", "adapters": str(Path(options.adapters).resolve())},
            **{"state_dir": f"{name}/state", "log_dir": f"{name}/logs", "max_model_len": 1024},
        }
        results = asyncio.run(check(Config.from_settings(settings), Path(name), options.adapter))
    finish(
        options,
        "lm_eval",
        model=options.model or "SmolLM2-135M-Instruct",
        results=results,
        machine=describe_machine(),
    )
    is_same = all(
        each["largest_difference"] <= MOST_DIFFERENCE and not each["greedy_differ"] + each["texts_differ"]
        for each in results.values()
    )
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
