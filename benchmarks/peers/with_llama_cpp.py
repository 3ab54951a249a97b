"""llama.cpp as a side of the comparison; runs in the environment that has llama-cpp-python.

Requests of one batch are sequences of one context, which llama.cpp decodes together; it has one set of
adapters for all of them, so requests with different ones are answered one after the other.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as llama  # type: ignore[import-not-found,unused-ignore]
import numpy as np

from peers.isa import AVX2, VARIABLE
from peers.side import Side, Tokens

MAX_LEN = 1024


class Context:
    def __init__(self, model: Any, num_sequences: int) -> None:
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = MAX_LEN * num_sequences, num_sequences
        settings.n_batch = MAX_LEN * num_sequences
        settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
        self._context = llama.llama_init_from_model(model, settings)
        self._batch = llama.llama_batch_init(settings.n_batch, 0, 1)
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def use(self, adapter: Any | None) -> None:
        adapters = [] if adapter is None else [adapter]
        handles = (llama.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
        scales = (ctypes.c_float * len(adapters))(*(1.0 for _ in adapters))
        if llama.llama_set_adapters_lora(self._context, handles, len(adapters), scales):
            raise RuntimeError("llama.cpp does not take the adapter")

    def generate(self, prompts: Tokens, num_tokens: int) -> Tokens:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        answers: Tokens = [[] for _ in prompts]
        rows, starts = prompts, [0] * len(prompts)
        for _ in range(num_tokens):
            drawn = self._step(rows, starts)
            starts = [start + len(row) for start, row in zip(starts, rows)]
            for each, token in zip(answers, drawn):
                each.append(token)
            rows = [[token] for token in drawn]
        return answers

    def _step(self, rows: Tokens, starts: list[int]) -> list[int]:
        """The likeliest token after each sequence's new tokens, whose places begin at `starts`."""
        batch, at, lasts = self._batch, 0, []
        for sequence, (row, start) in enumerate(zip(rows, starts)):
            for i, token in enumerate(row):
                batch.token[at], batch.pos[at] = token, start + i
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = i == len(row) - 1
                at += 1
            lasts.append(at - 1)
        batch.n_tokens = at
        if code := llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode ended with {code}")
        shape = (self._vocab_size,)
        logits = (llama.llama_get_logits_ith(self._context, last) for last in lasts)
        return [int(np.ctypeslib.as_array(each, shape).argmax()) for each in logits]


def main() -> None:
    side = Side()
    job = side.job
    llama.llama_backend_init()
    features = llama.llama_print_system_info().decode()
    if os.environ[VARIABLE] == AVX2 and "AVX512 = 1" in features:
        raise SystemExit("this build of llama.cpp uses AVX-512; name one that was built with GGML_NATIVE=OFF")
    model = llama.llama_model_load_from_file(job["model"].encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not load {job['model']}")
    loaded = {
        Path(path).stem: llama.llama_adapter_lora_init(model, path.encode()) for path in job["adapters"]
    }
    if not all(loaded.values()):
        raise SystemExit("llama.cpp does not load the adapters")
    context = Context(model, job["num_requests"])

    def answer(prompts: Tokens, num_tokens: int, adapters: Sequence[str] | None) -> Tokens:
        if adapters is None:
            context.use(None)
            return context.generate(prompts, num_tokens)
        answers = []
        for prompt, name in zip(prompts, adapters):
            context.use(loaded[name])
            answers += context.generate([prompt], num_tokens)
        return answers

    side.serve(answer, version=llama.__version__, features=features.strip())


if __name__ == "__main__":
    main()
