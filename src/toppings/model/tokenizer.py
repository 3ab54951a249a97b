"""A checkpoint's tokeniser, as transformers' AutoTokenizer gives it."""

from importlib import import_module
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
