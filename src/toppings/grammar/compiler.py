"""Structures compiled for a model's vocabulary, once each, beside whoever asks."""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import llguidance

from toppings.grammar import StructureError
from toppings.sampling_params import MAX_STRUCTURE_CHARS, Structure
from toppings.sandbox.grammars import matcher_of

TOKENIZER_FILE = "tokenizer.json"
MAX_KEPT = 64
MAX_KEPT_CHARS = 4 * MAX_STRUCTURE_CHARS


def load_vocabulary(path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> Any:
    """What the library knows of the tokens of the checkpoint in `path`.

    Raises StructureError where the checkpoint says too little.
    """
    if not eos_token_ids:
        raise StructureError(
            "structured output needs an end-of-sequence token; the model's config.json names none"
        )
    try:
        text = (path / TOKENIZER_FILE).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StructureError(f"structured output needs the model's {TOKENIZER_FILE}: {error}") from error
    try:
        return llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except BaseException as error:  # a panic in the library is no Exception
        raise StructureError(f"structured output cannot use the model's {TOKENIZER_FILE}: {error}") from error


class Compiler:
    """For one thread; the work is done in another. Where the vocabulary cannot be had, every structure is
    told why."""

    def __init__(self, path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self._thread = ThreadPoolExecutor(1, "toppings-grammar")
        self._load = partial(load_vocabulary, path, vocab_size, eos_token_ids)
        self._vocabulary: Future[Any] | None = None
        self._kept: OrderedDict[Structure, Future[Any]] = OrderedDict()

    def load(self) -> "Future[Any]":
        """The vocabulary, read once: of 50,000 tokens in a third of a second, in which nothing else of Python
        runs."""
        if self._vocabulary is None:
            self._vocabulary = self._thread.submit(self._load)
        return self._vocabulary

    def compile(self, structure: Structure) -> "Future[Any]":
        """A matcher at its start, to be copied. It raises StructureError where the structure cannot be
        followed."""
        if (kept := self._kept.get(structure)) is not None:
            self._kept.move_to_end(structure)
            return kept
        matcher = self._kept[structure] = self._thread.submit(self._matcher, self.load(), structure)
        num_chars = sum(len(each.text) for each in self._kept)
        while len(self._kept) > MAX_KEPT or (num_chars > MAX_KEPT_CHARS and len(self._kept) > 1):
            num_chars -= len(self._kept.popitem(last=False)[0].text)
        return matcher

    def _matcher(self, loaded: "Future[Any]", structure: Structure) -> Any:
        vocabulary = loaded.result()  # it was there before, in this very thread
        try:
            return matcher_of(vocabulary, structure.kind, structure.text)
        except BaseException as error:  # a panic in the library is no Exception
            raise StructureError(f"the {structure.kind} cannot be followed: {error}") from error

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
