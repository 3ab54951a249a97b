"""Train the adapters of SmolLM2-135M-Instruct that ship with Toppings, on the CPU, each for a job of tasks/.

    python examples/train_adapters.py --out DIRECTORY
    python examples/train_adapters.py --out DIRECTORY --only dates sql

Its packages come with `make setup`.

Data and weights come from fixed seeds; the base model is the one that is served, rounded to bf16, in fp32
arithmetic. An adapter that DIRECTORY has already is not trained again.

Layers below an adapter's first one never change, so what they give is computed once per item. The rows of a
batch lie behind one copy of the prompt that they share, without padding, and the head is computed for answers
only.
"""

import argparse
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any
from zlib import crc32

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tasks import TASKS
from tasks.task import Task
from transformers import AutoModelForCausalLM, AutoTokenizer

from toppings.sources.models import find_model

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
BATCH_ROWS = 8
LOADING = Lock()  # neither the seed nor what loads a model is any thread's own

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Recipe:
    """What distinguishes one adapter's LoRA and training from another's."""

    rank: int
    alpha: int
    targets: list[str]
    first_layer: int
    num_steps: int = 30
    num_items: int = 128
    rate: float = 3e-3
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)


RECIPES = {
    "contacts": Recipe(8, 16, ["q_proj", "v_proj", "o_proj"], 22, num_steps=40, num_items=200, rate=2e-3),
    "intents": Recipe(4, 8, ["q_proj", "v_proj"], 22, rate=4e-3),
    "dates": Recipe(16, 32, ATTENTION, 22, num_steps=25),
    "quantities": Recipe(
        16,
        32,
        ATTENTION + MLP,
        24,
        num_steps=35,
        rank_pattern={"q_proj": 4, "k_proj": 4, "down_proj": 24},
        alpha_pattern={"q_proj": 8, "k_proj": 8},
    ),
    "sql": Recipe(32, 8, ATTENTION, 22, num_steps=35, use_rslora=True),
    "sentiment": Recipe(8, 16, ["q_proj", "v_proj", "o_proj"], 20, num_steps=40, rate=4e-3),
    "authors": Recipe(64, 64, ATTENTION, 22, num_steps=25, num_items=160),
    "tickets": Recipe(8, 16, ["q_proj", "v_proj", "o_proj"], 20, num_items=160, rate=4e-3),
}


@dataclass(frozen=True)
class Row:
    """A chat behind the tokens that all chats of a task begin with: what enters the first trained layer
    [tokens, hidden], and its answer's tokens, the end included, which its last positions are asked for."""

    hidden: torch.Tensor
    answer: torch.Tensor


def packed(prefix_len: int, lens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows one after another behind their common prefix: positions [1, tokens] and who attends to whom
    [1, 1, tokens, tokens]; each row sees the prefix and itself, up to the token that looks."""
    owner = torch.tensor([0] * prefix_len + [row for row, n in enumerate(lens, start=1) for _ in range(n)])
    positions = torch.tensor([*range(prefix_len), *(prefix_len + at for n in lens for at in range(n))])
    is_seen = (owner[:, None] == owner[None]) | (owner[None] == 0)
    return positions[None], is_seen.tril()[None, None]


def lora_config(recipe: Recipe, num_layers: int) -> LoraConfig:
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=recipe.targets,
        layers_to_transform=list(range(recipe.first_layer, num_layers)),
        use_rslora=recipe.use_rslora,
        rank_pattern=recipe.rank_pattern,
        alpha_pattern=recipe.alpha_pattern,
        task_type="CAUSAL_LM",
    )


class Trainee:
    """The base model with a fresh LoRA, and a task's data for it."""

    def __init__(self, folder: Path, recipe: Recipe, task: Task, seed: int) -> None:
        with LOADING:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            torch.manual_seed(seed)
            self.peft = get_peft_model(base, lora_config(recipe, base.config.num_hidden_layers))
        self.causal = self.peft.get_base_model()
        self.weights = [weight for weight in self.peft.parameters() if weight.requires_grad]
        self.lower = self.causal.model.layers[: recipe.first_layer]
        self.upper = self.causal.model.layers[recipe.first_layer :]
        self.prefix, self.rows = self.prepared(task, recipe.num_items)

    def through(self, layers: Any, prefix: torch.Tensor, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """Prefix and rows, each [tokens, hidden], through decoder layers."""
        lens = [len(row) for row in rows]
        positions, mask = packed(len(prefix), lens)
        hidden = torch.cat([prefix, *rows])[None]
        rotary = self.causal.model.rotary_emb(hidden, positions)
        for layer in layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return list(torch.split(hidden[0], [len(prefix), *lens]))

    @torch.no_grad()
    def prepared(self, task: Task, num_items: int) -> tuple[torch.Tensor, list[Row]]:
        """What enters the first trained layer: of the common prefix, and of each item of training data."""
        texts, answers = [], []
        for item in task.trained(num_items):
            prompt = self.tokenizer.apply_chat_template(
                task.messages(item), add_generation_prompt=True, return_dict=False
            )
            answer = self.tokenizer.encode(item.answer, add_special_tokens=False)
            texts.append([*prompt, *answer])
            answers.append(torch.tensor([*answer, self.tokenizer.eos_token_id]))
        num_common = next(at for at, ids in enumerate(zip(*texts)) if len({*ids}) > 1)
        embed = self.causal.model.embed_tokens
        prefix = embed(torch.tensor(texts[0][:num_common]))
        rows: list[torch.Tensor] = []
        for start in range(0, len(texts), 2 * BATCH_ROWS):
            chats = [embed(torch.tensor(text[num_common:])) for text in texts[start : start + 2 * BATCH_ROWS]]
            lower_prefix, *lower = self.through(self.lower, prefix, chats)
            rows += [row.clone() for row in lower]
        return lower_prefix.clone(), [Row(hidden, answer) for hidden, answer in zip(rows, answers)]

    def loss(self, rows: list[Row]) -> torch.Tensor:
        """Mean cross-entropy of the answers' tokens."""
        _, *out = self.through(self.upper, self.prefix, [row.hidden for row in rows])
        asked = torch.cat([hidden[-len(row.answer) :] for hidden, row in zip(out, rows)])
        logits = self.causal.lm_head(self.causal.model.norm(asked))
        return torch.nn.functional.cross_entropy(logits, torch.cat([row.answer for row in rows]))


def batches(rows: list[Row], num_steps: int, rng: Random) -> list[list[Row]]:
    """Each row once before any comes again."""
    order: list[Row] = []
    while len(order) < num_steps * BATCH_ROWS:
        order += rng.sample(rows, len(rows))
    return [order[step * BATCH_ROWS : (step + 1) * BATCH_ROWS] for step in range(num_steps)]


def train(name: str, folder: Path, steps_scale: float) -> PeftModel:
    """AdamW under a short warm-up and a cosine."""
    recipe = RECIPES[name]
    seed = crc32(name.encode())
    torch.set_num_threads(1)  # of this thread
    num_steps = max(1, round(recipe.num_steps * steps_scale))
    started_at = time.monotonic()
    trainee = Trainee(folder, recipe, TASKS[name], seed)
    print(f"{name}: lower layers after {time.monotonic() - started_at:.0f} s", flush=True)
    optimizer = torch.optim.AdamW(trainee.weights, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0)
    num_warmup = max(1, num_steps // 12)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / num_warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / num_steps)))
        ),
    )
    for step, batch in enumerate(batches(trainee.rows, num_steps, Random(seed))):
        loss = trainee.loss(batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trainee.weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0 or step == num_steps - 1:
            print(
                f"{name} step {step} loss {loss.item():.3f} {time.monotonic() - started_at:.0f} s", flush=True
            )
    return trainee.peft


def save(model: PeftModel, folder: Path) -> None:
    """A PEFT checkpoint in bf16, which appears as a whole."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    unfinished = folder.with_name(f".{folder.name}")
    model.save_pretrained(unfinished, save_embedding_layers=False)
    path = unfinished / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()  # a set's order differs from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (unfinished / "README.md").unlink(missing_ok=True)
    for file in unfinished.iterdir():
        file.chmod(0o644)
    unfinished.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="the base model, as `toppings serve` takes it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapters")
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=list(RECIPES), help="train these")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="share of the steps; 0.01 for a try")
    parser.add_argument("--jobs", type=int, default=2, help="adapters at a time, each on one thread")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = find_model(options.model).path

    def make(name: str) -> None:
        save(train(name, model, options.steps_scale), options.out / name)

    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(make, [name for name in options.only if not (options.out / name).exists()]):
            pass  # raises what a job raised


if __name__ == "__main__":
    main()
