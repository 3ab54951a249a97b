"""Grammars of structured outputs: made, and tried on single bytes. It runs in a sandbox, too, and needs
llguidance and nothing of ours."""

import json
import re
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

MAX_REASON_CHARS = 600
NUM_TRIED = 32
"""Bytes that a check goes along the grammar: what never ends or is too much shows within a few."""
END = 256
WHITESPACE = r" |\r?\n( {0,32}|\t{0,16})"
"""Between the tokens of JSON: a blank, or a line's end and the next one's indentation. Without a bound, a
model may write blanks until it is cut off."""


LEXEMES = re.compile(
    r"""
    "(?:\\.|[^"\\])*"           # a text
    | /(?:\\.|[^/\\])+/         # a pattern
    | (?://|\#)[^\n]*           # a comment
    | <\[(\^?[0-9,-]+)\]>       # tokens by their ids: <[5]>, <[5,7-9]>, <[^5]>
    """,
    re.VERBOSE | re.DOTALL,
)
"""Those of Lark's notation that may hold what looks like ids, and ids."""
ID_RANGE = re.compile(r"(\d+)(-(\d+))?")
MAX_ID_DIGITS = 10
GBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


def limits() -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,  # some 20 ms
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=20_000,  # of up to 2 KiB
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def grammar_of(kind: str, text: str) -> str:
    """The library's own form of a structure (`core.StructureKind`).

    Raises ValueError for what is no JSON, or a list of choices that is none.
    """
    if kind == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(text))
    if kind == "grammar":
        return str(llguidance.LLMatcher.grammar_from_lark(text))
    if kind == "choice":
        return str(llguidance.LLMatcher.grammar_from_lark(_lark_of(json.loads(text))))
    schema = text if kind == "json_schema" else '{"type": "object"}'
    return str(
        llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})
    )


def matcher_of(vocabulary: Any, kind: str, text: str) -> llguidance.LLMatcher:
    """At the structure's start. Raises ValueError."""
    matcher = llguidance.LLMatcher(vocabulary, grammar_of(kind, text), log_level=0, limits=limits())
    raise_error_of(matcher)
    return matcher


def _lark_of(choices: Any) -> str:
    if not isinstance(choices, list) or not choices:
        raise ValueError("it must be a list of at least one string")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise ValueError(
                f"it holds {json.dumps(choice)[:100]}; each choice must be a string that is not empty"
            )
    # One terminal: the lexer goes through thousands of words at once, the parser one by one.
    return "start: CHOICE\nCHOICE: " + " | ".join(
        json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(choices)
    )


def check(*, structure_kind: str, text: str, special_tokens: list[str], vocab_size: int) -> str:
    """The text that means the structure to the engine: of a grammar in GBNF one in Lark's notation, of a
    schema one without what asks for nothing.

    Raises ValueError for what is not valid, allows no output or is too complex.
    """
    if structure_kind == "grammar" and GBNF_RULE.search(text):
        text = _lark_of_gbnf(text)
    if structure_kind == "json_schema":
        text = _plain_schema(text)
    tried = _without_ids(text, vocab_size) if structure_kind == "grammar" else text
    matcher = matcher_of(byte_vocabulary(special_tokens), structure_kind, tried)
    for _ in range(NUM_TRIED):
        mask = matcher.compute_bitmask()
        raise_error_of(matcher)
        allowed = [token for token in range(END) if mask[token // 8] >> token % 8 & 1]
        if not allowed:
            break
        matcher.consume_token(allowed[-1])
    return text


def _without_ids(grammar: str, vocab_size: int) -> str:
    """The grammar with one token for all that it names by ids, for the model's vocabulary is not here.

    Raises ValueError for an id that the vocabulary has not.
    """

    def check_id(digits: str) -> int:
        digits = digits.lstrip("0") or "0"
        if len(digits) > MAX_ID_DIGITS or int(digits) >= vocab_size:
            shown = digits if len(digits) <= MAX_ID_DIGITS else f"{digits[:MAX_ID_DIGITS]}..."
            raise ValueError(f"it names token id {shown}; the vocabulary has ids 0 to {vocab_size - 1}")
        return int(digits)

    def replace_range(ids: re.Match[str]) -> str:
        first, last = check_id(ids[1]), check_id(ids[3] or ids[1])
        if first > last:
            raise ValueError(f"it names token ids {first} to {last}; the first must not be above the last")
        return str(END + 1)

    def replace(lexeme: re.Match[str]) -> str:
        return lexeme[0] if lexeme[1] is None else f"<[{ID_RANGE.sub(replace_range, lexeme[1])}]>"

    return LEXEMES.sub(replace, grammar)


def raise_error_of(matcher: Any) -> None:
    """Raises ValueError where it can go on no further."""
    if matcher.is_error():
        reason = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
        raise ValueError(_EXPLAINED.get(reason, reason)[:MAX_REASON_CHARS])


_NO_OUTPUT = "it allows no output at all"
_EXPLAINED = {"NoExtensionBias": _NO_OUTPUT, "NoExtension": _NO_OUTPUT}


# --- schemas ---

FORMATS = (
    *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4"),
    *("ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer"),
    *("relative-json-pointer", "regex"),
)
"""Those of the standard; any other asks for nothing (JSON Schema 2020-12, Validation, 7.2.3)."""
WHOLE = ("maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties")
HOLDS_SCHEMA = (
    *("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else"),
    *("propertyNames", "unevaluatedItems", "unevaluatedProperties"),
)
HOLDS_LIST = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
HOLDS_MAP = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def _plain_schema(text: str) -> str:
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
        if schema is False:
            raise ValueError(_NO_OUTPUT)
        if not isinstance(schema, dict | bool):
            raise ValueError(f"it is {json.dumps(schema)[:100]}; a schema must be an object or boolean")
        return json.dumps({} if schema is True else _plain(schema), ensure_ascii=False)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON has not")


def _plain(schema: Any) -> Any:
    """Without formats of nobody's, `uniqueItems: false`, and whole numbers written as 2.0."""
    if not isinstance(schema, dict):
        return schema
    plain: dict[str, Any] = {}
    for key, value in schema.items():
        if key in HOLDS_MAP and isinstance(value, dict):
            plain[key] = {name: _plain(each) for name, each in value.items()}
        elif key in HOLDS_LIST and isinstance(value, list):
            plain[key] = [_plain(each) for each in value]
        elif key in HOLDS_SCHEMA:
            plain[key] = _plain(value)
        elif key in WHOLE and isinstance(value, float) and value.is_integer():
            plain[key] = int(value)
        elif not (key == "format" and isinstance(value, str) and value not in FORMATS) and not (
            key == "uniqueItems" and value is False
        ):
            plain[key] = value
    return plain


def _lark_of_gbnf(text: str) -> str:
    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:
        raise ValueError(f"it is read as GBNF, for its rules have '::=': {error}; Lark's have ':'") from error


def byte_vocabulary(special_tokens: list[str]) -> Any:
    """A vocabulary of every byte, an end, and special tokens."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes(special_tokens)), slices=[])


class _Bytes:
    eos_token_id = END
    bos_token_id = None

    def __init__(self, special_tokens: list[str]) -> None:
        names = [b"<end of output>", b"<any other token>", *(name.encode() for name in special_tokens)]
        self.tokens = [bytes([byte]) for byte in range(END)] + names
        self.special_token_ids = list(range(END, len(self.tokens)))

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())
