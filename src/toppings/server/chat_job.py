"""The one path by which chats are answered, whatever dialect they come in.

    job = await lease.during(chat_job(state, body))
    async for index, output in job.chats(lease): ...     # or: choices = await job.collect(lease)

A dialect puts its request into a `ChatBody` (messages, tools, sampling) and phrases what comes out:
`ChatOutput`s of choice `index`, each with more of `reasoning`, of `text` (the content) and of `calls`, in
this order; the last one of a choice has a `finish_reason`, and `has_called` says whether it ended with calls.
Tokens are counted in `token_ids`, those of the prompt in `job.num_prompt_tokens`. `ChatChoice`s are the same
put together.
"""

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from toppings.adapters.text_files import MAX_TEMPLATE_BYTES
from toppings.chat_template import ChatTemplate
from toppings.core import FinishReason, RequestError
from toppings.server.chat_body import ChatBody
from toppings.server.errors import ApiError
from toppings.server.jobs import Choice, Job, room_for_output, tokens_of
from toppings.server.state import Lease, ServerState, Target
from toppings.text import TextOutput
from toppings.tools import reasoning
from toppings.tools.formats import FORMATS, Tool, ToolFormat, format_of
from toppings.tools.history import with_names
from toppings.tools.output import CallDelta, OutputParser, Parts, Read, read_content


@dataclass(frozen=True, slots=True)
class ChatOutput(TextOutput):
    """What one step added to a choice: `text` is its content."""

    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    has_called: bool = False
    """With the last one: whether the answer holds calls, so that they are what it ended for."""


@dataclass(slots=True)
class CalledTool:
    """`arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ChatChoice(Choice):
    """A whole answer: `text` is its content."""

    reasoning: str = ""
    calls: list[CalledTool] = field(default_factory=list)
    has_called: bool = False

    def add(self, output: TextOutput) -> None:
        Choice.add(self, output)
        if isinstance(output, ChatOutput):
            self.reasoning += output.reasoning
            self.has_called = output.has_called
            for delta in output.calls:
                if delta.id is not None and delta.name is not None:
                    self.calls.append(CalledTool(delta.id, delta.name))
                self.calls[-1].arguments += delta.arguments


@dataclass(kw_only=True)
class ChatJob(Job):
    """Choices are `ChatChoice`s, outputs `ChatOutput`s. `new_parser`: None where all text is content."""

    new_parser: Callable[[], OutputParser] | None = None
    shows_reasoning: bool = True

    def new_choice(self) -> ChatChoice:
        return ChatChoice()

    async def chats(self, lease: Lease) -> AsyncGenerator[tuple[int, ChatOutput], None]:
        """`stream`, whose outputs are `ChatOutput`s."""
        async with aclosing(self.stream(lease)) as outputs:
            async for index, output in outputs:
                assert isinstance(output, ChatOutput)
                yield index, output

    async def _outputs(self, index: int, prompt: list[int]) -> AsyncGenerator[TextOutput, None]:
        parser = None if self.new_parser is None else self.new_parser()
        async with aclosing(super()._outputs(index, prompt)) as outputs:
            async for output in outputs:
                told = self._told(output, parser)
                yield told
                if told.finish_reason is not None:  # also where the parser wants no more
                    return

    def _told(self, output: TextOutput, parser: OutputParser | None) -> ChatOutput:
        text, thoughts = output.text, ""
        calls: tuple[CallDelta, ...] = ()
        has_called, is_done = False, False
        if parser is not None:
            delta = parser.push(output.text, is_last=output.finish_reason is not None)
            text, calls = delta.content, tuple(delta.calls)
            thoughts = delta.reasoning if self.shows_reasoning else ""
            has_called, is_done = parser.has_called, parser.is_done
        return ChatOutput(
            text,
            output.token_ids,
            output.logprobs,
            FinishReason.STOP if is_done else output.finish_reason,
            output.stop_reason,
            output.queue_ms,
            output.cold_start,
            reasoning=thoughts,
            calls=calls,
            has_called=has_called,
        )


async def chat_job(state: ServerState, body: ChatBody) -> ChatJob:
    """Raises ApiError, RequestError and SandboxBusyError for a chat that cannot be answered."""
    started_at = time.perf_counter()
    target = await state.find_target(body.model)
    plan = await _plan(state, body, target)
    text = await state.text.chat_text(plan.messages, plan.template, **plan.options)
    [prompt] = await tokens_of(state, [text], add_special_tokens=bool(body.add_special_tokens))
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_tokens is None:
        room = room_for_output(state, [prompt])
        max_tokens = min(room, state.defaults.get("max_tokens", room))
    return ChatJob(
        state=state,
        target=target,
        prompts=[prompt],
        sampling=body.sampling(
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            defaults=state.defaults,
        ),
        num_choices=body.num_choices,
        include_stop=bool(body.include_stop_str_in_output),
        started_at=started_at,
        new_parser=plan.parser(text),
        shows_reasoning=body.include_reasoning is not False,
        shown=plan.shown_tokens(),
    )


@dataclass(kw_only=True)
class _Plan:
    """What a chat's template is told, and how the answer will be read."""

    state: ServerState
    body: ChatBody
    template: ChatTemplate | None
    format: ToolFormat
    tools: list[Tool]
    thinks: bool
    messages: list[dict[str, Any]]

    @property
    def options(self) -> dict[str, Any]:
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

    def parser(self, prompt: str) -> Callable[[], OutputParser] | None:
        """A maker of parsers for answers to `prompt`; None where all their text is content."""
        is_begun = self.thinks and self._has_begun_thoughts(prompt)
        may_think = self.thinks and (is_begun or not reasoning.is_over(prompt))
        if not self.tools and not may_think:
            return None
        read: Read = self.format.read if self.tools else read_content
        if may_think:
            read = reasoning.after_reasoning(read, is_begun=is_begun)
        names = frozenset(tool.name for tool in self.tools)
        is_single = self.body.is_single_call
        return lambda: OutputParser(read, Parts(names, new_id=self.format.new_id, is_single=is_single))

    def _has_begun_thoughts(self, prompt: str) -> bool:
        if self.body.continue_final_message:
            return reasoning.is_open(self.body.messages[-1].text)
        return reasoning.is_begun(prompt)

    def shown_tokens(self) -> dict[int, str]:
        """Special tokens that the parser has to see."""
        marks = (*(self.format.marks if self.tools else ()), *(reasoning.MARKS if self.thinks else ()))
        return self.state.text.special_tokens(marks)


async def _plan(state: ServerState, body: ChatBody, target: Target) -> _Plan:
    settings = state.config.server
    tools = list(body.usable_tools())
    template = _request_template(state, body) or await state.template_of(target)
    if template is None:
        template = state.text.tool_template if tools else state.text.template
    source = "" if template is None else template.source
    if body.documents and template is not None and not template.mentions("documents"):
        message = f"documents were given, but the chat template of {template.owner} does not show any"
        raise ApiError(400, message, param="documents")
    chosen = settings.tool_call_parser
    form = format_of(source) if chosen == "auto" else FORMATS[chosen]
    thinks = {"auto": reasoning.END in source, "none": False}.get(settings.reasoning_parser, True)
    messages = with_names([message.for_template() for message in body.messages])
    state.text.check_chars(sum(len(message["content"]) for message in messages))
    return _Plan(
        state=state,
        body=body,
        template=template,
        format=form,
        tools=tools,
        thinks=thinks,
        messages=form.messages(messages, tools),
    )


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
