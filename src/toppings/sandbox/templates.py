"""Chat templates as transformers renders them, inside a sandbox; needs jinja2 and nothing of ours.

The environment is that of `apply_chat_template`: immutable and sandboxed, blocks trimmed, loop controls, the
`generation` tag, `tojson` without HTML's escapes, `raise_exception`, `strftime_now`.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks where a final message ends that is to be continued; templates may strip its blank, hardly more."""


def render(
    *,
    template: str,
    messages: list[dict[str, Any]],
    variables: dict[str, Any],
    add_generation_prompt: bool,
    continue_final_message: bool,
    max_chars: int,
    tools: list[dict[str, Any]] | None = None,
    documents: list[dict[str, Any]] | None = None,
) -> str:
    """The conversation's text. Raises ValueError or one of jinja2's errors, with the reason."""
    if continue_final_message:
        final = _text_of(messages[-1])
        messages = [*messages[:-1], {**messages[-1], "content": final + _CONTINUE_TAG}]
    names = {
        **{"messages": messages, "tools": tools, "documents": documents},
        **{"add_generation_prompt": add_generation_prompt, **variables},
    }
    text = _collect(_compiled(template).generate(**names), max_chars)
    return _cut_at_tag(text, final) if continue_final_message else text


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise ValueError("continue_final_message is true, but the final message has no text to continue")
    return content


def _collect(pieces: Any, max_chars: int) -> str:
    taken, num_chars = [], 0
    for piece in pieces:
        taken.append(piece)
        num_chars += len(piece)
        if num_chars > max_chars:
            raise ValueError(f"it makes more than {max_chars} characters")
    return "".join(taken)


def _cut_at_tag(text: str, final: str) -> str:
    tag = _CONTINUE_TAG.strip()
    if final.strip() not in text or tag not in text:
        raise ValueError("continue_final_message is true, but the template does not show the final message")
    start = text.rindex(tag)
    is_whole = text.startswith(_CONTINUE_TAG, start)
    return text[:start] if is_whole else text[:start].rstrip()  # else the template strips its messages


@lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's text for training; here it shows its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Any) -> Any:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """A template may not store names that begin with an underscore: some lead to Python's internals."""

    def __init__(*args: Any, **fields: Any) -> None:
        self, *rest = args  # so that a field may be called `self`
        values = dict(*rest, **fields)
        for name in values:
            _check_stored(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_stored(name)
        super().__setitem__(name, value)


def _check_stored(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}, which begins with _")


def _raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
