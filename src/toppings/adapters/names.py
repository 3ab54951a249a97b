"""Names: which an adapter may have, and which of them mean the base model."""

import re
from collections.abc import Collection, Iterator

from toppings.adapters.errors import AdapterError, AdapterNameReserved
from toppings.bad_input import shown

BASE_ALIASES = ("__base_model__",)
"""By these a request may ask for the base model, besides its own name."""

_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff,]{1,256}")
_ROUTE_ENDS = ("pin", "prefetch")  # `/adapters/{name}/pin` could not be told from the adapter "{name}/pin"
_HUB_DIRECTORY = re.compile(r"models--(?:.+--)?(?P<name>.+?)")


def check_name(name: str, base_model: str) -> None:
    """Raises AdapterError for a name that would break lists, routes or headers, and AdapterNameReserved for
    one by which the base model is asked for, in whatever case."""
    if _NAME.fullmatch(name) is None or name != name.strip():
        raise AdapterError(
            f"adapter name {shown(name, 256)!r} is not allowed: 1 to 256 characters, no comma, no control "
            "characters, no blank at either end"
        )
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or (len(parts) > 1 and parts[-1] in _ROUTE_ENDS):
        raise AdapterError(
            f"adapter name {name!r} is not allowed: what slashes part must not be empty, '.' or '..', and "
            f"what follows the last one not {' or '.join(map(repr, _ROUTE_ENDS))}"
        )
    if name.casefold() in {each.casefold() for each in (base_model, *BASE_ALIASES)}:
        raise AdapterNameReserved(f"adapter name {name!r} is not allowed: it means the base model")


def is_same_base(trained_on: str, base_names: Collection[str]) -> bool:
    """Whether an adapter's `base_model_name_or_path` may mean a base model that goes by `base_names`.

    Hub ids and paths count by their last part, in any case. Nothing said is nothing contradicted.
    """
    known = {part for name in base_names for part in _last_parts(name)}
    claimed = set(_last_parts(trained_on))
    return not claimed or not known or bool(claimed & known)


def _last_parts(name: str) -> Iterator[str]:
    """The last part of a path or hub id; of a path into a hub's cache the model's, too."""
    parts = [part for part in name.strip().replace("\\", "/").split("/") if part not in ("", ".")]
    if parts:
        yield parts[-1].casefold()
    for part in parts:
        if (match := _HUB_DIRECTORY.fullmatch(part)) is not None:
            yield match["name"].casefold()
