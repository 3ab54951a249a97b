"""What a chat's template is told, what its answer is held to, and how it will be read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from toppings.adapters.text_files import MAX_TEMPLATE_BYTES
from toppings.bad_input import RequestError
from toppings.chat_template import ChatTemplate
from toppings.sampling_params import Structure, StructureKind
from toppings.server.chat_body import ChatBody
from toppings.server.errors import ApiError
from toppings.server.state import ServerState, Target
from toppings.text import TextModel
from toppings.tools import reasoning
from toppings.tools.formats import FORMATS, Tool, ToolFormat, format_of
from toppings.tools.grammar import Thoughts, after_thoughts, answer_grammar, free_grammar, rule_of
from toppings.tools.history import with_names
from toppings.tools.output import OutputParser, Parts, Read, read_content


@dataclass(frozen=True)
class Reading:
    """`new_parser`: None where all text is content; `structure`: None where any text will do."""

    new_parser: Callable[[], OutputParser] | None
    structure: Structure | None


@dataclass(kw_only=True)
class ChatPlan:
    """`tokens`: marks of calls and thoughts that are one token each; `shown`: the special ones of them."""

    body: ChatBody
    template: ChatTemplate | None
    format: ToolFormat
    tools: list[Tool]
    thinks: bool
    messages: list[dict[str, Any]]
    tokens: Mapping[str, int] = field(default_factory=dict)
    shown: Mapping[int, str] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Of the template, beside the messages."""
        body = self.body
        is_continued = bool(body.continue_final_message)
        return {
            "add_generation_prompt": body.add_generation_prompt is not False
            and not (body.add_generation_prompt is None and is_continued),
            "continue_final_message": is_continued,
            "tools": self._told_tools(),
            "documents": body.documents or None,
            "variables": {**_effort(body), **(body.chat_template_kwargs or {})},
        }

    def _told_tools(self) -> list[dict[str, Any]] | None:
        if not self.tools or not self.format.tells_template:
            return None
        return [tool.for_template() for tool in self.tools]

    def reading(self, prompt: str, structure: Structure | None) -> Reading:
        """For answers to `prompt`; the request itself holds them to `structure`."""
        thoughts = self._thoughts(prompt)
        return Reading(self._parser(thoughts), self._structure(structure, thoughts))

    def _thoughts(self, prompt: str) -> Thoughts:
        if not self.thinks:
            return Thoughts.NONE
        if self.body.continue_final_message:
            return Thoughts.BEGUN if reasoning.is_open(self.body.messages[-1].text) else Thoughts.NONE
        if reasoning.is_begun(prompt):
            return Thoughts.BEGUN
        return Thoughts.NONE if reasoning.is_over(prompt) else Thoughts.POSSIBLE

    def _parser(self, thoughts: Thoughts) -> Callable[[], OutputParser] | None:
        if not self.tools and thoughts is Thoughts.NONE:
            return None
        read: Read = self.format.read if self.tools else read_content
        if thoughts is not Thoughts.NONE:
            read = reasoning.after_reasoning(read, is_begun=thoughts is Thoughts.BEGUN)
        names = frozenset(tool.name for tool in self.tools)
        is_single = self.body.is_single_call
        return lambda: OutputParser(read, Parts(names, new_id=self.format.new_id, is_single=is_single))

    def _structure(self, given: Structure | None, thoughts: Thoughts) -> Structure | None:
        """A call that must be comes first; else what is given, a call, or any text whose calls are right."""
        form, tools, tokens, body = self.format, self.tools, self.tokens, self.body
        if tools and (body.must_call or given is not None):
            other = None if body.must_call or given is None else rule_of(given)
            text = answer_grammar(
                form, tools, tokens, thoughts=thoughts, is_single=body.is_single_call, other=other
            )
        elif given is not None and thoughts is not Thoughts.NONE:
            text = after_thoughts(rule_of(given), tokens, thoughts)
        elif given is None and any(tool.is_strict for tool in tools):
            text = free_grammar(form, tools, tokens, thoughts=thoughts)
        else:
            return given
        return Structure(StructureKind.GRAMMAR, text)


async def chat_plan(state: ServerState, body: ChatBody, target: Target) -> ChatPlan:
    """Raises ApiError and RequestError for a chat that cannot be answered."""
    settings, text = state.config.server, state.text_of(target)
    tools = list(body.usable_tools())
    template = _request_template(state, body) or await state.template_of(target)
    if template is None:
        template = text.tool_template if tools else text.template
    source = "" if template is None else template.source
    if body.documents and template is not None and not template.mentions("documents"):
        message = f"documents were given, but the chat template of {template.owner} does not show any"
        raise ApiError(400, message, param="documents")
    chosen = settings.tool_call_parser
    form = format_of(source) if chosen == "auto" else FORMATS[chosen]
    thinks = {"auto": reasoning.END in source, "none": False}.get(settings.reasoning_parser, True)
    messages = with_names([message.for_template() for message in body.messages])
    if body.truncate_prompt_tokens is None:
        text.check_chars(sum(len(message["content"]) for message in messages))
    marks = (*(form.marks if tools else ()), *(reasoning.MARKS if thinks else ()))
    tokens = text.single_tokens(marks)
    return ChatPlan(
        body=body,
        template=template,
        format=form,
        tools=tools,
        thinks=thinks,
        messages=form.messages(messages, tools),
        tokens=tokens,
        shown=_special(text, tokens),
    )


def _special(text: TextModel, tokens: Mapping[str, int]) -> dict[int, str]:
    return {token_id: mark for mark, token_id in tokens.items() if not text.decode([token_id])}


def _request_template(state: ServerState, body: ChatBody) -> ChatTemplate | None:
    source = body.chat_template
    if source is None:
        return None
    if state.config.server.trust_request_chat_template != "on":
        message = "chat_template is not taken from requests here (setting trust_request_chat_template)"
        raise ApiError(400, message, param="chat_template")
    if len(source) > MAX_TEMPLATE_BYTES:
        raise RequestError(
            f"chat_template has {len(source)} characters; at most {MAX_TEMPLATE_BYTES} are taken"
        )
    return ChatTemplate(source, "the request")


def _effort(body: ChatBody) -> Mapping[str, Any]:
    """Templates know it by its name, or only whether to think at all."""
    effort = body.reasoning_effort
    if effort is None:
        return {}
    return {"reasoning_effort": effort, "enable_thinking": effort != "none"}
