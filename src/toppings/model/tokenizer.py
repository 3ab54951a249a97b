"""A checkpoint's tokeniser, as transformers' AutoTokenizer gives it."""

from collections.abc import Iterable
from copy import deepcopy
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from toppings.model.remembered import remembered

FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")
"""What AutoTokenizer chooses a class by, together with the names of the files that there are."""
LIBRARY = "transformers."


def load_tokenizer(path: Path) -> Any:
    """Of local files only. Which class reads them is remembered: AutoTokenizer imports torch and more to find
    that out. Raises what the library and its parsers do."""
    found: list[Any] = []

    def choose() -> dict[str, Any]:
        from transformers import AutoTokenizer

        found.append(AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False))
        return {"module": type(found[0]).__module__, "name": type(found[0]).__name__}

    chosen = remembered("tokenizer", path, FILES, choose, *sorted(file.name for file in path.iterdir()))
    if not (found or str(chosen.get("module")).startswith(LIBRARY)):  # it is a file that anything may damage
        choose()
    if found:
        return found[0]
    reader = getattr(import_module(chosen["module"]), chosen["name"])
    return reader.from_pretrained(path, local_files_only=True)


def with_tokens(tokenizer: Any, tokens: Iterable[Any], names: Iterable[tuple[str, str]]) -> Any:
    """A copy that has `tokens` besides (by id; each with the fields that the tokenizers library gives one,
    and its id), and calls special ones by `names` (`eos_token`).

    Raises ValueError where a token would have another id than its own, or a name means no token.
    """
    from tokenizers import AddedToken

    own, options = deepcopy(tokenizer), ("single_word", "lstrip", "rstrip", "normalized")
    tokens = list(tokens)
    for is_special, some in groupby(tokens, key=lambda token: token.special):
        added = [AddedToken(each.content, **{name: getattr(each, name) for name in options}) for each in some]
        own.add_tokens(added, special_tokens=is_special)
    for token in tokens:
        if (found := own.convert_tokens_to_ids(token.content)) != token.id:
            raise ValueError(f"token {token.content[:40]!r} would have id {found} here, not {token.id}")
    for name, text in names:
        if own.convert_tokens_to_ids(text) in (None, own.unk_token_id) and text != own.unk_token:
            raise ValueError(f"{name} is {text[:40]!r}, which is none of its tokens")
        setattr(own, name, text)
    return own
