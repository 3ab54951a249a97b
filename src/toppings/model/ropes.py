"""Rotary frequencies of a checkpoint's layers, by transformers' own functions."""

from typing import Any, NamedTuple

from toppings.model.families import LAYER_TYPES, Family

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


class RopeTable(NamedTuple):
    """What `ops.rope.Rope` takes: inverse frequencies of the dimensions that are turned, in pairs (the first
    ones of a head), and what multiplies cosine and sine. A frequency of 0 turns nothing."""

    frequencies: tuple[float, ...]
    scaling: float


class Ropes(NamedTuple):
    """`tables`, and of each layer which one; `max_positions` that they are good for.

    `long`: LongRoPE's other tables and how many positions those are good for, else None.
    """

    tables: tuple[RopeTable, ...]
    of_layer: tuple[int, ...]
    max_positions: int
    long: "tuple[tuple[RopeTable, ...], int] | None" = None

    @classmethod
    def from_json(cls, fields: list[Any]) -> "Ropes":
        tables, of_layer, max_positions, long = fields
        other = None if long is None else (_tables(long[0]), int(long[1]))
        return cls(_tables(tables), tuple(of_layer), max_positions, other)


def _tables(fields: list[Any]) -> tuple[RopeTable, ...]:
    return tuple(RopeTable(tuple(frequencies), scaling) for frequencies, scaling in fields)


def layer_types(source: Any) -> list[str]:
    """Raises ValueError where config.json does not name one of `LAYER_TYPES` for each layer."""
    kinds: list[str] = source.layer_types
    if len(kinds) != source.num_hidden_layers or not set(kinds) <= set(LAYER_TYPES):
        raise ValueError(
            f"layer_types is {kinds!r:.200}; it must name {' or '.join(LAYER_TYPES)} for each of "
            f"{source.num_hidden_layers} layers"
        )
    return kinds


def head_dim(source: Any) -> int:
    size: int = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    return size


def find_ropes(source: Any, family: Family) -> Ropes:
    """Of sizes that are checked. Raises ValueError for what is not supported."""
    num_layers, stated = int(source.num_hidden_layers), int(source.max_position_embeddings)
    if family.rotary == "by_type":  # the stated positions are the stretched ones
        kinds = layer_types(source)
        tables = tuple(_table(source, family, layer_type=kind) for kind in LAYER_TYPES)
        return Ropes(tables, tuple(LAYER_TYPES.index(kind) for kind in kinds), stated)
    table, parameters = _table(source, family), source.rope_parameters
    if family.rotary == "no_rope_layers":
        is_turned = source.no_rope_layers
        if not isinstance(is_turned, list) or len(is_turned) < num_layers:
            raise ValueError(
                f"no_rope_layers is {is_turned!r:.200}; it must have an entry for each of {num_layers} layers"
            )
        still = RopeTable((0.0,) * len(table.frequencies), 1.0)
        return Ropes(
            (table, still),
            tuple(0 if is_turned[layer] else 1 for layer in range(num_layers)),
            _max_positions(parameters, stated),
        )
    of_layer = (0,) * num_layers
    if parameters["rope_type"] == "longrope":
        original = int(parameters["original_max_position_embeddings"])
        if stated > original:
            long = (_table(source, family, seq_len=original + 1),)
            return Ropes((table,), of_layer, original, (long, stated))
    return Ropes((table,), of_layer, _max_positions(parameters, stated))


def _table(
    source: Any, family: Family, *, layer_type: str | None = None, seq_len: int | None = None
) -> RopeTable:
    parameters = source.rope_parameters if layer_type is None else source.rope_parameters[layer_type]
    kind = parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}; supported: {', '.join(ROPE_TYPES)}")
    part = parameters.get("partial_rotary_factor", 1.0)
    if part != 1.0 and family.rotary != "partial":
        raise ValueError(f"partial_rotary_factor is {part}; only 1.0 is supported")
    num_turned = int(head_dim(source) * part)
    if not 0 < num_turned <= head_dim(source) or num_turned % 2:
        raise ValueError(
            f"partial_rotary_factor is {part}, with which {num_turned} dimensions of a head of "
            f"{head_dim(source)} are turned; it must be an even number of them"
        )
    import torch

    if kind == "default":
        exponents = torch.arange(0, num_turned, 2, dtype=torch.float32) / num_turned
        return RopeTable(tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()), 1.0)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    options = {} if layer_type is None else {"layer_type": layer_type}
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](source, torch.device("cpu"), seq_len, **options)
    return RopeTable(tuple(frequencies.tolist()), float(scaling))


def _max_positions(parameters: dict[str, Any], stated: int) -> int:
    """How many positions the rotary frequencies reach.

    "linear" and "yarn" stretch the positions that config.json states (YaRN: the original ones) by their
    factor. "llama3" states the stretched number. "dynamic" changes its frequencies with a sequence's length
    beyond the stated number, which keys already in a cache cannot follow: it is served up to there, where it
    is plain RoPE. "longrope" changes them once: it is served up to there, or with the others from the start.
    """
    if parameters["rope_type"] == "linear":
        return int(stated * parameters["factor"])
    if parameters["rope_type"] == "yarn":
        original = parameters.get("original_max_position_embeddings") or stated
        return max(stated, int(original * parameters["factor"]))
    return stated
