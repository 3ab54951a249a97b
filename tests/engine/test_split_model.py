"""A model split over two processes gives the tokens of transformers + PEFT, and ends as one engine."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.engine.driver import Driver, drive
from tests.engine.oracle import (
    ALL_LINEAR,
    make_adapter,
    make_kind,
    make_model,
    make_prompt,
    reference_model,
    reference_tokens,
)
from tests.gate import ONE_GPU
from tests.waiting import PATIENCE_S, wait_until
from toppings.config import ConfigError, EngineConfig
from toppings.engine.base import open_registry
from toppings.engine.build import build_engine
from toppings.engine.client import EngineClient, EngineDeadError
from toppings.engine.faults import FollowerLostError
from toppings.engine.heartbeat import open_lifeline
from toppings.sampling_params import SamplingParams, Structure, StructureKind
from toppings.synth import write_tokenizer

ADAPTERS: dict[str, dict[str, object]] = {
    "all-r8": {"rank": 8},
    "qkv-r32": {"rank": 32, "targets": ("q_proj", "k_proj", "v_proj")},
    "o-down-r16": {"rank": 16, "targets": ("o_proj", "down_proj")},
    "mlp-r5-rslora": {"rank": 5, "targets": ("gate_proj", "up_proj", "down_proj"), "use_rslora": True},
    "one-layer": {"rank": 12, "targets": ("v_proj", "o_proj"), "layers_to_transform": [1]},
}
INVOCATION = [11, 12, 13]
ADAPTERS["activated"] = {"rank": 8, "alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"}
KINDS: dict[str, tuple[Any, int]] = {
    "dora": (LoraConfig(r=4, use_dora=True, target_modules=list(ALL_LINEAR)), 0),
    "bias": (LoraConfig(r=4, lora_bias=True, target_modules=list(ALL_LINEAR)), 0),
    "ends": (LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], modules_to_save=["norm"]), 0),
    "added": (LoraConfig(r=4, target_modules=["o_proj"]), 3),
}
"""With how many tokens they add."""
POOL_BYTES = 160 * 1024
PAGE_BYTES = 16 * 2 * 1 * 16 * 4 * 3  # tokens · (k, v) · kv heads of a part · head dim · fp32 · layers


def draw_biases(model: Path) -> None:
    """Instead of the zeros that transformers begins with."""
    file = model / "model.safetensors"
    weights = load_file(file)
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if name.endswith(".bias"):
            weight.normal_(0, 0.3, generator=generator)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A Llama with grouped queries, a bias everywhere, and a vocabulary that no two parts share evenly."""
    root = tmp_path_factory.mktemp("llama")
    model = make_model(root / "model", attention_bias=True, mlp_bias=True, vocab_size=321)
    draw_biases(model)
    write_tokenizer(model, 321)
    adapters = {
        name: make_adapter(root / name, model, seed=i, **kind)  # type: ignore[arg-type]
        for i, (name, kind) in enumerate(ADAPTERS.items())
    }
    for i, (name, (config, num_added)) in enumerate(KINDS.items()):
        adapters[name] = make_kind(root / name, model, config, seed=i, num_added=num_added)
    return model, adapters


HAS_TWO_GPUS = torch.cuda.device_count() >= 2
ON_GPUS = pytest.param("cuda", marks=pytest.mark.skipif(not HAS_TWO_GPUS, reason=ONE_GPU))


@pytest.fixture(scope="module", params=["cpu", ON_GPUS])
def driver(
    request: pytest.FixtureRequest,
    checkpoints: tuple[Path, dict[str, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Driver]:
    """Two parts. Room for some of the adapters at a time, and for few sequences."""
    settings: dict[str, Any] = {
        "device": request.param,
        "tensor_parallel_size": 2,
        "device_pool_bytes": POOL_BYTES,
        "host_store_bytes": 4 * POOL_BYTES,
        "kv_cache_bytes": 14 * PAGE_BYTES,
        "max_model_len": 200,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 8,
        "max_adapter_wait_s": 0.1,
        "link_gbps": 0.05,
    }
    with drive(checkpoints[0], tmp_path_factory.mktemp("state"), checkpoints[1], **settings) as driver:
        yield driver
    assert not followers_of(os.getpid())


def followers_of(pid: int) -> list[int]:
    return [p for p in children_of(pid) if "follower_process" in command_of(p)]


def children_of(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_mixed_adapters_chunked_evicted_and_preempted_match_the_oracle(
    driver: Driver, checkpoints: tuple[Path, dict[str, Path]]
) -> None:
    model, adapters = checkpoints
    names: list[str | None] = [*adapters, None]
    prompts = {name: make_prompt(i, 23 + 9 * i) for i, name in enumerate(names)}
    prompts["added"][5:8] = [321, 322, 323]
    prompts["activated"][40:40] = INVOCATION
    for turn in range(2):
        for name, prompt in prompts.items():
            driver.add(f"{name} {turn}", prompt, 16, name)
        driver.run()
    many = {f"base {i}": make_prompt(i, 60) for i in range(3)}  # room for their prompts alone
    for name, prompt in many.items():
        driver.add(name, prompt, 40, None)
    driver.run()
    assert all(driver.tokens[name] == reference_tokens(model, None, many[name], 40) for name in many)
    for turn in range(2):  # with nobody beside it, whose pages could take its blocks' place
        driver.add(f"alone {turn}", many["base 0"], 4, None)
        driver.run()
    for name, prompt in prompts.items():
        expected = reference_tokens(model, adapters[name] if name else None, prompt, 16)
        assert [driver.tokens[f"{name} {turn}"] for turn in range(2)] == [expected] * 2, name
    stats = driver.engine.stats(0)
    assert stats.counters["preemptions"] > 0
    assert stats.counters["device_evictions"] > 0
    assert stats.counters["adapter_loads"] > len(adapters)
    assert stats.counters["prefix_cache_hits"] > 0
    assert stats.device_bytes_used <= POOL_BYTES


def test_a_page_that_is_copied_is_copied_in_every_part(
    driver: Driver, checkpoints: tuple[Path, dict[str, Path]]
) -> None:
    model, _ = checkpoints
    prompt = make_prompt(77, 21)
    driver.add("turn", prompt, 8, None)
    more = [*prompt, *driver.run()["turn"], *make_prompt(78, 3)]
    driver.add("next turn", more, 8, None)
    assert driver.run()["next turn"] == reference_tokens(model, None, more, 8)
    assert driver.first["next turn"].num_cached_tokens == 21 + 7


def test_a_structured_output_is_what_it_is_held_to(
    driver: Driver, checkpoints: tuple[Path, dict[str, Path]]
) -> None:
    structure = Structure(StructureKind.CHOICE, '["left", "right"]')
    for name in (None, "all-r8"):
        driver.add(f"held {name}", [5] * 9, 20, name, structure=structure, ignore_eos=False)
    driver.add("free", [5] * 9, 20)
    driver.run()
    tokenizer = Tokenizer.from_file(str(checkpoints[0] / "tokenizer.json"))
    for name in (None, "all-r8"):
        *tokens, end = driver.tokens[f"held {name}"]
        assert end == 2
        assert tokenizer.decode(tokens) in ("left", "right")
    assert len(driver.tokens["free"]) == 20


def test_scores_of_prompts_are_those_of_the_whole_model(
    driver: Driver, checkpoints: tuple[Path, dict[str, Path]]
) -> None:
    """Prompts in chunks, beside others of which nothing is asked."""
    model, adapters = checkpoints
    names: tuple[str | None, ...] = (None, "all-r8", "o-down-r16", "dora", "ends", "added")
    for i, name in enumerate(names):
        driver.add(f"scored {i}", make_prompt(i, 41), i, name, prompt_logprobs=2)
        driver.add(f"beside {i}", make_prompt(i, 20), 3, name)
    driver.run()
    for i, name in enumerate(names):
        prompt = make_prompt(i, 41)
        reference = reference_model(model, adapters[name] if name else None)
        with torch.inference_mode():
            expected = reference(input_ids=torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        told = driver.first[f"scored {i}"].prompt_logprobs
        assert told is not None
        values = torch.tensor([each.logprob for each in told.tokens(prompt[1:])])
        wanted = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(values, wanted, atol=1e-3, rtol=0.0)


def test_adapters_add_no_communication(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[int] = []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor) -> None:
        sums.append(tensor.numel())
        all_reduce(tensor)

    monkeypatch.setattr(torch.distributed, "all_reduce", counted)
    counts = {}
    for adapter in (None, "all-r8"):
        driver.add(f"one step with {adapter}", [5] * 9, 1, adapter)
        driver.run()
        counts[adapter], sums[:] = list(sums), []
    assert counts[None] == counts["all-r8"] == [9 * 64] * 2 * 3  # rows · hidden, twice in each of 3 layers


async def test_when_a_follower_is_killed_callers_hear_of_it_and_no_process_stays(tmp_path: Path) -> None:
    """A Qwen2, whose one key-value head both parts hold and whose embedding is tied."""
    shape = {"num_key_value_heads": 1, "max_position_embeddings": 4096}
    model = make_model(tmp_path / "model", "qwen2", tie_word_embeddings=True, **shape)
    draw_biases(model)
    adapter = make_adapter(tmp_path / "adapter", model, rank=8)
    config = EngineConfig(
        model=str(model),
        state_dir=str(tmp_path / "state"),
        dtype="float32",
        num_threads=1,
        kv_cache_bytes=2**22,
        mode="cached",
        tensor_parallel_size=2,
    )
    registry = open_registry(config)
    adapter_id = registry.register("a", adapter).adapter_id
    registry.close()
    client = await EngineClient.start(config)
    engine = next(p for p in children_of(os.getpid()) if "toppings.engine.process" in command_of(p))
    (follower,) = followers_of(engine)
    greedy = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    for a in (None, adapter_id):
        tokens = [t async for o in client.generate(make_prompt(2, 21), greedy, a) for t in o.token_ids]
        assert tokens == reference_tokens(model, adapter if a else None, make_prompt(2, 21), 10)
    endless = SamplingParams(temperature=0.0, max_tokens=3000, ignore_eos=True)
    stream = client.generate(make_prompt(0, 10), endless, adapter_id)
    await anext(stream)
    os.kill(follower, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(EngineDeadError):
            async for _ in stream:
                pass
        await client.shutdown(0.0)
    assert not is_alive(engine)
    assert not is_alive(follower)


def test_a_follower_ends_with_its_lead() -> None:
    mine, theirs = socket.socketpair()
    pulse, beats = open_lifeline()
    fds = (theirs.fileno(), beats.fileno())
    command = [sys.executable, "-m", "toppings.engine.follower_process", *map(str, fds)]
    with theirs, beats:
        process = subprocess.Popen(command, pass_fds=fds)
    with pulse:
        mine.close()  # as the kernel does for a lead that is killed
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    ("size", "problem"),
    [(3, "4 attention heads; choose one of 1, 2, 4"), (8, "4 attention heads; choose one of 1, 2, 4")],
)
def test_a_size_that_does_not_divide_the_model_is_refused(
    checkpoints: tuple[Path, dict[str, Path]], size: int, problem: str
) -> None:
    with pytest.raises(ValueError, match=f"tensor_parallel_size is {size}, but the model has {problem}"):
        build_engine(EngineConfig(model=str(checkpoints[0]), tensor_parallel_size=size))


@pytest.mark.parametrize("mode", ["cpu_assisted", "cpu_shrink"])
def test_cpu_assistance_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match=f"mode is '{mode}'.*choose cached"):
        EngineConfig(tensor_parallel_size=2, mode=mode)


def test_more_parts_than_devices_are_refused(
    checkpoints: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    config = EngineConfig(model=str(checkpoints[0]), tensor_parallel_size=2, device="cuda")
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2, but this machine shows 1 CUDA"):
        build_engine(config)


def test_an_idle_engine_notices_that_a_follower_has_ended(driver: Driver) -> None:
    """The last test: the engine cannot be used after it."""
    os.kill(followers_of(os.getpid())[0], signal.SIGKILL)
    with pytest.raises(FollowerLostError, match=r"part 1 of the model \(pid \d+\) ended with signal 9"):
        wait_until(driver.engine.poll)  # as an idle engine's loop does


def test_steps_ahead_of_a_split_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps are taken in turn"):
        EngineConfig(tensor_parallel_size=2, mode="pipelined", async_scheduling="on")
