"""Which files of a base model are fetched: never code, never a pickle."""

import json
import re
from pathlib import Path

from toppings.sources.fetch import FetchError

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TEXTS = (
    *(CONFIG, INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
    "chat_template.jinja",
)
MAX_INDEX_BYTES = 64 << 20
_SHARD = re.compile(r"[\w.-]+\.safetensors")


def weights_of(directory: Path, where: str) -> list[str]:
    """The files of weights that the index in `directory` names, else the single one, whatever else lies
    beside them. Raises FetchError, with `where` for the place, where the index is none."""
    if not (directory / INDEX).is_file():
        return [SINGLE]
    with (directory / INDEX).open("rb") as stream:
        text = stream.read(MAX_INDEX_BYTES + 1)
    try:
        if len(text) > MAX_INDEX_BYTES:
            raise ValueError(f"it is larger than {MAX_INDEX_BYTES} bytes")
        shards = sorted({str(name) for name in json.loads(text)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FetchError(f"{where}/{INDEX} is no index of weights: {error}") from error
    if bad := [name for name in shards if not _SHARD.fullmatch(name)]:
        raise FetchError(f"{where}/{INDEX} names {bad[0]!r}, which is no safetensors file beside it")
    return shards
