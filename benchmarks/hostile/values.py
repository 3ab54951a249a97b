"""Odd JSON values, as the text that stands in a body: JSON can say more than Python's writer would."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MEGABYTE = 2**20
DEPTH = 20_000
MANY = 50_000


@dataclass(frozen=True)
class Odd:
    """`write` makes the JSON text when it is wanted: some are megabytes."""

    name: str
    write: Callable[[], str]


def _plain(texts: Sequence[str]) -> list[Odd]:
    return [Odd(text, lambda text=text: text) for text in texts]  # type: ignore[misc]


def _strings(texts: Sequence[str]) -> list[Odd]:
    return [Odd(f"string {text[:24]!r}", lambda text=text: json.dumps(text)) for text in texts]  # type: ignore[misc]


NUMBERS = [
    *_plain(["0", "-0", "1", "-1", "2", "0.5", "-0.0", "1.0", "1e0", "5e-324", "1e308", "-1e308", "1e309"]),
    *_plain(["255", "256", "257", "4096", "65536", "2147483647", "2147483648", "-2147483649"]),
    *_plain(["9223372036854775807", "9223372036854775808", "-9223372036854775808", "-9223372036854775809"]),
    *_plain(["18446744073709551615", "18446744073709551616", "1e19", "NaN", "Infinity", "-Infinity"]),
    Odd("integer of 400 digits", lambda: "9" * 400),
    Odd("integer of 5,000 digits", lambda: "9" * 5000),
    Odd("integer of a megabyte", lambda: "9" * MEGABYTE),
    Odd("fraction of 5,000 digits", lambda: "0." + "3" * 5000),
]
SURROGATES = [
    Odd("half an emoji", lambda: r'"a\ud83d"'),
    Odd("the other half", lambda: r'"\udc00b"'),
    Odd("halves in the wrong order", lambda: r'"\udc00\ud83d"'),
    Odd("list of half an emoji", lambda: r'["a", "\ud83d"]'),
    Odd("object of half an emoji", lambda: r'{"\ud83d": "\ud83d"}'),
]
STRINGS = [
    *_strings(
        ["", " ", "a", "\0", "a\0b", "\r\n", "\r\nX-Odd: 1", "null", "5", "true", "{}", "%00", "%2e%2e%2f"]
    ),
    *_strings(["../../etc/passwd", "/", "~", "/dev/zero", "/proc/self/mem", "file:///etc/passwd", "a" * 300]),
    *_strings(
        ["\U0001f600" * 20, "\u202egnirts", "e" + "\u0301" * 2000, "\ufeffa", "\ufffe", "\x7f\x1b[31m"]
    ),
    *_strings(
        ["{{7*7}}", "{% for i in range(10**9) %}{% endfor %}", "(a+)+$", "<|im_start|>system", "<s></s>"]
    ),
    *_strings(["'; DROP TABLE adapters; --", "${jndi:ldap://x}", "a/pin", "toppings-demo/", "TOPPINGS-DEMO"]),
    Odd("string of 100 kB", lambda: json.dumps("word " * 20_000)),
    Odd("string of a megabyte", lambda: json.dumps("a" * MEGABYTE)),
    Odd("string of a megabyte of emoji", lambda: json.dumps("\U0001f600" * (MEGABYTE // 12))),
    Odd("string of a megabyte of spaces", lambda: json.dumps(" " * MEGABYTE)),
    Odd("string of 4 MB of many words", lambda: json.dumps("".join(f"w{i} " for i in range(500_000)))),
]
LISTS = [
    *_plain(["[]", "[null]", "[[]]", "[[[]]]", "[{}]", '[""]', "[0]", "[-1]", "[1, 2]", "[1.5]", "[true]"]),
    *_plain(
        ['["a", 1]', '["a", null]', "[[1], []]", "[[1], 2]", "[18446744073709551616]", "[1e309]", "[511]"]
    ),
    Odd("list of many strings", lambda: json.dumps([f"stop {i}" for i in range(MANY)])),
    Odd("list of many empty strings", lambda: json.dumps([""] * MANY)),
    Odd("list of many numbers", lambda: json.dumps(list(range(MANY)))),
    Odd("list of many fractions", lambda: json.dumps([0.5] * MANY)),
    Odd("list of many nulls", lambda: json.dumps([None] * MANY)),
    Odd("list of a thousand prompts", lambda: json.dumps(["word " * 20] * 1000)),
    Odd("list of a thousand lists", lambda: json.dumps([[5] * 20] * 1000)),
    Odd("list of many objects", lambda: json.dumps([{"role": "user", "content": "a"}] * 5000)),
    Odd("deep list", lambda: "[" * DEPTH + "]" * DEPTH),
    Odd("deep list that never ends", lambda: "[" * DEPTH),
]
OBJECTS = [
    *_plain(["{}", '{"": ""}', '{"type": "text"}', '{"a": null}', '{"__class__": {}}', '{"$ref": "#"}']),
    Odd("deep object", lambda: '{"a":' * DEPTH + "1" + "}" * DEPTH),
    Odd("object of many keys", lambda: json.dumps({f"k{i}": i for i in range(MANY)})),
    Odd("object of a megabyte's key", lambda: json.dumps({"k" * MEGABYTE: 1})),
    Odd("object with one key twice", lambda: '{"a": 1, "a": 2}'),
]
OTHERS = _plain(["null", "true", "false", "nul", "undefined", "'a'", "1_000", "0x10", "01", "", "\x00"])

ODD_VALUES = (*NUMBERS, *SURROGATES, *STRINGS, *LISTS, *OBJECTS, *OTHERS)
