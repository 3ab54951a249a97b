"""Look-up decoding: drafts change how many steps an output takes, and nothing of the output."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.driver import Driver, drive
from tests.engine.oracle import make_adapter, make_model, make_prompt, reference_tokens
from toppings.config import ConfigError, EngineConfig
from toppings.core import BatchItem, Request
from toppings.engine.draft_rows import kept_rows, with_drafts
from toppings.engine.lookup import FIRST_LEN, FIRST_PAUSE, LookupDrafts
from toppings.engine.step_plan import StepPlan
from toppings.ops.sampling import SamplingRow, sample
from toppings.sampling_params import SamplingParams, Structure, StructureKind

NUM_TOKENS = 24
World = tuple[Path, dict[str, Path]]


class Oracle(LookupDrafts):
    """Drafts that are right, but for every third token: what would follow is known beforehand."""

    def __init__(self, outputs: dict[str, list[int]]) -> None:
        super().__init__(7)
        self._outputs = outputs

    def draft(self, request: Request, num_tokens: int) -> list[int]:
        if num_tokens <= 0 or request.sampling.structure is not None:
            return []
        known, place = self._outputs[request.request_id.split()[0]], len(request.output_token_ids)
        right = known[place : place + min(num_tokens, 5)]
        return [token if (place + i) % 3 else token + 1 for i, token in enumerate(right)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("lookup")
    model = make_model(root / "model")
    return model, {
        "one": make_adapter(root / "one", model, rank=4, seed=1),
        "two": make_adapter(root / "two", model, rank=7, targets=("q_proj", "down_proj"), seed=2),
    }


NAMES = {"base": None, "one": "one", "two": "two", "more": "one"}


def prompts() -> dict[str, list[int]]:
    return {name: make_prompt(i, 9 + 7 * i) for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def expected(world: World) -> dict[str, list[int]]:
    model, adapters = world
    return {
        name: reference_tokens(model, adapters.get(adapter or ""), prompts()[name], NUM_TOKENS)
        for name, adapter in NAMES.items()
    }


def add_all(driver: Driver, label: str = "", **sampling: Any) -> None:
    for name, prompt in prompts().items():
        driver.add(f"{name}{label}", prompt, NUM_TOKENS, NAMES[name], **sampling)


def num_steps(driver: Driver) -> float:
    return driver.engine.stats(0).counters["steps"]


def accepted(driver: Driver) -> float:
    return driver.engine.stats(0).counters["spec_decode_accepted_tokens"]


@pytest.mark.parametrize("mode", ["pipelined", "on_demand", "cpu_assisted"])
def test_greedy_tokens_are_the_oracles_alone_and_in_a_batch_of_adapters(
    world: World, tmp_path: Path, expected: dict[str, list[int]], mode: str
) -> None:
    with drive(world[0], tmp_path, world[1], mode=mode, link_gbps=0.05, speculative_method="ngram") as driver:
        driver.engine.scheduler.drafts = Oracle(expected)
        for name, prompt in prompts().items():
            driver.add(f"{name} alone", prompt, NUM_TOKENS, NAMES[name])
            before = num_steps(driver)
            assert driver.run()[f"{name} alone"] == expected[name]
            assert num_steps(driver) - before < NUM_TOKENS - 4
        add_all(driver, " mixed")
        tokens = driver.run()
        assert {name: tokens[f"{name} mixed"] for name in NAMES} == expected
        assert accepted(driver) > 0


def test_few_pages_preemption_and_shared_prefixes_change_no_token(
    world: World, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    settings = {"page_size": 4, "max_model_len": 64, "kv_cache_bytes": 32 * 4 * 3 * 2 * 2 * 16 * 4}
    with drive(world[0], tmp_path, world[1], speculative_method="ngram", **settings) as driver:
        driver.engine.scheduler.drafts = Oracle(expected)
        for turn in range(2):
            add_all(driver, f" {turn}")
        tokens = driver.run()
        assert driver.engine.scheduler.num_preemptions > 0
        assert accepted(driver) > 0
    for turn in range(2):
        assert {name: tokens[f"{name} {turn}"] for name in NAMES} == expected


def test_a_prompts_token_that_is_not_its_last_has_no_draft_behind_it(world: World, tmp_path: Path) -> None:
    """Where one token of a prompt is left over for a step, that looks like one of an answer."""

    class Always(LookupDrafts):
        def draft(self, request: Request, num_tokens: int) -> list[int]:
            return [7][:num_tokens]

    with drive(world[0], tmp_path, {}) as driver:
        scheduler, drafts = driver.engine.scheduler, Always(7)
        for num_computed, draft in ((5, []), (9, [7])):
            request = Request("r", list(range(10)), SamplingParams(), num_computed_tokens=num_computed)
            step = StepPlan(100)
            step.add(request, 1)
            drafts.add_to(step, scheduler.limits, scheduler.pages, num_running=0)
            assert list(step.decodes[0].draft) == draft
            scheduler.pages.free(request.page_table)


def test_a_block_that_accepted_tokens_filled_is_kept_and_right(
    world: World, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    model, _ = world
    with drive(world[0], tmp_path, world[1], page_size=4, speculative_method="ngram") as driver:
        driver.engine.scheduler.drafts = Oracle(expected)
        driver.add("base", prompts()["base"], NUM_TOKENS)
        longer = [*prompts()["base"], *driver.run()["base"], 5]
        driver.engine.scheduler.drafts = None
        driver.add("again", longer, 6)
        assert driver.run()["again"] == reference_tokens(model, None, longer, 6)
        # All but the last token that was drawn, which was never computed.
        assert driver.first["again"].num_cached_tokens == len(longer) - 2


SAMPLED: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.9, "seed": 3},
    "truncated": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 4},
    "penalised": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "penalised draws": {"temperature": 1.0, "repetition_penalty": 1.5, "seed": 5},
    "biased": {"logit_bias": ((7, 3.0),), "bad_token_ids": ((9,), (11, 12))},
    "held": {"min_tokens": 12, "ignore_eos": False, "stop_token_ids": (7, 8, 9, 10)},
    "told": {"logprobs": 2},
}


@pytest.mark.parametrize("case", SAMPLED)
def test_an_output_is_the_same_with_drafts_as_without(world: World, tmp_path: Path, case: str) -> None:
    """Seeded draws, too: each takes the number that it takes without."""
    found = []
    with drive(world[0], tmp_path, world[1], speculative_method="ngram") as driver:
        plain: dict[str, list[int]] = {}
        for drafts in (None, Oracle(plain)):
            label = "" if drafts is None else " drafted"
            driver.engine.scheduler.drafts = drafts
            add_all(driver, label, **SAMPLED[case])
            told: dict[str, list[tuple[int, float]]] = {name: [] for name in NAMES}
            while driver.engine.has_requests:
                for output in driver.step():
                    told[output.request_id.split()[0]] += [
                        (each.token_id, each.logprob) for each in output.logprobs or []
                    ]
            found.append(({name: driver.tokens[f"{name}{label}"] for name in NAMES}, told))
            plain.update(found[0][0])
        assert accepted(driver) > 0
        driver.engine.check_integrity()
    (tokens, told), (drafted, drafted_told) = found
    assert drafted == tokens
    for name in NAMES:
        assert [token for token, _ in drafted_told[name]] == [token for token, _ in told[name]]
        values, drafted_values = ([v for _, v in each[name]] for each in (told, drafted_told))
        assert drafted_values == pytest.approx(values, abs=1e-4)


def test_an_output_ends_where_it_would_without(
    world: World, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    """Within a draft: at a stop token, at its length."""
    with drive(world[0], tmp_path, world[1], speculative_method="ngram") as driver:
        driver.engine.scheduler.drafts = Oracle(expected)
        known, prompt = expected["base"], prompts()["base"]
        for num in range(1, 9):
            driver.add(f"base length {num}", prompt, num)
            stop = known[num]
            driver.add(f"base stop {num}", prompt, NUM_TOKENS, stop_token_ids=(stop,))
        tokens = driver.run()
        for num in range(1, 9):
            assert tokens[f"base length {num}"] == known[:num]
            assert tokens[f"base stop {num}"] == known[: known.index(known[num]) + 1]


def test_a_structure_goes_without_drafts() -> None:
    drafts = LookupDrafts(7)
    structure = Structure(StructureKind.REGEX, "a+")
    for sampling in (SamplingParams(structure=structure), SamplingParams(prompt_logprobs=1)):
        assert drafts.draft(Request("r", [1, 2, 3, 4] * 4, sampling), 7) == []


# --- what is drawn ---


def test_what_is_drawn_behind_drafts_has_the_models_distribution() -> None:
    """Of pairs of tokens, drawn one by one and behind a draft that is likely, unlikely or impossible.

    Pearson's statistic of 20,000 pairs in 16 cells exceeds 62.6 with a probability of 1e-7: twice, this is a
    false alarm once in 5 million runs. The seeds are fixed.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator) * 1.2  # behind nothing, and behind each token
    logits[0, 3] -= 2
    first, second = logits[0].softmax(-1), logits[1:].softmax(-1)
    expected = (first[:, None] * second).flatten().double()
    num = 20_000
    params = SamplingParams(temperature=1.0)
    for draft in (int(first.argmax()), int(first.argmin())):
        torch.manual_seed(1)
        request = Request("r", [1], params)
        items = [BatchItem(request, 1, draft=[draft])] * num
        rows = with_drafts([SamplingRow(params, [1], [])] * num, items)
        flat = [item for item in items for _ in range(2)]
        drawn = sample(torch.stack([logits[0], logits[1 + draft]]).repeat(num, 1), rows)
        counts: Counter[tuple[int, int]] = Counter()
        alone = []
        for start in range(0, 2 * num, 2):
            both = drawn.token_ids[start : start + 2]
            kept = 2 if both[0] == draft else 1
            if kept == 2:
                counts[both[0], both[1]] += 1
            else:
                alone.append(both[0])
        assert len(kept_rows(flat, rows, drawn)) == 2 * num - len(alone)
        # Those that were refused go on with a draw of the next step.
        rest = sample(logits[1:][torch.tensor(alone)], [SamplingRow(params, [1], [])] * len(alone))
        counts.update(zip(alone, rest.token_ids, strict=True))
        found = torch.tensor([counts[divmod(cell, 4)] for cell in range(16)]).double()
        statistic = float(((found - num * expected) ** 2 / (num * expected)).sum())
        assert statistic < 62.6


def test_a_row_that_cannot_be_drawn_counts_only_where_the_draft_led_there() -> None:
    logits = torch.zeros(3, 4)
    logits[0, 2] = 9.0
    logits[1:] = torch.nan
    params = SamplingParams(temperature=0.0)
    request = Request("r", [1], params)
    for draft, kept in (([1, 1], [0]), ([2, 1], [0, 1])):
        item = BatchItem(request, 1, draft=draft)
        rows = with_drafts([SamplingRow(params, [1], [])], [item])
        assert kept_rows([item] * 3, rows, sample(logits, rows)) == kept


# --- what is looked up ---


def request_of(*tokens: int) -> Request:
    return Request("r", list(tokens), SamplingParams(max_tokens=1000))


def test_a_draft_is_what_followed_the_latest_place_of_the_last_tokens() -> None:
    drafts = LookupDrafts(7)
    assert drafts.draft(request_of(1, 2, 3, 4, 5, 1, 2, 3, 8, 9, 1, 2, 3), 2) == [8, 9]
    # Five tokens say more than three: the earlier place is the one.
    assert drafts.draft(request_of(6, 7, 1, 2, 3, 4, 5, 1, 2, 3, 8, 9, 6, 7, 1, 2, 3), 2) == [4, 5]
    assert drafts.draft(request_of(1, 2, 3, 4, 5, 6), 2) == []
    assert drafts.draft(request_of(1, 2), 2) == []
    assert drafts.draft(request_of(4, 4, 4, 4), 3) == [4]  # what is known follows
    assert drafts.draft(request_of(1, 2, 3, 4, 1, 2, 3), 0) == []


def test_drafts_grow_where_they_are_taken_and_pause_where_they_are_not() -> None:
    drafts, request = LookupDrafts(7), request_of(*range(20), 1, 2, 3)
    lengths = []
    for _ in range(3):
        draft = drafts.draft(request, 100)
        drafts.note(request, len(draft), len(draft))
        lengths.append(len(draft))
    assert lengths == [FIRST_LEN, 2 * FIRST_LEN, 7]
    drafts.note(request, 7, 3)
    assert len(drafts.draft(request, 100)) == 3
    pauses = []
    for _ in range(3):
        drafts.note(request, 3, 0)
        paused_at = request.num_tokens
        while not drafts.draft(request, 100):
            request.output_token_ids += [1, 2, 3]  # so that there is something to find
        pauses.append(request.num_tokens - paused_at)
    assert pauses[0] <= FIRST_PAUSE + 3
    assert pauses[0] < pauses[1] < pauses[2]
    assert len(drafts.draft(request, 100)) <= FIRST_LEN
    drafts.forget(request)


def test_requests_are_forgotten_when_they_end(
    world: World, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    with drive(world[0], tmp_path, world[1], speculative_method="ngram") as driver:
        add_all(driver)
        assert driver.run() == expected
        drafts = driver.engine.scheduler.drafts
        assert drafts is not None
        assert not drafts._seen


@pytest.mark.parametrize(
    "settings",
    [{"device": "cuda"}, {"async_scheduling": "on"}, {"tensor_parallel_size": 2, "mode": "pipelined"}],
)
def test_what_goes_without_look_up_decoding_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"speculative_method is 'ngram', but {next(iter(settings))} is"):
        EngineConfig(speculative_method="ngram", **settings)
    EngineConfig(speculative_method="off", **settings)
