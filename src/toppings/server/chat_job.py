"""The one path by which chats are answered, whatever dialect they come in.

    job, lease = await admitted_chat(state, body)
    async for index, output in job.chats(lease): ...     # or: choices = await job.collect(lease)

A dialect puts its request into a `ChatBody` (messages, tools, sampling) and phrases what comes out:
`ChatOutput`s of choice `index`, each with more of `reasoning`, of `text` (the content) and of `calls`, in
this order; the last one of a choice has a `finish_reason`, and `has_called` says whether it ended with calls.
Tokens are counted in `token_ids`, those of the prompt in `job.num_prompt_tokens`. `ChatChoice`s are the same
put together.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from toppings.core import FinishReason, Standing
from toppings.detokenizer import TextOutput
from toppings.server.chat_body import ChatBody
from toppings.server.chat_plan import ChatPlan, chat_plan
from toppings.server.jobs import Choice, Job, beside_loop, num_last_tokens, room_for_output, tokens_of
from toppings.server.state import Lease, ServerState, Target
from toppings.server.structures import checked_structure
from toppings.tools.output import CallDelta, OutputParser


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
    thoughts: dict[int, str] = field(default_factory=dict)
    """Of each choice, told or not."""
    _num_thoughts: int = 0

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
                told = self._told(index, output, parser)
                if told.finish_reason is not None and index in self.thoughts:
                    thoughts = self.thoughts[index]
                    self._num_thoughts += await beside_loop(
                        self.state, len(thoughts), partial(self._num_tokens, thoughts)
                    )
                yield told
                if told.finish_reason is not None:  # also where the parser wants no more
                    return

    def num_thoughts(self, num_tokens: int) -> int:
        """How many of the job's tokens were thoughts, as far as its choices have ended."""
        return min(num_tokens, self._num_thoughts)

    def _num_tokens(self, thoughts: str) -> int:
        """As the tokeniser would write them: which tokens were theirs is not kept."""
        return len(self.text.encode(thoughts, add_special_tokens=False))

    def _told(self, index: int, output: TextOutput, parser: OutputParser | None) -> ChatOutput:
        text, thoughts = output.text, ""
        calls: tuple[CallDelta, ...] = ()
        has_called, is_done = False, False
        if parser is not None:
            delta = parser.push(output.text, is_last=output.finish_reason is not None)
            text, calls = delta.content, tuple(delta.calls)
            if delta.reasoning:
                self.thoughts[index] = self.thoughts.get(index, "") + delta.reasoning
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
            output.num_cached_tokens,
            output.prompt_logprobs,
            reasoning=thoughts,
            calls=calls,
            has_called=has_called,
        )


async def admitted_chat(state: ServerState, body: ChatBody) -> tuple[ChatJob, Lease]:
    """A chat's job and its place. Raises as `ServerState.admit`, and ApiError, RequestError and
    SandboxBusyError for a chat that cannot be answered."""
    target, lease = await state.admit(body.num_choices, lambda: state.find_target(body.model))
    return await lease.during(_job(state, body, target, lease.started_at)), lease


async def _job(state: ServerState, body: ChatBody, target: Target, started_at: float) -> ChatJob:
    plan = await chat_plan(state, body, target)
    text, prompt = await _prompt(state, target, body, plan)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    is_bounded = max_tokens is not None
    if max_tokens is None:
        room = room_for_output(state, [prompt])
        max_tokens = min(room, state.defaults.get("max_tokens", room))
    given = await checked_structure(state, target, body.structure())
    reading = plan.reading(text, given)
    structure = reading.structure
    if structure is not None and structure != given:
        name = "tools" if plan.tools else "messages"
        structure = await checked_structure(state, target, (name, structure))
    return ChatJob(
        state=state,
        target=target,
        prompts=[prompt],
        sampling=body.sampling(
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            defaults=state.defaults,
            structure=structure,
        ),
        num_choices=body.num_choices,
        is_bounded=is_bounded,
        include_stop=bool(body.include_stop_str_in_output),
        cache_salt=body.cache_salt,
        standing=Standing(priority=body.priority or 0),
        started_at=started_at,
        new_parser=reading.new_parser,
        shows_reasoning=body.include_reasoning is not False,
        shown=plan.shown,
    )


async def chat_tokens(state: ServerState, body: ChatBody, target: Target) -> list[int]:
    """The prompt that the chat is. Raises as `admitted_chat`."""
    return (await _prompt(state, target, body, await chat_plan(state, body, target)))[1]


async def _prompt(
    state: ServerState, target: Target, body: ChatBody, plan: ChatPlan
) -> tuple[str, list[int]]:
    text = await state.text_of(target).chat_text(plan.messages, plan.template, **plan.options)
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    num_last = num_last_tokens(state, body.truncate_prompt_tokens, wanted)
    is_special = bool(body.add_special_tokens)
    [token_ids] = await tokens_of(state, target, [text], add_special_tokens=is_special, num_last=num_last)
    return text, token_ids
