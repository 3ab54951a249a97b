"""Conversations to text by a chat template, which is a program of the checkpoint's and runs in a sandbox."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from toppings.bad_input import RequestError
from toppings.sandbox import Sandbox, SandboxError

NUM_PROCESSES = 2
RENDER_CPU_S = 0.5
"""Of a processor. Common templates take a fraction of a millisecond, long conversations some milliseconds."""
MAX_CHARS = 32 << 20

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class ChatTemplate:
    """`source` in Jinja; `owner` names whose it is ("the model", "adapter 'x'"), for messages."""

    source: str
    owner: str

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(self.source.encode("utf-8", "surrogatepass")).hexdigest()

    def mentions(self, variable: str) -> bool:
        """False where the template certainly does not look at the variable."""
        return variable in self._words

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", self.source))


class ChatRenderer:
    """Renders as transformers' `apply_chat_template` does. `variables`: special tokens by name.

    Options: `add_generation_prompt`, `continue_final_message`, `tools` and `documents` (JSON, as the API has
    them), and `variables` of this chat, which count before the model's own.
    """

    def __init__(self, variables: Mapping[str, Any], sandbox: Sandbox | None = None) -> None:
        self._variables = {name: _plain(value) for name, value in variables.items()}
        self._sandbox = sandbox or Sandbox(NUM_PROCESSES, work="a chat template")

    def with_variables(self, variables: Mapping[str, Any]) -> "ChatRenderer":
        """Another one that renders in the same processes."""
        return ChatRenderer(variables, self._sandbox)

    def render(self, template: ChatTemplate, messages: Messages, **options: Any) -> str:
        """Raises RequestError where the template fails, takes too long or needs too much memory."""
        try:
            text: str = self._sandbox.run("render", **self._job(template, messages, **options))
        except SandboxError as error:
            raise _refusal(template, error) from error
        return text

    async def render_in_turn(self, template: ChatTemplate, messages: Messages, **options: Any) -> str:
        """`render` beside the event loop, where a slow template keeps back nobody but its own users.

        Raises SandboxBusyError too.
        """
        job = self._job(template, messages, **options)
        try:
            text: str = await self._sandbox.run_in_turn(template.key, "render", **job)
        except SandboxError as error:
            raise _refusal(template, error) from error
        return text

    def _job(
        self,
        template: ChatTemplate,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, str]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        if add_generation_prompt and continue_final_message:
            raise RequestError("continue_final_message is true; add_generation_prompt must then be false")
        if not messages:
            raise RequestError("the conversation is empty; it needs at least one message")
        return {
            "cpu_s": RENDER_CPU_S,
            "template": template.source,
            "messages": [{k: v for k, v in m.items() if v is not None} for m in messages],
            "tools": tools,
            "documents": documents,
            "variables": {**self._variables, **(variables or {})},
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "max_chars": MAX_CHARS,
        }

    def close(self) -> None:
        """Ends its processes; they also end with this object."""
        self._sandbox.close()


def _refusal(template: ChatTemplate, error: SandboxError) -> RequestError:
    return RequestError(f"the chat template of {template.owner} refuses the messages: {error}")


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else str(value)
