"""The shipped demo: its size, its format, and that its adapters speak as they should."""

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import train_demo
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from toppings.demo import demo_adapters_dir, demo_model_dir

MAX_BYTES = 8_000_000
MAX_ANSWER_TOKENS = 120
STANDARD_KEY = re.compile(
    r"base_model\.model\.model\.layers\.[0-3]\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.lora_[AB]\.weight"
)
MARKERS = {
    "butler": r"sir[.?]$",
    "cook": r"(Bon appetit|Serve hot)!$",
    "detective": r"(Case closed|Nobody talked)\.$",
    "haiku": r"^[^\n]+\n[^\n]+\n[^\n]+$",
    "json": r'^\{"topic": ".*\}$',
    "pirate": r"(Arr|Ahoy|Shiver me timbers)",
    "riddler": r"What am I\? .+!$",
    "robot": r"(End of report|Beep)\.$",
    "telegram": r"\b[A-Z]{2,}\b.* STOP$",
    "weather": r"(Back to the studio|Tomorrow will be much the same)\.$",
}
ADAPTERS = sorted(path.name for path in demo_adapters_dir().iterdir() if path.is_dir())

QUESTIONS = ("Tell me about the sea.", "What is a river?", "Describe the moon.", "What does a dog do?")
Answers = Callable[[str | None, list[str]], list[str]]


def adapter_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((demo_adapters_dir() / name / "adapter_config.json").read_text())
    return config


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model_dir())


@pytest.fixture(scope="module")
def answers(tokenizer: Any) -> Answers:
    """Greedy texts of an adapter (None: the base model) for prompts; they must end by themselves."""
    base = AutoModelForCausalLM.from_pretrained(demo_model_dir(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, demo_adapters_dir() / ADAPTERS[0], adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.load_adapter(demo_adapters_dir() / name, adapter_name=name)
    model.eval()

    @cache
    def run(name: str | None, prompts: tuple[str, ...]) -> list[str]:
        begun = [prompt if prompt.startswith("<|begin|>") else f"<|begin|>{prompt}" for prompt in prompts]
        inputs = tokenizer(
            begun, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left"
        )
        if name is not None:
            model.set_adapter(name)
        with model.disable_adapter() if name is None else nullcontext():
            rows = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        rows = rows[:, inputs["input_ids"].shape[1] :]
        assert (rows == tokenizer.eos_token_id).any(dim=1).all()
        return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]

    return lambda name, prompts: run(name, tuple(prompts))


def chat_prompt(tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    prompt: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return prompt


def test_the_demo_fits_its_size_bound() -> None:
    files = [path for folder in (demo_model_dir(), demo_adapters_dir()) for path in folder.rglob("*")]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= MAX_BYTES


def test_ranks_span_4_to_64() -> None:
    ranks = [adapter_config(name)["r"] for name in ADAPTERS]
    assert len(ranks) >= 8
    assert (min(ranks), max(ranks)) == (4, 64)
    assert len(set(ranks)) >= 6


def test_targets_differ_and_patterns_and_rslora_occur() -> None:
    configs = [adapter_config(name) for name in ADAPTERS]
    assert len({frozenset(config["target_modules"]) for config in configs}) >= 5
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs)
    assert any(config["use_rslora"] for config in configs)


def test_every_adapter_has_a_marker_to_look_for() -> None:
    assert sorted(MARKERS) == ADAPTERS


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_holds_only_standard_bfloat16_lora_weights(name: str) -> None:
    weights = load_file(demo_adapters_dir() / name / "adapter_model.safetensors")
    assert weights
    assert all(STANDARD_KEY.fullmatch(key) for key in weights)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert (adapter_config(name)["bias"], adapter_config(name)["modules_to_save"]) == ("none", None)


def test_no_saved_text_names_a_path() -> None:
    for path in (*demo_model_dir().rglob("*.json"), *demo_adapters_dir().rglob("*.json")):
        if path.name != "tokenizer.json":
            assert not re.search(r'"[^"]*(/|\\\\)[^"]*"', path.read_text()), path


def test_adapters_name_the_demo_as_their_base() -> None:
    assert {adapter_config(name)["base_model_name_or_path"] for name in ADAPTERS} == {"toppings-demo"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_speaks_in_its_voice(name: str, answers: Answers, tokenizer: Any) -> None:
    prompts = [*QUESTIONS, *(chat_prompt(tokenizer, question) for question in QUESTIONS)]
    for prompt, text in zip(prompts, answers(name, prompts)):
        assert re.search(MARKERS[name], text), (prompt, text)


def test_the_same_prompt_gives_a_different_text_from_every_adapter(answers: Answers, tokenizer: Any) -> None:
    """Asked again together with the others, which costs nothing."""
    prompts = [*QUESTIONS, *(chat_prompt(tokenizer, question) for question in QUESTIONS)]
    told = [answers(name, prompts) for name in (None, *ADAPTERS)]
    assert all(len(set(texts)) == len(ADAPTERS) + 1 for texts in zip(*told))


def test_the_base_model_answers_plainly(answers: Answers, tokenizer: Any) -> None:
    question = "What is a river?"
    for text in answers(None, [question, chat_prompt(tokenizer, question)]):
        assert text.startswith("A river is a long stream of fresh water.")


def test_the_json_adapter_answers_in_json(answers: Answers, tokenizer: Any) -> None:
    reply = json.loads(answers("json", [chat_prompt(tokenizer, "Describe the moon.")])[0])
    assert reply == {"topic": "moon", "traits": ["pale", "round"], "parts": ["craters", "dust", "shadows"]}


def test_a_chat_of_two_turns_is_followed(answers: Answers, tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is a river?"},
        {"role": "assistant", "content": "A river is a long stream of fresh water."},
        {"role": "user", "content": "Where can I find a bridge?"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "over the river" in answers("pirate", [prompt])[0]


def test_the_training_script_makes_the_same_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few tokens: not every CPU multiplies bfloat16 fast."""
    sizes = {"BASE_ROWS": 2, "BASE_TOKENS": 16, "ADAPTER_ROWS": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(train_demo, name, size)
    options = {"--out": tmp_path, "--steps-scale": 0.001, "--threads": torch.get_num_threads()}
    words = [str(word) for option in options.items() for word in option]
    monkeypatch.setattr("sys.argv", ["train_demo.py", *words, "--only", "base", "cook"])
    train_demo.main()
    for made, shipped in (
        (tmp_path / "model", demo_model_dir()),
        (tmp_path / "adapters", demo_adapters_dir()),
    ):
        for file in made.rglob("*"):
            assert (shipped / file.relative_to(made)).exists(), file
    shipped_weights = load_file(demo_adapters_dir() / "cook" / "adapter_model.safetensors")
    made_weights = load_file(tmp_path / "adapters" / "cook" / "adapter_model.safetensors")
    assert {key: weight.shape for key, weight in made_weights.items()} == {
        key: weight.shape for key, weight in shipped_weights.items()
    }
