"""What a step costs: linear models of a batch's features, for decode and for prefill, with their JSON.

Decode ms = alpha * |S| * max rank + beta (form `bgmv`) or alpha * sum of ranks + beta (form `mbgmv`), as
published (Li et al., "Toppings", USENIX ATC 2025, Fig. 11); form `extended` adds the other features.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from toppings.cluster.batch_row import BatchRow

FloatArray = NDArray[np.float64]

FEATURES = (
    *("steps", "tokens", "padded_ranks", "rank_sum", "distinct_rank_sum", "context_tokens"),
    *("sequences", "gathered_tokens"),
)
"""Of a batch whose item i has t_i tokens of rank r_i: 1 | sum t | sum t * max r | sum t*r | sum of r over
distinct adapters | sum over tokens of the keys each attends to | number of items | sum over items of t_i > 1
of the tokens cached before. For decode t_i = 1, so `tokens` is |S|.

Decoding reads keys where they are in the cache; a chunk that continues a prompt gathers them first."""

STEPS, TOKENS, PADDED_RANKS, RANK_SUM, DISTINCT_RANK_SUM, CONTEXT_TOKENS, SEQUENCES, GATHERED_TOKENS = range(
    len(FEATURES)
)

DECODE_FORMS: dict[str, tuple[str, ...]] = {
    "bgmv": ("steps", "padded_ranks"),
    "mbgmv": ("steps", "rank_sum"),
    "extended": FEATURES[:SEQUENCES],  # a decode's `sequences` are its `tokens`, and nothing is gathered
}
PREFILL_FORMS: dict[str, tuple[str, ...]] = {
    "tokens": ("steps", "tokens"),
    "bgmv": ("steps", "tokens", "padded_ranks"),
    "mbgmv": ("steps", "tokens", "rank_sum"),
    "extended": FEATURES,
}


def batch_features(rows: Iterable[BatchRow]) -> FloatArray:
    """The features [F] of a batch, float64, in the order of `FEATURES`; all zero for an empty one."""
    rows = list(rows)
    if not rows:
        return np.zeros(len(FEATURES))
    tokens = sum(row.num_tokens for row in rows)
    distinct = {(row.adapter, row.rank) for row in rows}
    return np.array(
        [
            1.0,
            tokens,
            tokens * max(row.rank for row in rows),
            sum(row.num_tokens * row.rank for row in rows),
            sum(rank for _, rank in distinct),
            sum(row.num_attended for row in rows),
            len(rows),
            sum(row.num_context for row in rows if row.num_tokens > 1),
        ]
    )


@dataclass(frozen=True)
class FitReport:
    """How a model did on batches that were held out of its fit."""

    r2: float
    mean_relative_error: float
    num_fitted: int
    num_held_out: int


@dataclass(frozen=True)
class LinearModel:
    """ms of one step as a sum of features times coefficients; `fit` is None where no steps were measured."""

    coefficients: dict[str, float]
    fit: FitReport | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.coefficients) - set(FEATURES))
        if unknown:
            raise ValueError(f"unknown feature {unknown[0]!r}; known: {', '.join(FEATURES)}")

    @cached_property
    def vector(self) -> FloatArray:
        """Coefficients [F] in the order of `FEATURES`."""
        return np.array([self.coefficients.get(name, 0.0) for name in FEATURES])

    def predict(self, features: FloatArray) -> FloatArray:
        """ms [...] of batches with `features` [..., F]."""
        return features @ self.vector

    def predict_batch(self, rows: Iterable[BatchRow]) -> float:
        return float(self.predict(batch_features(rows)))


@dataclass(frozen=True)
class PerfModel:
    """Step costs of one kind of machine and model: every fitted form, and which of them is used.

    `origin` says where the numbers come from and what limits them. `link_gbps` and `disk_gbps` (GB/s) are
    what an adapter's load runs at; None where unknown, and loads are then predicted to be free.
    `prefill_interrupts`: a prefill is a step of its own, for which decoding stands still, as in the published
    system; otherwise, as here, one step does both.
    """

    origin: str
    decode_forms: dict[str, LinearModel]
    prefill_forms: dict[str, LinearModel]
    decode_form: str
    prefill_form: str
    link_gbps: float | None = None
    disk_gbps: float | None = None
    prefill_interrupts: bool = False
    details: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, forms in (("decode", self.decode_forms), ("prefill", self.prefill_forms)):
            form = getattr(self, f"{name}_form")
            if form not in forms:
                raise ValueError(f"{name} form {form!r} is not in the model; it has {', '.join(forms)}")

    @property
    def decode(self) -> LinearModel:
        return self.decode_forms[self.decode_form]

    @property
    def prefill(self) -> LinearModel:
        return self.prefill_forms[self.prefill_form]

    def using(self, decode_form: str) -> "PerfModel":
        """This model with another decode form, and the prefill form of that name where there is one.

        Raises ValueError where the model has no such form.
        """
        has_prefill = decode_form in self.prefill_forms
        prefill_form = decode_form if has_prefill else self.prefill_form
        return replace(self, decode_form=decode_form, prefill_form=prefill_form)

    @property
    def shared_ms(self) -> float:
        """What decodes and prefills save by sharing a step: its fixed cost is paid once, the larger of the
        two.
        """
        if self.prefill_interrupts:
            return 0.0
        return float(min(self.decode.vector[STEPS], self.prefill.vector[STEPS]))

    def step_ms(self, *, decode: FloatArray, prefill: FloatArray) -> float:
        """ms that a decode batch and prefill chunks take together, from their features [F]."""
        parts = float(self.decode.predict(decode)) + float(self.prefill.predict(prefill))
        if not (decode[STEPS] and prefill[STEPS]):
            return parts
        return parts - self.shared_ms

    def load_ms(self, num_bytes: float, *, is_on_host: bool) -> float:
        """ms until an adapter of `num_bytes` that is not on the device is there, from host memory or disk."""
        link_ms = num_bytes / (self.link_gbps * 1e6) if self.link_gbps else 0.0
        if is_on_host or not self.disk_gbps:
            return link_ms
        return link_ms + num_bytes / (self.disk_gbps * 1e6)

    def to_json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "PerfModel":
        """Raises ValueError naming the field that is missing or of the wrong type."""
        return msgspec.json.decode(text, type=cls)


def load_perf_model(spec: str) -> PerfModel:
    """The model of a JSON file, or one that ships with the package: `published`, `published:mbgmv`.

    `name:form` takes another decode form than the file's own. Raises ValueError where it cannot be read.
    """
    name, _, form = spec.partition(":")
    shipped = resources.files("toppings.cluster") / "data" / f"{name}.json"
    if not shipped.is_file():
        name, form = (spec, "") if Path(spec).is_file() else (name, form)
    source = shipped if shipped.is_file() else Path(name)
    try:
        if not source.is_file():
            raise FileNotFoundError("there is no such file")  # what is no file may be read for ever
        model = PerfModel.from_json(source.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read performance model {spec!r}: {error}") from error
    return model.using(form) if form else model
