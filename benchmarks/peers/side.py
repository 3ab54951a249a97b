"""What a side's script speaks with the benchmark. Imports nothing but the standard library: a peer runs in an
environment of its own.

The first argument is the job, in JSON. A line that the side writes says what it is; each line it reads is a
question, each that it writes then an answer, or `{"error": ...}`. It ends with its input.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Tokens = list[list[int]]
Answer = Callable[[Tokens, int, "Sequence[str] | None"], Tokens]
"""From prompts, the number of tokens of each answer, and each prompt's adapter (None: the base model) to the
answers: greedy, in one batch where the side can."""


class Side:
    """What libraries print goes to standard error, so that standard output is the benchmark's alone."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.job: dict[str, Any] = json.loads(sys.argv[1])

    def serve(self, answer: Answer, **told: Any) -> None:
        """Answers with the seconds that it took, and the tokens."""

        def timed(prompts: Tokens, num_tokens: int, adapters: Sequence[str] | None) -> dict[str, Any]:
            started_at = time.perf_counter()
            tokens = answer(prompts, num_tokens, adapters)
            elapsed = time.perf_counter() - started_at
            assert [len(each) for each in tokens] == [num_tokens] * len(prompts)
            return {"seconds": elapsed, "tokens": tokens}

        self.serve_any(timed, **told)

    def serve_any(self, answer: Callable[..., dict[str, Any]], **told: Any) -> None:
        self._say(told)
        for line in sys.stdin:
            try:
                self._say(answer(**json.loads(line)))
            except Exception as error:  # whatever a peer's library raises is told, and the others go on
                self._say({"error": f"{type(error).__name__}: {error}"})

    def _say(self, content: dict[str, Any]) -> None:
        self._out.write(json.dumps(content) + "\n")
        self._out.flush()
