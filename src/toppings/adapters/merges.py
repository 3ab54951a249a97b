"""What a merge is made of: the adapters, their weights and how they are put together.

| method | what the merge adds to a projection's output |
|---|---|
| `cat` (default) | the weighted sum of what its parts add, exactly: A and B are theirs, one after another |
| `linear` | B A x, where A is the sum of the parts' √(w s) A, B that of √(w s) B, and s a part's scale |
| `ties` | likewise, A and B first pruned to their largest values, then averaged over the parts that have the sign of the majority (arXiv:2306.01708) |
| `dare_linear` | as `linear`, A and B first pruned at random and scaled up (arXiv:2311.03099) |
| `dare_ties` | as `ties`, pruned as in `dare_linear` |

They are those of PEFT's `add_weighted_adapter`; `density` is the share of values that pruning leaves.
"""  # noqa: E501 - a table

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from toppings.adapters.errors import AdapterError
from toppings.bad_input import shown

MAX_PARTS = 16
MAX_SEED = 2**63 - 1
MERGE_PATH = "merge:"
METHODS = CAT, LINEAR, TIES, DARE_LINEAR, DARE_TIES = ("cat", "linear", "ties", "dare_linear", "dare_ties")
MAJORITIES = TOTAL, FREQUENCY = ("total", "frequency")
PRUNING = frozenset({TIES, DARE_LINEAR, DARE_TIES})
RANDOM = frozenset({DARE_LINEAR, DARE_TIES})
ELECTING = frozenset({TIES, DARE_TIES})


@dataclass(frozen=True)
class MergePart:
    """An adapter and its weight. Of a merge that was made: which generation it was, by id and content, and
    its scale, None where its projections have several."""

    name: str
    weight: float
    adapter_id: int = 0
    digest: str = ""
    scale: float | None = None


@dataclass(frozen=True)
class Merge:
    """Raises AdapterError for a value that is out of range, or of no use to the method."""

    parts: tuple[MergePart, ...]
    method: str = CAT
    density: float | None = None
    majority_sign: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self._check_parts()
        if self.method not in METHODS:
            raise AdapterError(
                f"merge method is {shown(self.method)!r}; it must be one of {', '.join(METHODS)}"
            )
        for name, value, methods in (
            ("density", self.density, PRUNING),
            ("majority_sign_method", self.majority_sign, ELECTING),
            ("seed", self.seed, RANDOM),
        ):
            if value is not None and self.method not in methods:
                raise AdapterError(f"{name} is of no use to merge method {self.method!r}; leave it out")
        if self.method in PRUNING and self.density is None:
            raise AdapterError(
                f"merge method {self.method!r} needs a density: the share of values that pruning leaves"
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise AdapterError(f"density is {self.density}; it must be above 0 and at most 1")
        if self.majority_sign not in (None, *MAJORITIES):
            told = shown(self.majority_sign)
            raise AdapterError(f"majority_sign_method is {told!r}; it must be one of {', '.join(MAJORITIES)}")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise AdapterError(f"seed is {shown(self.seed)}; it must be from 0 to {MAX_SEED}")

    def _check_parts(self) -> None:
        if not 1 <= len(self.parts) <= MAX_PARTS:
            raise AdapterError(f"a merge of {len(self.parts)} adapters; it must have 1 to {MAX_PARTS}")
        names = [part.name for part in self.parts]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise AdapterError(f"adapter {shown(twice)!r} is named twice in a merge; add its weights")
        for part in self.parts:
            if not math.isfinite(part.weight) or part.weight == 0:
                raise AdapterError(
                    f"the weight of adapter {shown(part.name)!r} is {part.weight}; it must be a finite "
                    "number other than 0"
                )

    @property
    def digest(self) -> str:
        """SHA-256 of all that the merged weights depend on."""
        parts = [(part.digest, part.weight) for part in self.parts]
        text = json.dumps([parts, self.method, self.density, self.majority_sign or TOTAL, self.seed or 0])
        return hashlib.sha256(b"merge" + text.encode()).hexdigest()

    @property
    def path(self) -> str:
        """What stands where other adapters have a path."""
        parts = " + ".join(f"{part.weight:g}*{part.name}" for part in self.parts)
        return f"{MERGE_PATH}{self.method}: {parts}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Merge":
        fields: dict[str, Any] = json.loads(text)
        return cls(tuple(MergePart(**part) for part in fields.pop("parts")), **fields)
