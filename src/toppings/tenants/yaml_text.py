"""YAML of any length as plain values, event by event. PyYAML's own way makes objects of every word, which the
collection of garbage looks through again and again, and holds up all other threads until it has the last one.

Beside what PyYAML's safe loader refuses, a key that stands twice in a mapping is refused: the first would
be there for nothing.
"""

from typing import Any

import yaml

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_TEXT, _MERGE = f"{_TAG}str", f"{_TAG}merge"


def load_yaml(text: str) -> Any:
    """The one document of `text`, None where it has none.

    Raises yaml.YAMLError, ValueError or RecursionError where it is no YAML.
    """
    loader = _Base(text)
    try:
        return _Document(loader).read()
    finally:
        loader.dispose()


class _Document:
    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._anchors: dict[str, Any] = {}

    def read(self) -> Any:
        self._next()  # of the stream
        loaded = None
        if not isinstance(self._next(), yaml.StreamEndEvent):
            loaded = self._value(self._next())
            self._next()  # the document's end
            if not isinstance(end := self._next(), yaml.StreamEndEvent):
                raise _error(end, "another document begins; there must be one")
        return loaded

    def _next(self) -> Any:
        return self._loader.get_event()

    def _value(self, event: Any) -> Any:
        if isinstance(event, yaml.ScalarEvent):
            return self._keep(event, self._scalar(event, self._tag_of(event)))
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise _error(event, f"there is no &{event.anchor} before it")
            return self._anchors[event.anchor]
        kind = "map" if isinstance(event, yaml.MappingStartEvent) else "seq"
        if event.tag not in (None, "!", f"{_TAG}{kind}"):
            raise _error(event, f"unknown tag {event.tag!r}")
        if kind == "map":
            mapping: dict[Any, Any] = self._keep(event, {})
            self._fill(mapping)
            return mapping
        items: list[Any] = self._keep(event, [])
        while not isinstance(item := self._next(), yaml.SequenceEndEvent):
            items.append(self._value(item))
        return items

    def _fill(self, mapping: dict[Any, Any]) -> None:
        merged: list[dict[Any, Any]] = []
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            is_scalar = isinstance(event, yaml.ScalarEvent)
            if is_scalar and self._tag_of(event) == _MERGE:
                merged += self._merged(self._next())
                continue
            key = self._value(event)
            if isinstance(key, dict | list):
                raise _error(event, "a mapping or list can be no key")
            if key in mapping:
                raise _error(event, f"{key!r} stands there twice, the second time")
            mapping[key] = self._value(self._next())
        for each in merged:
            for key, value in each.items():
                mapping.setdefault(key, value)

    def _merged(self, event: Any) -> list[dict[Any, Any]]:
        value = self._value(event)
        each = value if isinstance(value, list) else [value]
        if not all(isinstance(one, dict) for one in each):
            raise _error(event, "`<<` takes a mapping, or a list of them")
        return each

    def _keep(self, event: Any, value: Any) -> Any:
        if event.anchor is not None:
            self._anchors[event.anchor] = value
        return value

    def _tag_of(self, event: Any) -> str:
        if event.tag not in (None, "!"):
            return str(event.tag)
        if not event.implicit[0]:  # in quotes
            return _TEXT
        return str(self._loader.resolve(yaml.ScalarNode, event.value, event.implicit))

    def _scalar(self, event: Any, tag: str) -> Any:
        if tag == _TEXT:
            return event.value
        return self._loader.construct_object(
            yaml.ScalarNode(tag, event.value, event.start_mark, event.end_mark), deep=True
        )


def _error(event: Any, problem: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"{problem} in line {event.start_mark.line + 1}")
