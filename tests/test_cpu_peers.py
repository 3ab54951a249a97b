"""What the comparison with other CPU servers is made of: files for llama.cpp, rounds, figures, processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GgufConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from peers import gguf_files
from peers.cases import ADAPTERS, CASES, COMPETITORS, EIGHT, LONG_ONE, ONE
from peers.isa import AVX2, environment
from peers.measuring import Plan, Samples, measure
from peers.report import aims_of, figures_of, floors_of
from peers.running import SideFailed, running

from toppings.synth import PRESETS, AdapterShape, ModelShape, projection_sizes, write_adapters, write_model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers") / "model"
    write_model(path, PRESETS["tiny"])
    return path


@pytest.mark.parametrize(("kind", "error"), [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 0.02)])
def test_a_file_for_llama_cpp_holds_the_checkpoint(
    kind: str, error: float, checkpoint: Path, tmp_path: Path
) -> None:
    """As transformers reads it."""
    gguf_files.write_model(tmp_path / "m.gguf", checkpoint, kind)
    settings = {"quantization_config": GgufConfig(dequantize=True), "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", **settings)
    found, expected = model.state_dict(), load_file(checkpoint / "model.safetensors")
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert (found[name].float() - weight).abs().max() <= error * weight.abs().max(), name
    config = PRESETS["tiny"]
    assert (model.config.num_key_value_heads, model.config.head_dim) == (config.kv_heads, 16)


def matrices(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    tensors = GGUFReader(file).tensors
    return {each.name: dequantize(each.data, each.tensor_type) for each in tensors}


def test_an_adapters_file_adds_to_the_models_what_the_adapter_adds(checkpoint: Path, tmp_path: Path) -> None:
    """On the file's own rows: what comes of both is the file of the merged checkpoint."""
    shape = AdapterShape(ranks=(4,), targets=TARGETS, dtype="float32")
    write_adapters(tmp_path / "adapters", checkpoint, shape, count=1)
    adapter = tmp_path / "adapters" / "adapter-00000"
    weights, lora = (
        load_file(file) for file in (checkpoint / "model.safetensors", adapter / "adapter_model.safetensors")
    )
    for name in [name for name in lora if ".lora_A." in name]:
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        weights[target] += lora[name.replace("lora_A", "lora_B")] @ lora[name]  # alpha is the rank
    merged = tmp_path / "merged"
    merged.mkdir()
    save_file(weights, merged / "model.safetensors")
    (merged / "config.json").write_text((checkpoint / "config.json").read_text())
    gguf_files.write_model(tmp_path / "base.gguf", checkpoint, "F32")
    gguf_files.write_model(tmp_path / "merged.gguf", merged, "F32")
    gguf_files.write_adapter(tmp_path / "adapter.gguf", adapter, checkpoint)
    base, expected, added = (matrices(tmp_path / f"{n}.gguf") for n in ("base", "merged", "adapter"))
    assert len(added) == 2 * len(TARGETS) * PRESETS["tiny"].layers
    for name in base:
        product = added[f"{name}.lora_b"] @ added[f"{name}.lora_a"] if f"{name}.lora_b" in added else 0
        assert np.abs(base[name] + product - expected[name]).max() < 0.01, name


def test_no_file_is_made_of_a_model_that_it_would_misstate(tmp_path: Path) -> None:
    write_model(
        tmp_path / "m", ModelShape(family="qwen2", hidden=32, layers=1, heads=2, kv_heads=1, vocab=512)
    )
    with pytest.raises(ValueError, match="plain Llamas only, not of qwen2"):
        gguf_files.write_model(tmp_path / "m.gguf", tmp_path / "m", "F16")


class Fake:
    """Answers after so many seconds, by case; from answer `fails_at` on it fails."""

    def __init__(self, seconds: dict[str, float], fails_at: int = 1000) -> None:
        self.seconds, self.fails_at = seconds, fails_at
        self.asked: list[tuple[str, int]] = []

    def ask(self, **question: Any) -> dict[str, Any]:
        prompts, adapters = question["prompts"], question["adapters"]
        shape = (len(prompts), len(prompts[0]), adapters is not None)
        [name] = [n for n, c in CASES.items() if shape == (c.num_prompts, c.prompt_len, c.has_adapters)]
        self.asked.append((name, question["num_tokens"]))
        if len(self.asked) >= self.fails_at:
            raise SideFailed("no more")
        seconds = self.seconds[name] + len(self.asked) / 1000
        return {"seconds": seconds, "tokens": [[7] * question["num_tokens"] for _ in prompts]}


class Limits:
    def __init__(self) -> None:
        self.num_asked = 0

    def ask(self, **question: Any) -> dict[str, Any]:
        self.num_asked += 1
        return {"read_gbps": 20.0 if self.num_asked == 1 else 10.0}


QUICK = dict.fromkeys(CASES, 0.1)
PLAN = Plan([f"a{i}" for i in range(8)], 4, rounds=3, patience_s=1.0, minutes=60.0)


def test_in_rounds_all_are_asked_the_slow_once_and_those_that_fail_no_more() -> None:
    sides = {
        "ours_bf16": Fake(QUICK),
        "vllm_bf16": Fake({**QUICK, EIGHT: 2.0}),
        "llama_f16": Fake(QUICK, fails_at=3),
    }
    samples = measure(sides, Limits(), COMPETITORS, PLAN)
    every = [(ONE, 1), (LONG_ONE, 1), (ONE, 4), (EIGHT, 4), (ADAPTERS, 4)]
    assert sides["ours_bf16"].asked == every * 3
    once = [(ONE, 1), (LONG_ONE, 1), (ONE, 4)]
    assert sides["vllm_bf16"].asked == [*once, (EIGHT, 4), *once, *once]  # its engine has no adapters
    assert sides["llama_f16"].asked == every[:3]
    assert samples.failures == {"llama_f16": "no more"}
    assert samples.limits == {"read_gbps": 20.0}
    _, second, third = samples.seconds["ours_bf16", ONE, 1]
    assert samples.median_s("ours_bf16", ONE, 1) == pytest.approx((second + third) / 2)
    assert samples.median_s("llama_f16", EIGHT, 4) is None


def test_no_round_begins_when_the_time_is_up() -> None:
    side = Fake(QUICK)
    measure({"ours_bf16": side}, Limits(), COMPETITORS, Plan(PLAN.adapters, 4, 3, 1.0, minutes=0.0))
    assert len(side.asked) == 5


def test_figures_are_compared_where_both_are_there(checkpoint: Path) -> None:
    samples = Samples()
    samples.seconds |= {
        ("ours_bf16", ONE, 1): [9.0, 0.1],
        ("ours_bf16", ONE, 5): [9.0, 0.3],
        ("ours_bf16", EIGHT, 5): [2.0],
        ("ours_bf16", ADAPTERS, 5): [9.0, 2.5, 2.5],
        ("llama_f16", ONE, 1): [0.1],
        ("llama_f16", ONE, 5): [0.26],
        ("llama_f16", ADAPTERS, 5): [8.0],
    }
    figures = figures_of(samples, 5)
    assert figures["ours_bf16"] == pytest.approx({
        "ttft_128_ms": 100.0, "tpt_ms": 50.0, "eight_tokens_per_s": 20.0, "eight_adapters_tokens_per_s": 16.0,
    })  # fmt: skip
    floors = {"tpt_ms": 40.0, "ttft_512_ms": 1.0}
    aims = {aim.what: (round(aim.value, 6), aim.is_met) for aim in aims_of(figures, floors)}
    assert aims == {
        "tpt_ms of ours_bf16 over llama_f16": (1.25, False),
        "ttft_128_ms of ours_bf16 over llama_f16": (1.0, True),
        "eight_adapters_tokens_per_s of ours_bf16 over llama_f16": (3.2, False),
        "tpt_ms of ours_bf16 over this machine's floor": (1.25, True),
        "ours_bf16: tokens/s with 8 adapters over without": (0.8, False),
    }


def test_floors_are_bytes_and_operations(checkpoint: Path) -> None:
    sizes, num_layers = projection_sizes(checkpoint)
    per_layer = sum(a * b for a, b in sizes.values())
    assert num_layers * per_layer + 512 * 64 == sum(
        weight.numel()
        for name, weight in load_file(checkpoint / "model.safetensors").items()
        if weight.ndim == 2 and "embed" not in name
    )
    floors = floors_of(checkpoint, {"read_gbps": 2.0, "sgemm_gflops": 1.0, "bf16_gflops": 0.5})
    assert floors["tpt_ms"] == pytest.approx((num_layers * per_layer + 512 * 64) / 1e6)
    pairs = 512 * 513 / 2  # of a query's and a key's places
    products = num_layers * (2 * 512 * per_layer + 4 * 64 * pairs) + 2 * 512 * 64
    assert floors["ttft_512_ms"] == pytest.approx(products / 1e6)


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        ("/nowhere/python", "cannot run /nowhere/python: No such file"),
        (sys.executable, "No module named 'llama_cpp'"),
    ],
)
def test_a_peer_that_is_not_there_says_why(python: str, reason: str, tmp_path: Path) -> None:
    side = running("with_llama_cpp", python=python, isa=AVX2, job={}, log=tmp_path / "log")
    with pytest.raises(SideFailed, match=reason), side:
        pass


def test_what_is_held_to_avx2_uses_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    code = (
        "from toppings.ops import dispatch; from toppings.ops.product_profile import this_cpu;"
        "from peers.isa import hold_torch; import torch; hold_torch();"
        "print(this_cpu(), dispatch.has_bf16(), torch.cpu._is_avx512_bf16_supported())"
    )
    variables = {**environment(AVX2), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    assert "(AVX2; torch" in done.stdout, "bfloat16 products would be named here"
    assert done.stdout.split()[-2:] == ["False", "False"]
    assert torch.__version__ in done.stdout
