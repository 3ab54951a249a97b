"""Make the demo that ships with Toppings: a small Llama model and ten LoRA adapters, each another voice.

    python examples/train_demo.py --out src/toppings/demo

Its packages come with `make setup`.

Everything is trained from the text in demo_topics.txt and demo_voices.py, on the CPU, with fixed seeds.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from demo_corpus import (
    BOS,
    EOS,
    PAD,
    QUESTIONS,
    ROLES,
    Segment,
    all_text,
    answer,
    base_document,
    document,
    held_out_pairs,
)
from demo_voices import PLAIN, VOICES, Voice
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BASE_NAME = "toppings-demo"
VOCABULARY_SIZE = 2048
BASE_STEPS, BASE_ROWS, BASE_TOKENS = 1200, 32, 128  # optimizer steps, rows of a batch, tokens of a row
ADAPTER_STEPS, ADAPTER_ROWS = 160, 16
BASE_RATE, ADAPTER_RATE = 3e-3, 2e-3
NO_LOSS = -100

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message.role not in ['system', 'user', 'assistant'] %}\
{{ raise_exception('role must be system, user or assistant, not ' ~ message.role) }}{% endif %}\
{{ '<|' ~ message.role ~ '|>' ~ message.content | trim ~ eos_token }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


@dataclass(frozen=True)
class Recipe:
    """What distinguishes one adapter's LoRA from another's."""

    rank: int
    alpha: int
    targets: list[str]
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)


RECIPES = {
    "butler": Recipe(4, 8, ["q_proj", "v_proj"]),
    "json": Recipe(4, 12, ["q_proj", "k_proj", "v_proj"]),
    "pirate": Recipe(8, 16, ["q_proj", "v_proj"]),
    "telegram": Recipe(8, 8, ATTENTION + MLP),
    "haiku": Recipe(16, 32, ["q_proj", "k_proj", "v_proj"]),
    "robot": Recipe(16, 16, ATTENTION),
    "riddler": Recipe(32, 32, MLP),
    "weather": Recipe(32, 8, ATTENTION, use_rslora=True),
    "cook": Recipe(
        48,
        48,
        ATTENTION + MLP,
        rank_pattern={"gate_proj": 16, "up_proj": 16, "layers.0.self_attn.q_proj": 24},
        alpha_pattern={"gate_proj": 8, "layers.0.self_attn.q_proj": 48},
    ),
    "detective": Recipe(64, 64, ATTENTION + MLP),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[BOS, EOS, PAD, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(all_text(), trainer)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, raw.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Encoder:
    """Segments to token ids and labels; remembers each piece of text, since answers recur."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.seen: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.seen:
            self.seen[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.seen[text]

    def __call__(self, segments: list[Segment]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for text, is_produced in segments:
            piece = self.ids(text)
            ids += piece
            labels += piece if is_produced else [NO_LOSS] * len(piece)
        return ids, labels


Batch = dict[str, torch.Tensor]


def packed_batches(encode: Encoder, rng: Random) -> Callable[[], Batch]:
    """Documents end to end, cut into rows: for the base model, whose documents are independent."""
    stream: list[int] = []

    def next_batch() -> Batch:
        nonlocal stream
        while len(stream) < BASE_ROWS * BASE_TOKENS:
            stream += encode(base_document(rng))[0]
        ids = torch.tensor(stream[: BASE_ROWS * BASE_TOKENS]).view(BASE_ROWS, BASE_TOKENS)
        stream = stream[BASE_ROWS * BASE_TOKENS :]
        return {"input_ids": ids, "labels": ids}

    return next_batch


def padded_batches(encode: Encoder, voice: Voice, rng: Random) -> Callable[[], Batch]:
    """A document a row: for an adapter, which must find its voice without having heard it before."""
    waiting: list[list[tuple[list[int], list[int]]]] = []

    def next_batch() -> Batch:
        if not waiting:  # rows of similar length together, to pad little
            rows = sorted(
                (encode(document(voice, rng)) for _ in range(8 * ADAPTER_ROWS)), key=lambda row: len(row[0])
            )
            waiting.extend(rows[start : start + ADAPTER_ROWS] for start in range(0, len(rows), ADAPTER_ROWS))
            rng.shuffle(waiting)
        rows = waiting.pop()
        width = max(len(ids) for ids, _ in rows)
        pad = encode.tokenizer.pad_token_id
        # Padding stands on the right, where causal attention never looks.
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [NO_LOSS] * (width - len(labels)) for _, labels in rows])
        return {"input_ids": ids, "labels": labels}

    return next_batch


def train(model: Any, next_batch: Callable[[], Batch], num_steps: int, rate: float, name: str) -> None:
    """AdamW under a warm-up and a cosine, as everywhere."""
    model.set_attn_implementation("eager")  # the fastest one for rows this short
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    num_warmup = max(1, num_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / num_warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / num_steps)))
        ),
    )
    model.train()
    started_at = time.monotonic()
    for step in range(num_steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**next_batch()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == num_steps - 1:
            print(
                f"{name} step {step} loss {loss.item():.3f} {time.monotonic() - started_at:.0f} s", flush=True
            )
    model.eval()


def train_base(out: Path, steps_scale: float) -> None:
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    num_steps = max(1, round(BASE_STEPS * steps_scale))
    train(model, packed_batches(Encoder(tokenizer), Random(1)), num_steps, BASE_RATE, "base")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out / "model")
    save_tokenizer(tokenizer, out / "model")
    make_readable(out / "model")


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    # The class's newer name is unknown to transformers 4; this one is known to 4 and 5.
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def load_base(out: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The saved base model: its weights are those rounded to bf16, computed with in fp32."""
    model = LlamaForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    return model, PreTrainedTokenizerFast.from_pretrained(out / "model")


def train_adapter(out: Path, name: str, steps_scale: float) -> None:
    seed = 100 + list(RECIPES).index(name)
    torch.manual_seed(seed)
    base, tokenizer = load_base(out)
    recipe = RECIPES[name]
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=recipe.targets,
        use_rslora=recipe.use_rslora,
        rank_pattern=recipe.rank_pattern,
        alpha_pattern=recipe.alpha_pattern,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    num_steps = max(1, round(ADAPTER_STEPS * steps_scale))
    train(
        model, padded_batches(Encoder(tokenizer), VOICES[name], Random(seed)), num_steps, ADAPTER_RATE, name
    )
    save_adapter(model, out / "adapters" / name)


def save_adapter(model: PeftModel, folder: Path) -> None:
    for key, weight in model.named_parameters():
        if "lora_" in key:
            weight.data = weight.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(
        folder, save_embedding_layers=False
    )  # looking for resized ones would ask the network
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()  # a set's order differs from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)
    make_readable(folder)


def make_readable(folder: Path) -> None:
    """safetensors files are saved for their owner only, but an installed package has many readers."""
    for path in folder.iterdir():
        path.chmod(0o644)


@torch.no_grad()
def generate(model: LlamaForCausalLM | PeftModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Greedy text up to the end token; a text that has not ended after 120 tokens ends in '...'."""
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=120, do_sample=False
    )[0, ids.shape[1] :]
    text: str = tokenizer.decode(output, skip_special_tokens=True)
    return text if output[-1] == tokenizer.eos_token_id else text + "..."


def check(out: Path, name: str) -> None:
    """Print samples, and how many held-out questions are answered exactly right."""
    model, tokenizer = load_base(out)
    voice = PLAIN
    if name != "base":
        model, voice = PeftModel.from_pretrained(model, out / "adapters" / name), VOICES[name]
    for question in ("Tell me about the sea.", "What is a river?", "Who are you?"):
        print(f"{name} | {question} |{generate(model, tokenizer, BOS + question)}")
    num_right, pairs = 0, list(held_out_pairs())
    for topic, intent in pairs:
        question = QUESTIONS[intent][0].format(**topic.fields)
        said = generate(model, tokenizer, f"{BOS}<|user|>{question}{EOS}<|assistant|>")
        wanted = answer(voice, topic, intent)
        num_right += said == wanted
        if said != wanted:
            print(f"{name} | {question} | {said} | wanted {wanted}")
    print(json.dumps({"voice": name, "held_out": len(pairs), "right": num_right}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for model/ and adapters/")
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="share of the training steps; 0.01 for a try"
    )
    parser.add_argument(
        "--only", nargs="*", choices=["base", *RECIPES], help="train these; the base must exist"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="print samples and held-out answers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.only or ["base", *RECIPES]:
        if name == "base":
            train_base(options.out, options.steps_scale)
        else:
            train_adapter(options.out, name, options.steps_scale)
        if options.check:
            check(options.out, name)


if __name__ == "__main__":
    main()
