"""What a task is: texts with the one right answer, made from a seed, and a score for what a model says.

Lists of words and of sentences are shared out once: each fourth entry is held out, the others are for
training. So a held-out item has words, or a sentence around them, that no training item has.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

Split = Literal["train", "held_out"]
T = TypeVar("T")

TRAIN_SEED, HELD_OUT_SEED = 1, 2
NUM_TRAINED = 200  # items that an adapter is trained on, at most
HELD_OUT_SHARE = 4  # of every so many entries, one is held out
MAX_REPEATS = 50  # draws in a row that gave nothing new; then the task has too few different items


class Draw:
    """Random choices within one split."""

    def __init__(self, seed: int, split: Split) -> None:
        self.rng = Random(f"{seed} {split}")
        self.split = split

    def has(self, index: int) -> bool:
        """Whether the entry of this number belongs to the split."""
        return (index % HELD_OUT_SHARE == HELD_OUT_SHARE - 1) == (self.split == "held_out")

    def one(self, entries: Sequence[T]) -> T:
        """One of the split's own entries."""
        return self.rng.choice([entry for index, entry in enumerate(entries) if self.has(index)])

    def any(self, entries: Sequence[T]) -> T:
        """One of all entries: for what both splits share, such as labels and units."""
        return self.rng.choice(entries)

    def number(self, low: int, high: int) -> int:
        """A number of [low, high] that belongs to the split."""
        while not self.has(number := self.rng.randint(low, high)):
            pass
        return number


@dataclass(frozen=True)
class Item:
    """What the user says, and the answer that is right."""

    text: str
    answer: str


@dataclass(frozen=True)
class Task:
    """`score(item, answer)`: 1 where it is right, else 0; `max_tokens` is enough for any right one."""

    name: str
    job: str
    system: str
    draw: Callable[[Draw], Item]
    score: Callable[[Item, str], float]
    max_tokens: int

    def make(self, seed: int, split: Split, num_items: int) -> list[Item]:
        """Different items of one split, the same for one seed; ValueError where there are not so many."""
        draw, items, num_repeats = Draw(seed, split), dict[str, Item](), 0
        while len(items) < num_items:
            item = self.draw(draw)
            num_repeats = num_repeats + 1 if item.text in items else 0
            if num_repeats > MAX_REPEATS:
                raise ValueError(
                    f"{self.name} has about {len(items)} items for {split}, fewer than {num_items}"
                )
            items[item.text] = item
        return list(items.values())

    def trained(self, num_items: int = NUM_TRAINED) -> list[Item]:
        """What adapters are trained on."""
        return self.make(TRAIN_SEED, "train", num_items)

    def held_out(self, num_items: int) -> list[Item]:
        """What adapters are scored on. Raises ValueError where training has the same text."""
        items = self.make(HELD_OUT_SEED, "held_out", num_items)
        trained = {item.text for item in self.trained()}
        if seen := [item.text for item in items if item.text in trained]:
            raise ValueError(f"{self.name}: training has {len(seen)} held-out texts, such as {seen[0]!r}")
        return items

    def messages(self, item: Item) -> list[dict[str, str]]:
        """The chat that asks for the item's answer, of base and adapter alike."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": item.text}]


def tidied(answer: str) -> str:
    """An answer without what no reader minds: outer space, quotes, code marks and a last full stop."""
    return answer.strip().strip("`\"'").removesuffix(".").strip()


def exact(item: Item, answer: str) -> float:
    """The answer and nothing else."""
    return float(tidied(answer) == tidied(item.answer))


def label(labels: Iterable[str]) -> Callable[[Item, str], float]:
    """Scores an answer by the label that it names: right in a sentence too, if no other is named."""
    any_label = re.compile(rf"\b({'|'.join(labels)})\b")
    return lambda item, answer: float({*any_label.findall(answer.lower())} == {item.answer})
