"""Random-weight checkpoints of a given shape, for benchmarks and tests: they can be served at once."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toppings.config import ConfigError
from toppings.core import MODULES, stored_modules

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = ("bfloat16", "float16", "float32")
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|turn|>")
NUM_BYTES = 256
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
MAX_LEN = 4096
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder's shape. Raises ConfigError where it is none."""

    family: str = "llama"
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 512
    vocab: int = 1024
    dtype: str = "bfloat16"
    max_len: int = MAX_LEN

    def __post_init__(self) -> None:
        _require(self.family in FAMILIES, f"family is {self.family!r}; choose one of {', '.join(FAMILIES)}")
        _require(self.dtype in DTYPES, f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        for name in ("hidden", "layers", "heads", "kv_heads", "intermediate", "max_len"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        _require(self.hidden % self.heads == 0, f"hidden {self.hidden} is no multiple of heads {self.heads}")
        _require(self.hidden // self.heads % 2 == 0, f"head size {self.hidden // self.heads} must be even")
        _require(
            self.heads % self.kv_heads == 0, f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}"
        )
        smallest = NUM_BYTES + len(SPECIAL_TOKENS)
        _require(self.vocab >= smallest, f"vocab is {self.vocab}; it must be at least {smallest}")


PRESETS = {
    "tiny": ModelShape(
        hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocab=512, dtype="float32"
    ),
    "small-211m": ModelShape(
        hidden=1024, layers=16, heads=16, kv_heads=16, intermediate=2816, vocab=8000, dtype="bfloat16"
    ),
}


def write_model(path: Path, shape: ModelShape, *, seed: int = 0) -> None:
    """A Hugging Face checkpoint with normal random weights and a byte-level tokeniser.

    Raises ConfigError where `path` holds something already.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _make_empty(path)
    config = AutoConfig.for_model(
        shape.family,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.max_len,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
    model.save_pretrained(path)
    write_tokenizer(path, shape.vocab)


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A byte-level BPE of exactly `vocab_size` tokens: specials, bytes, then letter pairs and triples."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_merges = vocab_size - len(SPECIAL_TOKENS) - len(alphabet)
    merges = list(itertools.islice(_merges(), num_merges))
    tokens = [*SPECIAL_TOKENS, *alphabet, *(a + b for a, b in merges)]
    tokens += [f"<|unused{i}|>" for i in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[0]} $A", special_tokens=[(SPECIAL_TOKENS[0], 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs and triples of letters, with a space before (byte-level: "\u0120") or not, in a fixed order."""
    starts = ["\u0120", *LETTERS, *LETTERS.upper()]
    pairs = [(a, b) for b in LETTERS for a in starts]
    yield from pairs
    triples = [(a + b, c) for c in LETTERS for a, b in pairs]
    yield from triples
    yield from ((a + b, c) for c in LETTERS for a, b in triples)


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """Which adapters to make: `ranks` and `targets` are cycled and targeted in this order."""

    ranks: tuple[int, ...] = (8, 16, 32, 64)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _require(
            bool(self.ranks) and min(self.ranks) >= 1, f"ranks are {self.ranks}; each must be at least 1"
        )
        _require(bool(self.targets), "targets are empty; name at least one projection")
        for target in self.targets:
            _require(target in MODULES, f"target {target!r} is unknown; choose from {', '.join(MODULES)}")
        _require(self.dtype in DTYPES, f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")


def write_adapters(
    path: Path,
    model: Path,
    shape: AdapterShape,
    *,
    count: int,
    seed: int = 0,
    modules: Mapping[str, tuple[int, ...]] | None = None,
    on_written: Callable[[int], None] = lambda _: None,
) -> None:
    """`count` PEFT adapters of `model`: adapter-00000 and so on. A and B are both random, so outputs change.
    `modules`: those of its layers, where they are others than `core.stored_modules` says of most models.

    Raises ConfigError where `path` holds something already, or `model` is no checkpoint or lacks a target.
    """
    import torch

    sizes, num_layers = projection_sizes(model)
    modules = modules or stored_modules(is_fused=False, has_experts=False)
    names = {MODULES[index]: name for name, made in modules.items() for index in made}
    for target in shape.targets:
        _require(target in names, f"target {target!r} is none of {model}; it has {', '.join(names)}")
    targeted = {name: modules[name] for name in dict.fromkeys(names[target] for target in shape.targets)}
    _make_empty(path)
    generator = torch.Generator().manual_seed(seed)
    for index, rank in zip(range(count), itertools.cycle(shape.ranks)):
        _write_adapter(
            path / f"adapter-{index:05d}",
            model,
            shape,
            rank,
            sizes=sizes,
            num_layers=num_layers,
            modules=targeted,
            generator=generator,
        )
        on_written(1)


def projection_sizes(model: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """(in, out) of every projection, and the number of layers, from a checkpoint's config.json."""
    try:
        config = json.loads((model / "config.json").read_text())
        hidden, heads, inter = (
            config["hidden_size"],
            config["num_attention_heads"],
            config["intermediate_size"],
        )
        num_layers: int = config["num_hidden_layers"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{model} is no checkpoint with a readable config.json: {error!r}") from error
    head = config.get("head_dim") or hidden // heads
    q, kv = head * heads, head * (config.get("num_key_value_heads") or heads)
    outs = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    mlp = {"gate_proj": (hidden, inter), "up_proj": (hidden, inter), "down_proj": (inter, hidden)}
    return {**outs, **mlp}, num_layers


def _write_adapter(
    path: Path,
    model: Path,
    shape: AdapterShape,
    rank: int,
    *,
    sizes: dict[str, tuple[int, int]],
    num_layers: int,
    modules: Mapping[str, tuple[int, ...]],
    generator: Any,
) -> None:
    """`modules`: the targeted ones; of what is in them beside the targets, B is zero."""
    import torch
    from safetensors.torch import save_file

    path.mkdir()
    dtype = getattr(torch, shape.dtype)
    tensors = {}
    for layer, (name, made) in itertools.product(range(num_layers), modules.items()):
        key = f"base_model.model.model.layers.{layer}.{name}"
        outs = {MODULES[index]: sizes[MODULES[index]][1] for index in made}
        num_in = sizes[MODULES[made[0]]][0]
        a = torch.randn(rank, num_in, generator=generator) / num_in**0.5
        b = torch.randn(sum(outs.values()), rank, generator=generator) / rank**0.5
        for target, rows in zip(outs, b.split(list(outs.values())), strict=True):
            if target not in shape.targets:
                rows.zero_()
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a.to(dtype), b.to(dtype)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(
        json.dumps(_adapter_config(model, rank, [name.split(".")[1] for name in modules]), indent=2)
    )


def _adapter_config(model: Path, rank: int, targets: Sequence[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "inference_mode": True,
    }


def _make_empty(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is there already; name a new or an empty directory")
    path.mkdir(parents=True, exist_ok=True)
