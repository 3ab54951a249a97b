"""Which directories adapters may be loaded from over HTTP."""

from pathlib import Path

from toppings.server.errors import ApiError
from toppings.sources.adapters import HUB
from toppings.sources.hub import split_id
from toppings.sources.remote import SCHEMES, scheme_of


class AdapterRoots:
    """Adapters are read only below these directories, with every symbolic link followed first."""

    def __init__(self, roots: list[Path]) -> None:
        self._roots = list(dict.fromkeys(root.resolve() for root in roots))

    @property
    def directories(self) -> list[Path]:
        """Links in an adapter's directory may not lead out of these either."""
        return self._roots

    def locate(self, name: str, path: str, *, tells_roots: bool = True) -> Path:
        """The directory that `path` means; a relative one is looked for below each root in turn.
        `tells_roots`: what is wrong is told with the roots.

        Raises ApiError: 403 for a path outside the roots, whether it exists or not; 404 for one inside that
        does not exist; 400 for a text that is no path.
        """
        if "\0" in path:
            raise ApiError(400, "lora_path holds a null character", "InvalidUserInput", "lora_path")
        candidates = [self._resolve(root / path) for root in self._roots]
        allowed = [candidate for candidate in candidates if self._is_below(candidate)]
        if not allowed:
            raise ApiError(403, self._refusal(path, tells_roots), "PermissionDeniedError", "lora_path")
        for candidate in allowed:
            try:
                if candidate.is_dir():
                    return candidate
            except OSError as error:  # it lies in a directory that may not be entered
                message = f"Loading lora {name} failed: cannot read {path}: {error.strerror}"
                raise ApiError(400, message, "InvalidUserInput", "lora_path") from error
        message = f"Loading lora {name} failed: No adapter found for {path}"
        looked = f"; looked below {self._told_roots()}" if tells_roots else ""
        raise ApiError(404, message + looked, "NotFoundError")

    def _is_below(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)

    def _refusal(self, path: str, tells_roots: bool) -> str:
        if not self._roots:
            return "no adapters may be loaded over HTTP: the server has no adapter_roots"
        roots = f": {self._told_roots()}" if tells_roots else ""
        return f"{path} is not below the server's adapter roots{roots}"

    def _told_roots(self) -> str:
        return ", ".join(map(str, self._roots))

    @staticmethod
    def _resolve(path: Path) -> Path:
        try:
            return path.resolve()
        except (OSError, RuntimeError) as error:  # a loop of links
            raise ApiError(400, f"{path} is no usable path", "InvalidUserInput", "lora_path") from error


def not_configured(place: str) -> str | None:
    """What is wrong with `place`, which no configured source allows, and what to do; None where it is no
    source's kind of place, but a path."""
    scheme = scheme_of(place)
    if place.startswith(f"{HUB}:"):
        parts = split_id(place.removeprefix(f"{HUB}:"))
        if parts is None:
            return f"{place} is no repository of a hub; write hub:org/name or hub:org/name@revision"
        source = f"{HUB}:{parts[0].partition('/')[0]}/*"
    elif scheme in SCHEMES:
        source = place.rstrip("/").rpartition("/")[0]
        if not scheme_of(source):
            return f"{place} names no adapter; write e.g. {scheme}://bucket/loras/name"
    elif scheme:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        return f"{place} is no place of a source; one begins with {HUB}:, {known}"
    else:
        return None
    return f"no configured source allows {place}; start the server with --adapter-source {source!r}"
