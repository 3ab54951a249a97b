"""What look-up decoding wins where an answer repeats its prompt, and what it costs where it does not.

    python benchmarks/lookup_decoding.py          # the real model that the set-up installs: some minutes
    python benchmarks/lookup_decoding.py --toy

`edit`: a text is to be written again with a name changed, or the sentences with a number in them, greedily.
`free`: stories, drawn at a temperature. One request at a time, each with and without drafts, now the one
first and now the other, by one engine on one thread: threads that wait for each other take processor time,
too. The text comes from fixed seeds. `speedup`: tokens a second with drafts over those without, of all
requests together, by the clock and by processor time, which other work on the machine disturbs less;
`tokens_per_step`, and what share of drafts' tokens was accepted. Ends in one JSON line.
"""

import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from toppings.config import EngineConfig
from toppings.engine.engine import Engine
from toppings.engine.lookup import LookupDrafts
from toppings.lab.engines import running_engine
from toppings.lab.script import finish, make_parser, parse
from toppings.messages import AddRequest
from toppings.sampling_params import SamplingParams
from toppings.sources.models import find_model
from toppings.synth import PRESETS, write_model

NAMES = ("Ada Green", "Tom Weaver", "Lena Ortiz", "Jon Baker", "Mia Stone")
PLACES = ("the harbour", "the old mill", "the school", "the market hall", "the library")
DEEDS = (
    "repaired {n} boats at {place}",
    "opened a workshop near {place}",
    "planted {n} trees behind {place}",
    "wrote a long letter about {place}",
    "sold {n} baskets of apples at {place}",
    "painted the doors of {place}",
)
TOPICS = ("a fox who collects clocks", "a lighthouse on a hill", "the last train of the year", "a shy robot")


@dataclass(frozen=True)
class Scale:
    num_prompts: int
    num_sentences: int
    num_tokens: int
    num_rounds: int


FULL = Scale(num_prompts=4, num_sentences=10, num_tokens=96, num_rounds=1)
TOY = Scale(num_prompts=1, num_sentences=3, num_tokens=24, num_rounds=1)


def story(rng: random.Random, num_sentences: int) -> str:
    sentences = []
    for _ in range(num_sentences):
        deed = rng.choice(DEEDS).format(n=rng.randint(3, 90), place=rng.choice(PLACES))
        sentences.append(f"{rng.choice(NAMES)} {deed}.")
    return " ".join(sentences)


def edits(scale: Scale) -> list[str]:
    rng, orders = random.Random(1), []
    for number in range(scale.num_prompts):
        order = (
            "Write the text again, word for word, but with Sam Hill in place of Ada Green."
            if number % 2 == 0
            else "Write down, word for word, the sentences of the text that have a number in them."
        )
        orders.append(f"{order}\n\n{story(rng, scale.num_sentences)}")
    return orders


def stories(scale: Scale) -> list[str]:
    return [f"Tell me a story about {topic}." for topic in TOPICS[: scale.num_prompts]]


def tokens_of(tokenizer: Any, order: str) -> list[int]:
    if tokenizer.chat_template is None:
        ids: list[int] = tokenizer.encode(order)
        return ids
    chat = [{"role": "user", "content": order}]
    prompt: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return prompt


@dataclass
class Times:
    wall_s: float = 0.0
    cpu_s: float = 0.0
    num_tokens: int = 0
    num_steps: int = 0


def answer(engine: Engine, name: str, prompt: list[int], sampling: SamplingParams, times: Times) -> list[int]:
    """Its tokens; `times` grows by those behind the first one, which takes as long in any case."""
    assert engine.add(AddRequest(name, prompt, sampling, is_cacheable=False)) is None
    tokens: list[int] = []
    while not tokens:
        tokens += [token for output in engine.step() for token in output.token_ids]
    wall, cpu = time.perf_counter(), time.process_time()
    num_first = len(tokens)
    while engine.has_requests:
        tokens += [token for output in engine.step() for token in output.token_ids]
        times.num_steps += 1
    times.wall_s += time.perf_counter() - wall
    times.cpu_s += time.process_time() - cpu
    times.num_tokens += len(tokens) - num_first
    return tokens


def compare(engine: Engine, prompts: list[list[int]], scale: Scale, temperature: float) -> dict[str, Any]:
    drafts = engine.scheduler.drafts
    assert drafts is not None
    plain, drafted, num_same = Times(), Times(), 0
    before = drafts.counters()
    for turn in range(scale.num_rounds):
        for number, prompt in enumerate(prompts):
            sampling = SamplingParams(
                max_tokens=scale.num_tokens, temperature=temperature, ignore_eos=True, seed=7 * turn + number
            )
            answers = []
            forms = [(None, plain), (drafts, drafted)]
            for each, times in forms if (turn + number) % 2 else forms[::-1]:
                engine.scheduler.drafts = each
                answers.append(answer(engine, f"{turn} {number}", prompt, sampling, times))
            num_same += answers[0] == answers[1]
    engine.scheduler.drafts = drafts
    grown = {name: value - before[name] for name, value in drafts.counters().items()}
    num_drafted = grown["spec_decode_draft_tokens"]
    return {
        "speedup": (drafted.num_tokens / drafted.wall_s) / (plain.num_tokens / plain.wall_s),
        "speedup_cpu": (drafted.num_tokens / drafted.cpu_s) / (plain.num_tokens / plain.cpu_s),
        "tokens_per_step": drafted.num_tokens / drafted.num_steps,
        "tokens_per_s": plain.num_tokens / plain.wall_s,
        "accepted": grown["spec_decode_accepted_tokens"] / max(1, num_drafted),
        "drafts": grown["spec_decode_drafts"],
        "same_answers": num_same / (scale.num_rounds * len(prompts)),
    }


def run(scale: Scale, model: Path, state_dir: Path) -> dict[str, Any]:
    config = EngineConfig(
        model=str(model),
        state_dir=str(state_dir),
        speculative_method="ngram",
        kv_cache_bytes=256 * 2**20,
        num_threads=1,
        step_log="off",
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    result: dict[str, Any] = {"model": model.name, "draft_len": config.num_speculative_tokens}
    with running_engine(config) as engine:
        assert isinstance(engine.scheduler.drafts, LookupDrafts)
        answer(engine, "warm-up", list(range(3, 60)), SamplingParams(max_tokens=8), Times())
        for name, orders, temperature in (("edit", edits(scale), 0.0), ("free", stories(scale), 0.8)):
            prompts = [tokens_of(tokenizer, order) for order in orders]
            result[name] = compare(engine, prompts, scale, temperature)
    return result


def main() -> None:
    args = parse(make_parser(__doc__, "a tiny model and few tokens"))
    with tempfile.TemporaryDirectory() as directory:
        if args.toy:
            model = Path(directory) / "model"
            write_model(model, PRESETS["tiny"])
        else:
            model = find_model().path
        result = run(TOY if args.toy else FULL, model, Path(directory) / "state")
    finish(args, "lookup_decoding", **result)


if __name__ == "__main__":
    main()
