"""What of an adapter's directory is about text: its own chat template, and tokens that it adds.

The base model's tokeniser serves all its adapters, so that an adapter's own is only compared with it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toppings.adapters.bounded_json import MAX_VALUES, parse_bounded
from toppings.adapters.regular_files import open_regular

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
TEXT_FILES = (TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE)
MAX_TEMPLATE_BYTES = 256 << 10
MAX_CONFIG_BYTES = 8 << 20
HEAD_BYTES = 1 << 20  # of tokenizer.json, whose added tokens stand before its vocabulary
MAX_NAMED = 5


@dataclass(frozen=True)
class TextFiles:
    """`added_tokens` maps a token to its id; `warnings` says what could not be read."""

    chat_template: str | None = None
    added_tokens: Mapping[str, int] | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path, roots: Sequence[Path] | None = None) -> "TextFiles":
        """Raises OSError where a file that is there cannot be read, or `open_regular` may not open it."""
        warnings: list[str] = []
        config = _read_config(path / TOKENIZER_CONFIG_FILE, roots, warnings)
        template = _read_bounded(path / TEMPLATE_FILE, MAX_TEMPLATE_BYTES, roots, warnings)
        if template is None:
            template = _default_template(config.get("chat_template"), warnings)
        return cls(template, _added_tokens(config, path / TOKENIZER_FILE, roots), tuple(warnings))

    def differences(self, base_tokens: Mapping[str, int]) -> list[str]:
        """A warning that names tokens which the base's tokeniser has under another id, or not at all."""
        added = self.added_tokens or {}
        differing = [(token, i) for token, i in added.items() if base_tokens.get(token) != i]
        if not differing:
            return []
        named = ", ".join(f"{token[:40]!r} (id {i})" for token, i in differing[:MAX_NAMED])
        return [
            f"its tokeniser adds {len(differing)} tokens that the base model's does not have so: {named}; "
            "the base model's tokeniser is used"
        ]


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
    config: dict[str, Any], tokenizer_file: Path, roots: Sequence[Path] | None
) -> dict[str, int]:
    """Of both files; the ids of malformed entries count as -1, which no token of a base model has."""
    decoder = config.get("added_tokens_decoder")
    entries = [{**_mapping(v), "id": k} for k, v in _mapping(decoder).items()] + _listed_tokens(
        tokenizer_file, roots
    )
    return {
        str(entry.get("content")): int(i) if (i := str(entry.get("id"))).isdecimal() and len(i) < 19 else -1
        for entry in map(_mapping, entries)
    }


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _listed_tokens(file: Path, roots: Sequence[Path] | None) -> list[Any]:
    try:
        with open_regular(file, roots) as stream:
            head = stream.read(HEAD_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    start = head.find('"added_tokens"')
    start = head.find("[", start) if start >= 0 else -1
    if start < 0 or head.count("[") + head.count("{") > MAX_VALUES:
        return []
    try:
        listed = json.JSONDecoder().raw_decode(head, start)[0]
    except (ValueError, RecursionError):
        return []
    return listed if isinstance(listed, list) else []


def base_tokens(path: Path) -> dict[str, int]:
    """The added tokens of a base model's tokeniser, read as an adapter's are."""
    return dict(TextFiles.read(path).added_tokens or {})
