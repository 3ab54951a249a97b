"""An adapter's own vocabulary: tokens that it adds to the base model's, and where its answers end.

Its weights have rows for tokens beyond the base model's (`outer_plan.py`), its tokeniser names tokens that
the base model's does not have, or both: a base model often has rows to spare. Only its own requests read and
draw such tokens.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from toppings.adapters.base_weights import BaseWeights
from toppings.adapters.errors import AdapterError
from toppings.adapters.text_files import MAX_NAMED, AddedToken, TextFiles
from toppings.model.tokenizer import with_tokens


@dataclass(frozen=True)
class Vocabulary:
    """`size`: its tokens, 0 where they are as many as the base model's; `tokens`: those that its tokeniser
    adds, by id; `names`: special tokens by their names (`eos_token`), where they are others than the base
    model's; `end_token_ids`: those that end its answers, beside the base model's."""

    size: int = 0
    tokens: tuple[AddedToken, ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    end_token_ids: tuple[int, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Vocabulary":
        fields = json.loads(text)
        tokens = tuple(AddedToken(**each) for each in fields["tokens"])
        names = tuple((name, token) for name, token in fields["names"])
        return cls(fields["size"], tokens, names, tuple(fields["end_token_ids"]))


def own_names(vocabulary: Vocabulary | None) -> tuple[tuple[str, ...], int]:
    """What grammars may name besides: special tokens, and ids below `size`, as `StructureChecker.checked`
    takes them."""
    if vocabulary is None:
        return (), 0
    return tuple(token.content for token in vocabulary.tokens if token.special), vocabulary.size


def own_vocabulary(text: TextFiles, size: int, base: BaseWeights) -> tuple[Vocabulary | None, list[str]]:
    """Of an adapter whose weights have rows for `size` tokens (0: for the base model's), and warnings; None
    where it has the base model's vocabulary.

    Raises AdapterError where there are rows for tokens that its tokeniser has under other ids.
    """
    warnings, known = [], base.text.added_tokens
    moved = [each for each in text.added_tokens.values() if known.get(each.content, each).id != each.id]
    new = [each for each in text.added_tokens.values() if each.content not in known]
    if new:
        num_rows = size or base.vocab_size
        moved += [each for each in new if not 0 <= each.id < num_rows]
        new = [each for each in new if 0 <= each.id < num_rows]
    if moved:
        warnings.append(
            f"its tokeniser has {len(moved)} tokens under ids that the base model's or its weights do not "
            f"have so: {_named(moved)}; they are not used"
        )
    names = {name: token for name, token in text.names.items() if base.text.names.get(name) != token}
    if new or names:
        try:
            new, names, ends = _tried(base, new, names)
        except ValueError as error:
            if size:
                raise AdapterError(f"its tokeniser cannot be used: {error}") from error
            warnings.append(f"its tokeniser is not used: {error}")
            new, names, ends = [], {}, ()
    else:
        ends = ()
    if size and not new:
        warnings.append(
            f"its weights have {size} tokens, {size - base.vocab_size} more than the base model's, and no "
            "tokeniser beside them says what these are: they have no text"
        )
    found = Vocabulary(size, tuple(sorted(new, key=lambda each: each.id)), tuple(names.items()), ends)
    return (None if found == Vocabulary() else found), warnings


def _tried(
    base: BaseWeights, new: list[AddedToken], names: dict[str, str]
) -> tuple[list[AddedToken], dict[str, str], tuple[int, ...]]:
    """What differs from the base model's tokeniser, and the tokens that end an answer. Raises ValueError."""
    theirs = base.tokenizer
    new = [each for each in new if theirs.convert_tokens_to_ids(each.content) != each.id]
    names = {name: token for name, token in names.items() if getattr(theirs, name, None) != token}
    own = with_tokens(theirs, sorted(new, key=lambda each: each.id), names.items())
    ends = (own.eos_token_id,) if "eos_token" in names else ()
    return new, names, ends


def _named(tokens: Iterable[AddedToken]) -> str:
    return ", ".join(f"{each.content[:40]!r} (id {each.id})" for each in list(tokens)[:MAX_NAMED])
