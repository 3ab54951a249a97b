"""What of an adapter's directory is about text: its own chat template, tokens that it adds, and which of its
tokens are special.

The base model's tokeniser serves all its adapters, with the tokens that they add (`vocabulary.py`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toppings.adapters.bounded_json import parse_bounded
from toppings.adapters.regular_files import open_regular

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
TEXT_FILES = (TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE)
MAX_TEMPLATE_BYTES = 256 << 10
MAX_CONFIG_BYTES = 8 << 20
HEAD_BYTES = 4 << 20  # of tokenizer.json, whose added tokens stand before its vocabulary
MAX_NAMED = 5
MAX_TOKENS, MAX_TOKEN_CHARS = 8192, 256
SPECIAL_NAMES = ("bos_token", "eos_token")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """As the tokenizers library has it; an id that is none counts as -1."""

    content: str
    id: int
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


@dataclass(frozen=True)
class TextFiles:
    """`added_tokens` by their texts; `names`: of `SPECIAL_NAMES`, which token they are; `warnings` says what
    could not be read."""

    chat_template: str | None = None
    added_tokens: Mapping[str, AddedToken] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path, roots: Sequence[Path] | None = None) -> "TextFiles":
        """Raises OSError where a file that is there cannot be read, or `open_regular` may not open it."""
        warnings: list[str] = []
        config = _read_config(path / TOKENIZER_CONFIG_FILE, roots, warnings)
        template = _read_bounded(path / TEMPLATE_FILE, MAX_TEMPLATE_BYTES, roots, warnings)
        if template is None:
            template = _default_template(config.get("chat_template"), warnings)
        tokens = _added_tokens(config, path / TOKENIZER_FILE, roots, warnings)
        return cls(template, tokens, _special_names(config), tuple(warnings))


def _read_bounded(
    file: Path, max_bytes: int, roots: Sequence[Path] | None, warnings: list[str]
) -> str | None:
    try:
        with open_regular(file, roots) as stream:
            data = stream.read(max_bytes + 1)
        if len(data) > max_bytes:
            warnings.append(f"{file.name} is larger than {max_bytes} bytes and is not used")
            return None
        return data.decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        warnings.append(f"{file.name} is not UTF-8 and is not used")
        return None


def _read_config(file: Path, roots: Sequence[Path] | None, warnings: list[str]) -> dict[str, Any]:
    text = _read_bounded(file, MAX_CONFIG_BYTES, roots, warnings)
    try:
        config = parse_bounded(text or "{}")
    except (ValueError, RecursionError):
        config = None
    if isinstance(config, dict):
        return config
    warnings.append(f"{file.name} is not a JSON object and is not used")
    return {}


def _default_template(value: Any, warnings: list[str]) -> str | None:
    """A text, or a list of named templates of which the one called "default" is meant."""
    if isinstance(value, list):
        named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
        value = named.get("default")
    if isinstance(value, str) and len(value.encode("utf-8", "surrogatepass")) <= MAX_TEMPLATE_BYTES:
        return value
    if value is not None:
        warnings.append(
            f"{TOKENIZER_CONFIG_FILE} has a chat template that is no text of usual size; it is not used"
        )
    return None


def _added_tokens(
    config: dict[str, Any], tokenizer_file: Path, roots: Sequence[Path] | None, warnings: list[str]
) -> dict[str, AddedToken]:
    """Of both files; where they differ, tokenizer.json's."""
    decoder = config.get("added_tokens_decoder")
    entries = [{**_mapping(v), "id": k} for k, v in _mapping(decoder).items()]
    entries += _listed_tokens(tokenizer_file, roots, warnings)
    found = [_token(_mapping(entry)) for entry in entries]
    tokens = {token.content: token for token in found if 0 < len(token.content) <= MAX_TOKEN_CHARS}
    if len(tokens) > MAX_TOKENS:
        warnings.append(f"its tokeniser adds {len(tokens)} tokens; more than {MAX_TOKENS} are not used")
        return {}
    return tokens


def _token(entry: Mapping[str, Any]) -> AddedToken:
    number, content = str(entry.get("id")), entry.get("content")
    is_special = entry.get("special") is True
    return AddedToken(
        content if isinstance(content, str) else "",
        int(number) if number.isdecimal() and len(number) < 10 else -1,
        is_special,
        single_word=entry.get("single_word") is True,
        lstrip=entry.get("lstrip") is True,
        rstrip=entry.get("rstrip") is True,
        normalized=bool(entry.get("normalized", not is_special)),
    )


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """A token is written as its text, or as an object with that."""
    found = {name: config.get(name) for name in SPECIAL_NAMES}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()
    }
    return {
        name: text
        for name, text in texts.items()
        if isinstance(text, str) and 0 < len(text) <= MAX_TOKEN_CHARS
    }


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _listed_tokens(file: Path, roots: Sequence[Path] | None, warnings: list[str]) -> list[Any]:
    try:
        with open_regular(file, roots) as stream:
            head = stream.read(HEAD_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    start = head.find('"added_tokens"')
    start = head.find("[", start) if start >= 0 else -1
    if start < 0:
        return []
    try:
        end = _end_of_list(head, start)
        listed = parse_bounded(head[start:end])
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, list):
        warnings.append(f"the added tokens of {file.name} cannot be read and are not used")
        return []
    return listed


def _end_of_list(text: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`. Raises ValueError where there is none."""
    depth = 0
    for match in _BRACKETS.finditer(text, start):
        depth += {"[": 1, "]": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    raise ValueError("the list has no end")


_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]]', re.DOTALL)
"""Texts, which may hold brackets, and brackets. A text that has no end is one, too: nothing is read twice."""
