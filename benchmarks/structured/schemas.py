"""Random JSON Schemas that something satisfies, with bounded outputs, out of keywords that are supported."""

import random
from typing import Any

PATTERNS = (
    "^[A-Z]{2}-[0-9]{3}$",
    "^(yes|no|maybe)$",
    "^[a-f0-9]{4,8}$",
    "^#[0-9a-f]{6}$",
    "^v[0-9]\\.[0-9]$",
)
FORMATS = ("date", "uuid", "ipv4")
NAMES = ("name", "age", "tags", "kind", "items", "value", "note", "city", "a/b", "é", "with space", 'q"uote')
WORDS = ("red", "green", "blue", "north", "south", "on", "off", "ünï", "a b")
MAX_DEPTH = 3
Schema = dict[str, Any]


def random_schema(seed: int) -> Schema:
    """An object or an array, as clients ask for them."""
    rng = random.Random(seed)
    schema = rng.choice((_object, _object, _array))(rng, 0)
    if rng.random() < 0.3:
        schema["$defs"] = {"part": _value(rng, MAX_DEPTH)}
        holder = schema.get("properties")
        if isinstance(holder, dict):
            holder["part"] = {"$ref": "#/$defs/part"}
    return schema


def _value(rng: random.Random, depth: int) -> Schema:
    simple = (_string, _string, _integer, _number, _enum, _const, _plain)
    nested = (_object, _map, _array, _tuple, _any_of, _one_of, _all_of)
    return rng.choice(simple if depth >= MAX_DEPTH else simple + nested)(rng, depth)


def _string(rng: random.Random, depth: int) -> Schema:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": rng.choice(FORMATS)}
    low = rng.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(1, 12)}


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.choice((-1000, -7, 0, 3))
    schema: Schema = {
        "type": "integer",
        "minimum": low,
        rng.choice(("maximum", "exclusiveMaximum")): low + 60,
    }
    if rng.random() < 0.3:
        schema["multipleOf"] = rng.choice((2, 5, 7))
    return schema


def _number(rng: random.Random, depth: int) -> Schema:
    return {"type": "number", "multipleOf": rng.choice((0.5, 0.25)), "minimum": -8, "maximum": 99}


def _enum(rng: random.Random, depth: int) -> Schema:
    return {"enum": rng.sample([*WORDS, 1, 2.5, None, True, ["x"], {"k": "v"}], rng.randrange(1, 6))}


def _const(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice((*WORDS, 17, None, False, ["a", 1]))}


def _plain(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(("boolean", "null", ["boolean", "null"]))}


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    return {
        "type": "array",
        "items": _value(rng, depth + 1),
        "minItems": low,
        "maxItems": low + rng.randrange(1, 4),
    }


def _tuple(rng: random.Random, depth: int) -> Schema:
    parts = [_value(rng, depth + 1) for _ in range(rng.randrange(1, 4))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": rng.randrange(len(parts) + 1)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(NAMES, rng.randrange(1, 5))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth + 1) for name in names},
        "required": rng.sample(names, rng.randrange(len(names) + 1)),
        "additionalProperties": False,
    }


def _map(rng: random.Random, depth: int) -> Schema:
    return {
        "type": "object",
        "patternProperties": {"^x-[a-z]{1,3}$": _value(rng, depth + 1)},
        "additionalProperties": False,
        "minProperties": rng.randrange(2),
        "maxProperties": rng.randrange(2, 4),
    }


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_value(rng, depth + 1) for _ in range(rng.randrange(2, 4))]}


def _one_of(rng: random.Random, depth: int) -> Schema:
    """Of types that exclude one another."""
    parts = [_string(rng, depth), _integer(rng, depth), {"type": "null"}, _object(rng, MAX_DEPTH)]
    return {"oneOf": rng.sample(parts, 2)}


def _all_of(rng: random.Random, depth: int) -> Schema:
    first = {"type": "object", "properties": {"id": _integer(rng, depth)}, "required": ["id"]}
    second = {"type": "object", "properties": {"word": _string(rng, depth)}, "required": ["word"]}
    return {"allOf": [first, second], "maxProperties": 2}
