"""How families of chat templates write tool calls. One class each: how calls are read, what forces them, and
how a conversation's earlier calls are told to the template."""

import hashlib
import json
import re
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from toppings.tools.output import Parts, random_id
from toppings.tools.reader import MalformedError, Reading

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    parameters: dict[str, Any] | None = None
    description: str | None = None
    is_strict: bool = False

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        told = {key: value for key, value in function.items() if value is not None}
        return {"type": "function", "function": told}


class ToolFormat(ABC):
    """Of templates that know tools and take calls as OpenAI's API has them, arguments as an object.

    What forced calls are written like: `start`, a call, `between` and a call for each further one, `end`; a
    call is what `around` gives, with the arguments in the middle. Where `start` is empty and there is a
    `trigger`, each call begins with that; without a trigger calls are the whole answer.
    """

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    """Texts that may be special tokens, which are no text otherwise."""
    start: ClassVar[str] = ""
    between: ClassVar[str] = ""
    end: ClassVar[str] = ""
    trigger: ClassVar[str] = ""
    tells_template: ClassVar[bool] = True
    """The template itself tells the model of the tools."""

    @abstractmethod
    def read(self, parts: Parts) -> Reading[None]:
        """An answer from its beginning to its end."""

    @abstractmethod
    def around(self, name: str) -> tuple[str, str]:
        """What stands before and after the arguments of a call of `name`."""

    def new_id(self) -> str:
        return random_id()

    def messages(self, messages: Messages, tools: Sequence[Tool]) -> Messages:
        """The conversation as the template takes it; `arguments` of its calls are objects, or texts where
        they are none."""
        return messages


class Hermes(ToolFormat):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Qwen 2.5 and 3 write it too."""

    name = "hermes"
    marks = ("<tool_call>", "</tool_call>")
    between = "\n"
    trigger = "<tool_call>"

    def around(self, name: str) -> tuple[str, str]:
        return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": ', "}\n</tool_call>"

    def read(self, parts: Parts) -> Reading[None]:
        begin, end = self.marks
        while (yield from parts.say_until(begin)):
            with parts.trying(begin):
                yield from parts.text.skip_blanks()
                yield from parts.call()
                yield from parts.text.skip_blanks()
                yield from parts.text.skip_mark(end)


class Generic(Hermes):
    """For templates that know no tools: a system message of ours tells of them, and asks for Hermes' form."""

    name = "generic"
    tells_template = False

    def messages(self, messages: Messages, tools: Sequence[Tool]) -> Messages:
        plain = _joined([_in_words(message) for message in messages])
        if not tools:
            return plain
        told = _told_of(tools)
        if plain and plain[0]["role"] == "system":
            return [{**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
        return [{"role": "system", "content": told}, *plain]


def _told_of(tools: Sequence[Tool]) -> str:
    listed = "\n".join(json.dumps(tool.for_template()["function"], ensure_ascii=False) for tool in tools)
    return (
        "You may call these functions. Each is described in JSON, its parameters by a JSON schema:\n"
        f"{listed}\n\nTo call one, answer with its name and arguments, nothing else:\n"
        '<tool_call>\n{"name": "the name", "arguments": {}}\n</tool_call>\n'
        "For several calls write several such blocks. What the functions return comes to you within "
        "<tool_response> and </tool_response>."
    )


def _in_words(message: dict[str, Any]) -> dict[str, Any]:
    """A message of calls, or of what came of one, as a template takes it that knows only three roles."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
    written = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": "\n".join(filter(None, [message["content"], *written]))}


def _joined(messages: Messages) -> Messages:
    """Several answers of tools, and what the user says then, are one turn: many templates want turns."""
    joined: Messages = []
    for message in messages:
        before = joined[-1] if joined else {}
        is_answer = before.get("role") == "user" and before["content"].endswith("</tool_response>")
        if is_answer and message["role"] == "user" and set(message) == set(before):
            joined[-1] = {**before, "content": f"{before['content']}\n{message['content']}"}
        else:
            joined.append(message)
    return joined


class Llama3(ToolFormat):
    """`{"name": ..., "parameters": {...}}` as the whole answer, or after `<|python_tag|>`; more after `;`."""

    name = "llama3_json"
    marks = ("<|python_tag|>",)
    between = "; "

    def around(self, name: str) -> tuple[str, str]:
        return f'{{"name": {json.dumps(name)}, "parameters": ', "}"

    def read(self, parts: Parts) -> Reading[None]:
        """Without its tag, an object is a call only where it names a tool: it may be an answer in JSON."""
        [tag] = self.marks
        is_tagged = False
        while True:
            with parts.trying(tag if is_tagged else ""):
                yield from self._calls(parts, is_tagged)
            if not (yield from parts.say_until(tag)):
                return
            is_tagged = True

    def _calls(self, parts: Parts, is_tagged: bool) -> Reading[None]:
        text = parts.text
        while True:
            yield from text.skip_blanks()
            yield from parts.call(is_known=not is_tagged)
            yield from text.skip_blanks()
            if not (yield from text.try_take(";")):
                return


class Mistral(ToolFormat):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`; reads what newer ones write, too."""

    name = "mistral"
    marks = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    start, between, end = "[TOOL_CALLS][", ", ", "]"
    trigger = "[TOOL_CALLS]"
    _id = re.compile(r"[a-zA-Z0-9]{9}")

    def read(self, parts: Parts) -> Reading[None]:
        mark, text = self.marks[0], parts.text
        while (yield from parts.say_until(mark)):
            with parts.trying(mark):
                yield from text.skip_blanks()
                if (yield from text.try_take("[")):
                    yield from self._listed(parts)
                else:
                    yield from self._named(parts)

    def _listed(self, parts: Parts) -> Reading[None]:
        text = parts.text
        while True:
            yield from text.skip_blanks()
            yield from parts.call()
            yield from text.skip_blanks()
            if not (yield from text.try_take(",")):
                break
        yield from text.take("]")

    def _named(self, parts: Parts) -> Reading[None]:
        _, begin_arguments, begin_id = self.marks
        text, start = parts.text, parts.text.position
        while (char := (yield from text.peek())) and char not in "[{( \n":
            text.position += 1
        name = text.since(start)
        if (yield from text.try_take(begin_id)):
            while (yield from text.peek()).isalnum():
                text.position += 1
        yield from text.try_take(begin_arguments)
        yield from text.skip_blanks()
        if not name:
            raise MalformedError("a call needs a name")
        yield from parts.named_call(name)

    def around(self, name: str) -> tuple[str, str]:
        return f'{{"name": {json.dumps(name)}, "arguments": ', "}"

    def new_id(self) -> str:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def messages(self, messages: Messages, tools: Sequence[Tool]) -> Messages:
        """Its templates take ids of nine letters and digits only."""
        return [self._with_short_ids(message) for message in messages]

    def _with_short_ids(self, message: dict[str, Any]) -> dict[str, Any]:
        if "tool_call_id" in message:
            message = {**message, "tool_call_id": self._short_id(message["tool_call_id"])}
        if "tool_calls" in message:
            calls = [{**call, "id": self._short_id(call["id"])} for call in message["tool_calls"]]
            message = {**message, "tool_calls": calls}
        return message

    def _short_id(self, given: str) -> str:
        return given if self._id.fullmatch(given) else hashlib.sha256(given.encode()).hexdigest()[:9]


class MistralNamed(Mistral):
    """Each call as `[TOOL_CALLS]name[ARGS]{...}`, some with `[CALL_ID]id` after the name."""

    name = "mistral_named"
    start, between, end = "", "", ""

    def around(self, name: str) -> tuple[str, str]:
        return f"[TOOL_CALLS]{name}[ARGS]", ""


FORMATS: dict[str, ToolFormat] = {
    each.name: each for each in (Hermes(), Llama3(), Mistral(), MistralNamed(), Generic())
}


def format_of(template: str) -> ToolFormat:
    """Of a template's source. One that tells of tools in a way not known here is treated as one that knows
    none: what its model answers could not be read."""
    if not re.search(r"\btools\b", template):
        name = "generic"
    elif "[TOOL_CALLS]" in template:
        name = "mistral_named" if "[ARGS]" in template else "mistral"
    elif "<tool_call>" in template and "<function=" not in template:
        name = "hermes"
    elif "<|python_tag|>" in template or ("<|start_header_id|>" in template and '"parameters"' in template):
        name = "llama3_json"
    else:
        name = "generic"
    return FORMATS[name]
