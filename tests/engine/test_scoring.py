"""What prompts are told of their tokens, against transformers and PEFT: log-probabilities and embeddings,
whatever else the steps do."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.engine.driver import Driver, drive, hold_link
from tests.engine.oracle import make_adapter, make_model, make_prompt, reference_model, reference_tokens
from toppings.core import FinishReason
from toppings.engine import scoring
from toppings.messages import RequestOutput
from toppings.model.decoder import Decoder

ADAPTERS: dict[str, dict[str, object]] = {
    "all-r8": {"rank": 8},
    "qkv-r64": {"rank": 64, "targets": ("q_proj", "k_proj", "v_proj")},
}
NAMES = (None, *ADAPTERS)
SETTINGS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "max_model_len": 64,
    "mode": "on_demand",
    "page_size": 4,
}
CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 1e-4}
LENGTHS = (1, 2, 23, 24, 25, 61, 63)

Checkpoints = tuple[Path, dict[str, Path]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("scoring")
    model = make_model(root / "model")
    adapters = {
        name: make_adapter(root / name, model, seed=i, **kind)  # type: ignore[arg-type]
        for i, (name, kind) in enumerate(ADAPTERS.items())
    }
    return model, adapters


@pytest.fixture(scope="module", params=["off", "on"])
def driver(
    request: pytest.FixtureRequest, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Driver]:
    """Steps in turn, and started ahead of the tokens before them; chunks of logits smaller than a prompt."""
    model, adapters = checkpoints
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "CHUNK_LOGITS", 5 * 320)
        with drive(
            model, tmp_path_factory.mktemp("state"), adapters, async_scheduling=request.param, **SETTINGS
        ) as driver:
            yield driver


@torch.inference_mode()
def reference(checkpoints: Checkpoints, adapter: str | None, prompt: list[int]) -> tuple[Any, Any]:
    """Log-probabilities at every place, [P, V], and the final hidden states [P, h]."""
    model, adapters = checkpoints
    answer = reference_model(model, None if adapter is None else adapters[adapter])(
        input_ids=torch.tensor([prompt]), output_hidden_states=True
    )
    return answer.logits[0].log_softmax(-1), answer.hidden_states[-1][0]


def check_prompt(
    checkpoints: Checkpoints, adapter: str | None, prompt: list[int], output: RequestOutput
) -> None:
    """Values and ranks of the tokens, and the best tokens of each place."""
    expected, _ = reference(checkpoints, adapter, prompt)
    assert output.prompt_logprobs is not None
    told = output.prompt_logprobs.tokens(prompt[1:])
    assert [each.token_id for each in told] == prompt[1:]
    for row, each in zip(expected[:-1], told, strict=True):
        torch.testing.assert_close(each.logprob, row[each.token_id].item(), **CLOSE)
        assert abs(int((row > row[each.token_id]).sum()) + 1 - each.rank) <= 1  # where two are all but equal
        ids, values = zip(*each.top, strict=True)
        torch.testing.assert_close(torch.tensor(values), row.topk(len(ids)).values, **CLOSE)
        torch.testing.assert_close(torch.tensor(values), row[list(ids)], **CLOSE)


def embedding(output: RequestOutput) -> torch.Tensor:
    assert output.embedding is not None
    return torch.frombuffer(bytearray(output.embedding), dtype=torch.float32)


def expected_embedding(checkpoints: Checkpoints, adapter: str | None, prompt: list[int], kind: str) -> Any:
    _, hidden = reference(checkpoints, adapter, prompt)
    return functional.normalize(hidden[-1] if kind == "last" else hidden.mean(0), dim=0)


def test_prompts_and_embeddings_are_the_references(driver: Driver, checkpoints: Checkpoints) -> None:
    """Scored, drawn from and embedded side by side, in chunks."""
    for i, length in enumerate(LENGTHS):
        name, prompt = NAMES[i % 3], make_prompt(i, length)
        driver.add(f"score {i}", prompt, 0, name, prompt_logprobs=3)
        driver.add(f"last {i}", prompt, 0, name, pooling="last")
        driver.add(f"mean {i}", prompt, 0, name, pooling="mean")
        if length < 60:
            driver.add(f"draw {i}", prompt, 4, name, prompt_logprobs=1, logprobs=0)
            driver.add(f"plain {i}", prompt, 4, name)
    driver.run()
    for i, length in enumerate(LENGTHS):
        name, prompt = NAMES[i % 3], make_prompt(i, length)
        last = driver.last[f"score {i}"]
        assert (last.finish_reason, last.token_ids) == (FinishReason.LENGTH, [])
        assert last.queue_ms is not None
        check_prompt(checkpoints, name, prompt, last)
        for kind in ("last", "mean"):
            found = embedding(driver.last[f"{kind} {i}"])
            torch.testing.assert_close(found, expected_embedding(checkpoints, name, prompt, kind), **CLOSE)
        if length < 60:
            check_prompt(checkpoints, name, prompt, driver.first[f"draw {i}"])
            adapter = None if name is None else checkpoints[1][name]
            expected = reference_tokens(checkpoints[0], adapter, prompt, 4)
            assert driver.tokens[f"draw {i}"] == driver.tokens[f"plain {i}"] == expected


def test_a_prompt_that_is_in_the_cache_is_read_whole(driver: Driver, checkpoints: Checkpoints) -> None:
    prompt = make_prompt(40, 50)
    for name in ("first", "second"):
        driver.add(f"{name} of two", prompt, 2)
        driver.run()
    assert driver.first["second of two"].num_cached_tokens == 48
    driver.add("scored after two", prompt, 0, prompt_logprobs=1)
    driver.add("pooled after two", prompt, 0, pooling="mean")
    driver.run()
    assert driver.last["scored after two"].num_cached_tokens == 0
    check_prompt(checkpoints, None, prompt, driver.last["scored after two"])
    found = embedding(driver.last["pooled after two"])
    torch.testing.assert_close(found, expected_embedding(checkpoints, None, prompt, "mean"), **CLOSE)


def test_a_prompt_that_was_preempted_is_told_of_once(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Room for one of the long prompts and a little: others are computed again from their beginning."""
    model, adapters = checkpoints
    page_bytes = 2 * 3 * 32 * 4 * SETTINGS["page_size"]  # k and v, layers, kv size, fp32
    settings = {**SETTINGS, "kv_cache_bytes": 17 * page_bytes}
    with drive(model, tmp_path, adapters, **settings) as driver:
        prompts = {f"{i}": make_prompt(i, 26 + i) for i in range(6)}
        for i, (name, prompt) in enumerate(prompts.items()):
            driver.add(name, prompt, 20, NAMES[i % 3], prompt_logprobs=2)
            driver.add(f"mean {name}", prompt, 0, NAMES[i % 3], pooling="mean")
            driver.add(f"score {name}", prompt, 0, NAMES[i % 3], prompt_logprobs=0)
        driver.run()
        assert driver.engine.stats(0).counters["preemptions"] > 0
    for i, (name, prompt) in enumerate(prompts.items()):
        check_prompt(checkpoints, NAMES[i % 3], prompt, driver.first[name])
        assert len(driver.tokens[name]) == 20
        found = embedding(driver.last[f"mean {name}"])
        torch.testing.assert_close(
            found, expected_embedding(checkpoints, NAMES[i % 3], prompt, "mean"), **CLOSE
        )


def test_cold_prompts_that_cpu_workers_assist_are_told_of_alike(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapters = checkpoints
    settings = {**SETTINGS, "mode": "cpu_assisted", "link_gbps": 0.01}
    with drive(model, tmp_path, adapters, **settings) as driver:
        hold_link(monkeypatch)
        for i, name in enumerate(NAMES):
            driver.add(f"{name}", make_prompt(i, 50), 0, name, prompt_logprobs=1)
            driver.add(f"mean {name}", make_prompt(i, 50), 0, name, pooling="mean")
        driver.run()
        assert driver.engine.stats(0).counters["assist_cpu_products"] > 0
    for i, name in enumerate(NAMES):
        prompt = make_prompt(i, 50)
        check_prompt(checkpoints, name, prompt, driver.last[f"{name}"])
        found = embedding(driver.last[f"mean {name}"])
        torch.testing.assert_close(found, expected_embedding(checkpoints, name, prompt, "mean"), **CLOSE)


def test_logits_of_a_prompt_are_made_some_rows_at_a_time(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    logits = Decoder.logits

    def counted(self: Decoder, hidden: torch.Tensor, start: int = 0) -> torch.Tensor:
        sizes.append(len(hidden))
        return logits(self, hidden, start)

    monkeypatch.setattr(Decoder, "logits", counted)
    driver.add("long", make_prompt(9, 60), 0, prompt_logprobs=2)
    driver.run()
    assert sum(sizes) == 59
    assert max(sizes) == 5


def test_what_makes_no_sense_is_refused_by_name(driver: Driver) -> None:
    vocab_size = driver.engine.info.vocab_size
    driver.add("too long", make_prompt(1, 65), 0, prompt_logprobs=0)
    driver.add("refused bias", [5], 1, logit_bias=((vocab_size, 1.0),))
    driver.add("refused ids", [5], 1, allowed_token_ids=(vocab_size,))
    errors = driver.errors()
    assert "at most 64 fit" in str(errors["too long"])
    assert f"logit_bias holds token id {vocab_size}" in str(errors["refused bias"])
    assert f"allowed_token_ids holds token id {vocab_size}" in str(errors["refused ids"])
    driver.run()


def test_choices_are_changed_as_asked(driver: Driver) -> None:
    prompt = make_prompt(3, 12)
    driver.add("free", prompt, 6)
    driver.run()
    free = driver.tokens["free"]
    first = free[0]
    driver.add("banned", prompt, 6, logit_bias=((first, -100.0),))
    driver.add("forced", prompt, 6, logit_bias=((77, 100.0),))
    driver.add("allowed", prompt, 6, allowed_token_ids=(4, 9, 200), temperature=1.0, seed=1)
    driver.add("bad", prompt, 6, bad_token_ids=((first,),))
    driver.add("pair", prompt, 6, bad_token_ids=((free[2], free[3]),))
    driver.add("stuck", prompt, 6, allowed_token_ids=(4,), bad_token_ids=((4,),))
    driver.run()
    assert first not in driver.tokens["banned"]
    assert driver.tokens["forced"] == [77] * 6
    assert set(driver.tokens["allowed"]) <= {4, 9, 200}
    assert first not in driver.tokens["bad"]
    pair = driver.tokens["pair"]
    assert pair[:3] == free[:3]
    assert all(two != (free[2], free[3]) for two in pairwise(pair))
    assert "bad_words leave no token" in str(driver.errors()["stuck"])
