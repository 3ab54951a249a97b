"""Structures compiled for a model's vocabulary, once each, beside whoever asks."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llguidance

from toppings.grammar import StructureError
from toppings.sampling_params import MAX_STRUCTURE_CHARS, Structure
from toppings.sandbox.grammars import matcher_of

TOKENIZER_FILE = "tokenizer.json"
MAX_KEPT = 64
MAX_KEPT_CHARS = 4 * MAX_STRUCTURE_CHARS
MAX_TABLES = 8
"""Of adapters' vocabularies, which take some ten megabytes each."""


@dataclass(frozen=True)
class OwnTokens:
    """What an adapter's vocabulary has beside the base model's: `added`, entries of tokenizer.json's list of
    added tokens, as JSON; `vocab_size` and `end_token_ids` with the base model's."""

    vocab_size: int
    end_token_ids: tuple[int, ...]
    added: str = "[]"


def load_vocabulary(
    path: Path, vocab_size: int, eos_token_ids: Sequence[int], own: OwnTokens | None = None
) -> Any:
    """What the library knows of the tokens of the checkpoint in `path`, or of an adapter of it.

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
        if own is not None:
            fields = json.loads(text)
            fields["added_tokens"] = [*fields.get("added_tokens", []), *json.loads(own.added)]
            text = json.dumps(fields)
            vocab_size, eos_token_ids = own.vocab_size, own.end_token_ids
        return llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except BaseException as error:  # a panic in the library is no Exception
        raise StructureError(f"structured output cannot use the model's {TOKENIZER_FILE}: {error}") from error


class Compiler:
    """For one thread; the work is done in another. Where the vocabulary cannot be had, every structure is
    told why."""

    def __init__(self, path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._thread = ThreadPoolExecutor(1, "toppings-grammar")
        self._parts = path, vocab_size, tuple(eos_token_ids)
        self._tables: OrderedDict[OwnTokens | None, Future[Any]] = OrderedDict()
        self._kept: OrderedDict[tuple[Structure, OwnTokens | None], Future[Any]] = OrderedDict()

    def load(self, own: OwnTokens | None = None) -> "Future[Any]":
        """The vocabulary, read once: of 50,000 tokens in a third of a second, in which nothing else of Python
        runs."""
        if own not in self._tables:
            self._tables[own] = self._thread.submit(load_vocabulary, *self._parts, own)
            if len(self._tables) > 1 + MAX_TABLES:
                del self._tables[next(each for each in self._tables if each is not None)]
        self._tables.move_to_end(own)
        return self._tables[own]

    def compile(self, structure: Structure, own: OwnTokens | None = None) -> "Future[Any]":
        """A matcher at its start, to be copied. It raises StructureError where the structure cannot be
        followed."""
        key = structure, own
        if (kept := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return kept
        matcher = self._kept[key] = self._thread.submit(self._matcher, self.load(own), structure)
        num_chars = sum(len(each.text) for each, _ in self._kept)
        while len(self._kept) > MAX_KEPT or (num_chars > MAX_KEPT_CHARS and len(self._kept) > 1):
            num_chars -= len(self._kept.popitem(last=False)[0][0].text)
        return matcher

    def _matcher(self, loaded: "Future[Any]", structure: Structure) -> Any:
        vocabulary = loaded.result()  # it was there before, in this very thread
        try:
            return matcher_of(vocabulary, structure.kind, structure.text)
        except BaseException as error:  # a panic in the library is no Exception
            raise StructureError(f"the {structure.kind} cannot be followed: {error}") from error

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
