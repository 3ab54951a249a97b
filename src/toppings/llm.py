"""Toppings without HTTP: an engine, in a process of its own, behind plain calls."""

import asyncio
import logging
import threading
from array import array
from collections.abc import AsyncGenerator, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from toppings.adapters.errors import AdapterExists, AdapterNotFound, StateHeldError
from toppings.adapters.merges import Merge
from toppings.adapters.registry import AdapterRecord
from toppings.adapters.vocabulary import own_names
from toppings.bad_input import RequestError
from toppings.config import Config
from toppings.core import FinishReason
from toppings.detokenizer import TextOutput, generate_text
from toppings.engine.base import hold_state, model_path, open_registry
from toppings.engine.client import EngineClient, EngineDeadError
from toppings.engine.meeting_place import MeetingPlace
from toppings.grammar.checker import StructureChecker
from toppings.prompts import Prompt, as_prompts, check_types, is_list, token_ids_of
from toppings.sampling_defaults import read_sampling_defaults
from toppings.sampling_params import Pooling, SamplingParams
from toppings.sources.models import with_model
from toppings.text import TextLogprob, TextModel

logger = logging.getLogger(__name__)

LAST_CALLS_S = 2.0
"""How long calls under way may take to return once the engine has ended."""

T = TypeVar("T")


@dataclass(slots=True)
class Completion:
    """What came of one prompt; `logprobs` has one entry per token where they were asked for, and
    `prompt_logprobs` one for every token of the prompt but its first."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TextLogprob] | None = None
    prompt_logprobs: list[TextLogprob] | None = None
    embedding: list[float] | None = None

    def append(self, output: TextOutput) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        self.finish_reason = output.finish_reason
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs


class LLM:
    """A base model with its adapters. Settings are those of `EngineConfig`, by name.

    `generate` may be called from any thread; `stream` from any event loop. Close it, or use it in a `with`.
    Adapters are kept in `state_dir`; where none is named and the model's default one is in use by another
    server or LLM, in a temporary directory that goes with the object (of a process that was killed, with the
    next start of anything here).

    Raises ConfigError for a bad setting, EngineStartError where the model cannot be served, StateHeldError
    where another process holds the `state_dir` that is named.
    """

    def __init__(self, model: str | Path = "", **settings: Any) -> None:
        config = with_model(Config.from_settings({"model": str(model), **settings}).engine)
        path = model_path(config)
        self.text_model = TextModel.load(path)
        defaults = read_sampling_defaults(path) if config.generation_config == "auto" else {}
        self.default_sampling = SamplingParams(**defaults)
        """What prompts are answered with that come without `SamplingParams`: the model's own defaults."""
        self._private_dir: MeetingPlace | None = None
        try:
            lock = hold_state(config, "LLM")
        except StateHeldError as error:
            if config.state_dir:
                raise
            logger.warning("%s; this LLM keeps its adapters in a temporary one", str(error).partition(";")[0])
            self._private_dir = MeetingPlace.make("state")
            config = replace(config, state_dir=str(self._private_dir.path))
            lock = hold_state(config, "LLM")
        try:
            self._registry = open_registry(config, lock)
        except BaseException:
            if self._private_dir is not None:
                self._private_dir.close()
            raise
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="toppings-client", daemon=True)
        self._thread.start()
        try:
            self._registry.clean_up()
            self._client = self._run(EngineClient.start(config))
            self._checker = StructureChecker(self.text_model.special_tokens, self._client.info.vocab_size)
        except BaseException:
            self._stop()
            raise

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> AdapterRecord:
        """Register a PEFT checkpoint; one that is registered as it is stays. What is registered outlives an
        `LLM` where its state directory does.

        Raises AdapterExists where another one has the name, unless `replace`; AdapterError with the reason
        where it cannot be served.
        """
        previous = self._find(name)
        if previous is not None and not replace:
            if self._registry.is_of_content(previous, path):
                return previous
            raise AdapterExists(
                f"an adapter named {name!r} is registered already, from other files ({previous.path}); "
                "replace=True puts this one in its place"
            )
        record = self._registry.register(name, Path(path), replace=replace)
        if previous is not None and previous.adapter_id != record.adapter_id:
            self._remove(previous.adapter_id)
        return record

    def merge_adapters(self, name: str, merge: Merge, *, replace: bool = False) -> AdapterRecord:
        """Register the weighted sum of registered adapters. Raises as `load_adapter`, and AdapterNotFound for
        a part that is not registered."""
        previous = self._find(name)
        record = self._registry.merge(name, merge, replace=replace)
        if previous is not None:
            self._remove(previous.adapter_id)
        return record

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, when its requests have ended. Raises AdapterNotFound."""
        self._remove(self._registry.remove(name).adapter_id)

    def adapters(self) -> list[AdapterRecord]:
        return self._registry.list()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        cache_salt: str | None = None,
    ) -> list[Completion]:
        """One completion per prompt (text or token ids), in one batch. `adapter`: one for all or one each.
        With a `cache_salt`, what is computed is kept for prompts with the same salt only.

        Without `sampling`, the model's `generation_config.json` says how (`default_sampling`).

        Raises RequestError for a bad prompt or a value of the wrong type, AdapterNotFound for an unknown
        adapter.
        """
        all_prompts = as_prompts(prompts)
        num = len(all_prompts)
        is_each = not isinstance(adapter, str | None) and is_list(adapter)
        adapters = list(cast(Sequence[str | None], adapter)) if is_each else [cast(str | None, adapter)] * num
        if len(adapters) != num:
            raise RequestError(f"{len(adapters)} adapters for {num} prompts; give one for all or one each")
        sampling = self.default_sampling if sampling is None else sampling
        requests = [(p, sampling, a, cache_salt) for p, a in zip(all_prompts, adapters, strict=True)]
        return self._run(self._generate_all(requests))

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        adapter: str | Sequence[str | None] | None = None,
        pooling: Pooling = Pooling.LAST,
    ) -> list[list[float]]:
        """An embedding of length 1 for each prompt: its pooled final hidden states. Raises as `generate`."""
        found = self.generate(prompts, SamplingParams(max_tokens=0, pooling=pooling), adapter=adapter)
        return [completion.embedding or [] for completion in found]

    async def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[TextOutput, None]:
        """Text as it is made; closing the generator early aborts the request. Raises as `generate`."""
        here = asyncio.get_running_loop()
        outputs: asyncio.Queue[TextOutput | BaseException | None] = asyncio.Queue()

        async def pump() -> None:
            last: BaseException | None = EngineDeadError("the LLM was closed")
            try:
                async with aclosing(
                    self._outputs(
                        prompt, self.default_sampling if sampling is None else sampling, adapter, cache_salt
                    )
                ) as source:
                    async for output in source:
                        here.call_soon_threadsafe(outputs.put_nowait, output)
                last = None
            except Exception as error:
                last = error
            finally:
                with suppress(RuntimeError):  # who asked may have gone with its loop
                    here.call_soon_threadsafe(outputs.put_nowait, last)

        self._check_open()
        task = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while (output := await outputs.get()) is not None:
                if isinstance(output, BaseException):
                    raise output
                yield output
        finally:
            task.cancel()

    def close(self) -> None:
        """End the engine, by force where it does not answer; requests under way are cut. A second call does
        nothing; calls that come later raise EngineDeadError."""
        if not self._loop.is_closed():
            self._run(self._finish())
            self._stop()

    async def _finish(self) -> None:
        """Calls that other threads wait for end before the loop does."""
        await self._client.shutdown(0.0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=LAST_CALLS_S)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _stop(self) -> None:
        self._registry.close()
        if self._private_dir is not None:
            self._private_dir.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _remove(self, adapter_id: int) -> None:
        self._run(self._client.remove_adapter(adapter_id))
        self._registry.purge(adapter_id)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            self._check_open()
            future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except BaseException:
            coroutine.close()
            raise
        while True:
            try:
                return future.result(LAST_CALLS_S)
            except TimeoutError:
                if future.done():
                    raise
                self._check_open()

    def _check_open(self) -> None:
        """Raises EngineDeadError where nobody would answer."""
        if not self._thread.is_alive():
            raise EngineDeadError("the LLM was closed")

    async def _generate_all(
        self, requests: list[tuple[Prompt, SamplingParams, str | None, str | None]]
    ) -> list[Completion]:
        return list(await asyncio.gather(*(self._complete(*request) for request in requests)))

    async def _complete(
        self, prompt: Prompt, sampling: SamplingParams, adapter: str | None, cache_salt: str | None
    ) -> Completion:
        completion, token_ids = Completion(), await self._token_ids(prompt, sampling, adapter)
        text = await self._text_of(adapter)
        async for output in self._outputs(token_ids, sampling, adapter, cache_salt):
            completion.append(output)
            if output.prompt_logprobs is not None:
                told = output.prompt_logprobs.tokens(token_ids[1:])
                completion.prompt_logprobs = [text.told(each) for each in told]
            if output.embedding is not None:
                completion.embedding = [*array("f", output.embedding)]
        return completion

    async def _text_of(self, adapter: str | None) -> TextModel:
        """Raises AdapterNotFound."""
        vocabulary = None if adapter is None else self._registry.get(adapter).vocabulary
        if vocabulary is None:
            return self.text_model
        return await asyncio.to_thread(self.text_model.of, vocabulary)

    async def _token_ids(self, prompt: Prompt, sampling: SamplingParams, adapter: str | None) -> list[int]:
        """Raises RequestError for a prompt that cannot be served, AdapterNotFound."""
        check_types(sampling, adapter)
        if isinstance(prompt, str):
            token_ids = (await self._text_of(adapter)).encode(prompt)
        else:
            token_ids = token_ids_of(prompt)
        most = self._client.info.max_model_len - min(1, sampling.max_tokens)
        if not 0 < len(token_ids) <= most:
            raise RequestError(f"the prompt has {len(token_ids)} tokens; between 1 and {most} can be served")
        return token_ids

    async def _outputs(
        self, prompt: Prompt, sampling: SamplingParams, adapter: str | None, cache_salt: str | None
    ) -> AsyncGenerator[TextOutput, None]:
        token_ids = await self._token_ids(prompt, sampling, adapter)
        record = None if adapter is None else self._registry.get(adapter)
        adapter_id, own = (None, None) if record is None else (record.adapter_id, record.vocabulary)
        if sampling.structure is not None:
            structure = await self._checker.checked(sampling.structure, *own_names(own))
            sampling = replace(sampling, structure=structure)
        outputs = generate_text(
            self._client, await self._text_of(adapter), token_ids, sampling, adapter_id, cache_salt=cache_salt
        )
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    def _find(self, name: str) -> AdapterRecord | None:
        try:
            return self._registry.get(name)
        except AdapterNotFound:
            return None
