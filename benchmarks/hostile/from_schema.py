"""Requests that schemathesis draws from an OpenAPI document: such as fit it, and such as do not."""

from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from hostile.shots import Shot


def draw_from_schema(document: dict[str, Any], base_url: str, count: int, *, number: int = 0) -> list[Shot]:
    """About `count` requests over all operations of `document`, or as many of them; `number` is the seed."""
    operations = [each.ok() for each in schemathesis.openapi.from_dict(document).get_all_operations()]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    kinds = [(operation, mode) for operation in operations for mode in modes]
    each, stride = max(1, count // len(kinds)), max(1, len(kinds) // max(1, count))
    return [shot for kind in kinds[::stride] for shot in _draw(*kind, base_url, each, number)]


def _draw(operation: Any, mode: GenerationMode, base_url: str, count: int, number: int) -> list[Shot]:
    shots: list[Shot] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def draw(case: Any) -> None:
        prepared = requests.Request(**case.as_transport_kwargs(base_url=base_url)).prepare()
        prepared.headers["Connection"] = "close"
        prepared.headers["Host"] = "127.0.0.1"
        body = prepared.body or b""
        if isinstance(body, str):
            body = body.encode()
        lines = [f"{prepared.method} {prepared.path_url} HTTP/1.1"]
        lines += [f"{name}: {_text(value)}" for name, value in prepared.headers.items()]
        wire = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body
        shots.append(
            Shot(f"{mode.value} {case.method} {prepared.path_url[:60]} {body[:150]!r}", lambda: wire)
        )

    try:
        draw()
    except Exception as error:  # an operation that has nothing to vary has no requests that do not fit
        if "Unsatisfiable" not in type(error).__name__:
            raise
    return shots


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
