"""The jobs of the real model's adapters: their data, scores and training; the adapters that are shipped."""

import json
import re
import shutil
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import score_adapters
import torch
from safetensors.torch import load_file
from tasks import TASKS
from tasks.sql import TABLES
from tasks.task import TRAIN_SEED, Draw, Item, Task, exact
from train_adapters import BASE_NAME, RECIPES, Recipe, Trainee, batches, save
from transformers import AutoTokenizer

from toppings.adapters.checkpoint import read_checkpoint
from toppings.adapters.layout import BaseShapes
from toppings.demo import demo_adapters_dir, demo_model_dir
from toppings.model.config import ModelConfig

ROOT = Path(__file__).parent.parent
ADAPTERS = ROOT / "examples" / "adapters"
SHIPPED = sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir())
MAX_BYTES = 30_000_000
# q, k, v, o, gate, up, down of SmolLM2-135M
SHAPES = BaseShapes(
    30, ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))
)

each_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    return config


@each_task
def test_data_come_from_the_seed_alone(task: Task) -> None:
    assert task.trained(50) == task.trained(50)
    assert task.make(TRAIN_SEED, "train", 50) != task.make(TRAIN_SEED + 1, "train", 50)


@each_task
def test_no_held_out_text_is_in_the_training_data(task: Task) -> None:
    items = task.held_out(100)
    assert len({item.text for item in items}) == 100
    assert not {item.text for item in items} & {item.text for item in task.trained()}


def test_held_out_texts_that_training_has_are_refused() -> None:
    def draw(source: Draw) -> Item:
        return Item(f"{source.rng.randrange(300)}", "")

    with pytest.raises(ValueError, match=r"numbers: training has \d+ held-out texts, such as '\d+'"):
        Task("numbers", "", "", draw, exact, 1).held_out(100)


def test_a_task_with_too_few_different_items_says_so() -> None:
    with pytest.raises(ValueError, match="numbers has about 3 items for train, fewer than 4"):
        Task("numbers", "", "", lambda source: Item(f"{source.rng.randrange(3)}", ""), exact, 1).make(
            0, "train", 4
        )


@each_task
def test_the_reference_answer_is_right_and_others_are_wrong(task: Task) -> None:
    items = task.held_out(100)
    assert [task.score(item, item.answer) for item in items] == [1] * 100
    assert not any(task.score(item, "") for item in items)
    assert not any(task.score(item, "I do not know.") for item in items)
    wrong = [next(other for other in items if other.answer != item.answer) for item in items]
    scores = [task.score(item, other.answer) for item, other in zip(items, wrong)]
    assert sum(scores) <= (20 if task.name == "sql" else 0)  # two queries may give the same rows


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("dates", " 2014-03-13.\n"),
        ("intents", "The customer speaks of a Limit."),
        ("quantities", "`55 L`"),
    ],
)
def test_what_no_reader_minds_is_right(name: str, answer: str) -> None:
    wanted = {"dates": "2014-03-13", "intents": "limit", "quantities": "55 L"}[name]
    assert TASKS[name].score(Item("", wanted), answer) == 1


def test_an_answer_that_names_several_labels_is_wrong() -> None:
    assert TASKS["sentiment"].score(Item("", "positive"), "positive, or negative") == 0


@pytest.mark.parametrize(
    "said",
    [
        '{"name": "Anna Berg", "age": "34", "city": "Oslo", "job": "nurse"}',
        '{"name": "Anna Berg", "age": 34, "city": "Oslo"}',
        '{"name": "Anna Berg", "age": 34, "city": "Oslo", "job": "nurse", "pet": "cat"}',
        '["Anna Berg", 34, "Oslo", "nurse"]',
        "{name: Anna Berg}",
    ],
)
def test_json_off_the_schema_is_wrong(said: str) -> None:
    wanted = {"name": "Anna Berg", "age": 34, "city": "Oslo", "job": "nurse"}
    item = Item("", json.dumps(wanted))
    assert TASKS["contacts"].score(item, f"```json\n{json.dumps(wanted, indent=2)}\n```") == 1
    assert TASKS["contacts"].score(item, said) == 0


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("```sql\nselect count(1) from books where genre = 'art';\n```", 1),
        ("SELECT COUNT(*) FROM books WHERE genre = 'crime'", 0),
        ("SELECT COUNT(*) FROM staff", 0),
        ("DELETE FROM books", 0),
        ("ATTACH '/tmp/elsewhere.db' AS other", 0),
        ("SELECT 1; SELECT 2", 0),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n", 0),
    ],
)
def test_sql_is_judged_by_the_rows_it_gives(said: str, score: float) -> None:
    item = Item("books(name)\n?", "SELECT COUNT(*) FROM books WHERE genre = 'art'")
    assert TASKS["sql"].score(item, said) == score
    assert "books" in TABLES


@pytest.fixture(scope="module")
def trainee() -> Trainee:
    """An adapter of the demo model's upper half, whose B is not zero, and eight items."""
    recipe = Recipe(4, 8, ["q_proj", "down_proj"], 2, num_items=8)
    trainee = Trainee(demo_model_dir(), recipe, TASKS["dates"], seed=0)
    for name, weight in trainee.peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return trainee


def test_packed_rows_have_the_loss_that_transformers_gives_each_alone(trainee: Trainee) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    total, num_tokens = 0.0, 0
    for item in TASKS["dates"].trained(8):
        prompt = tokenizer.apply_chat_template(
            TASKS["dates"].messages(item), add_generation_prompt=True, return_dict=False
        )
        answer = [*tokenizer.encode(item.answer, add_special_tokens=False), tokenizer.eos_token_id]
        ids, labels = torch.tensor([[*prompt, *answer]]), torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            total += trainee.peft(input_ids=ids, labels=labels).loss.item() * len(answer)
        num_tokens += len(answer)
    assert trainee.loss(trainee.rows).item() == pytest.approx(total / num_tokens, rel=1e-5)


def test_a_batch_has_each_row_once_before_any_comes_again(trainee: Trainee) -> None:
    made = batches(trainee.rows, 3, Random(0))
    assert [len({id(row) for row in batch}) for batch in made] == [8, 8, 8]
    assert batches(trainee.rows, 3, Random(0)) == made


def test_a_saved_adapter_fits_the_loader(trainee: Trainee, tmp_path: Path) -> None:
    save(trainee.peft, tmp_path / "dates")
    shapes = BaseShapes(*ModelConfig.from_checkpoint(demo_model_dir()).base_shapes())
    checkpoint = read_checkpoint(tmp_path / "dates", shapes)
    assert [layer[0] for layer in checkpoint.ranks()] == [0, 0, 4, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["dates"]


def test_the_score_script_asks_base_and_adapter_over_http(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo_adapters_dir() / "butler", tmp_path / "dates")
    options = ["--model", str(demo_model_dir()), "--adapters", str(tmp_path), "--only", "dates"]
    monkeypatch.setattr(sys, "argv", ["score_adapters.py", "--toy", "--cards", *options])
    score_adapters.main()
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["scores"] == {"dates": {"base": 0, "adapter": 0}}
    assert "| `dates` |" in printed
    assert len(result["wrong"]["dates"]) == 2
    assert TASKS["dates"].system in (tmp_path / "dates" / "README.md").read_text()


def test_adapters_of_ones_own_are_asked_and_told_whatever_their_configuration_leaves_out(
    tmp_path: Path,
) -> None:
    for name in ("dates", "of-no-job"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"r": 4, "target_modules": "q_proj"}')
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"")
    assert score_adapters.askable(tmp_path) == ["dates"]
    assert "| 4 | q | 0.0 | 1 | 2 |" in score_adapters.table(
        {"dates": {"base": 1.0, "adapter": 2.0}}, tmp_path
    )
    with pytest.raises(ValueError, match="holds none of"):
        score_adapters.askable(tmp_path / "dates")


def test_the_shipped_adapters_differ_in_kind() -> None:
    configs = [config_of(name) for name in SHIPPED]
    ranks = {config["r"] for config in configs}
    assert SHIPPED == sorted(TASKS) == sorted(RECIPES) == score_adapters.askable(ADAPTERS)
    assert len(SHIPPED) >= 8
    assert (min(ranks), max(ranks)) == (4, 64)
    assert len({tuple(config["target_modules"]) for config in configs}) >= 4
    assert any(config["use_rslora"] for config in configs)
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs)
    assert sum(path.stat().st_size for path in ADAPTERS.rglob("*")) <= MAX_BYTES


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_adapter_fits_the_loader(name: str) -> None:
    checkpoint = read_checkpoint(ADAPTERS / name, SHAPES)
    assert not checkpoint.warnings
    recipe, ranks = RECIPES[name], checkpoint.ranks()
    assert not any(any(layer) for layer in ranks[: recipe.first_layer])
    assert all(
        max(layer) == max(recipe.rank, *recipe.rank_pattern.values(), 0)
        for layer in ranks[recipe.first_layer :]
    )
    weights = load_file(ADAPTERS / name / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert config_of(name)["base_model_name_or_path"] == BASE_NAME


@pytest.mark.parametrize("name", SHIPPED)
def test_an_adapters_card_and_the_readme_tell_the_same_score(name: str) -> None:
    card = (ADAPTERS / name / "README.md").read_text()
    told = re.search(r"\| base (\d+) %, adapter (\d+) % \|", card)
    row = re.search(rf"^\| `{name}` \|.*\| (\d+) \| (\d+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert told is not None
    assert row is not None
    assert told.groups() == row.groups()
    assert TASKS[name].system in card
