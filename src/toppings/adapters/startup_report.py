"""What became of the start-up options' adapters, and how an operator is told."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from toppings.adapters.errors import AdapterError
from toppings.adapters.records import AdapterRecord, Origin, Records
from toppings.bad_input import shown

logger = logging.getLogger(__name__)

MAX_NAMES = 5
MAX_REASON_CHARS = 2000


@dataclass
class DirectoryReport:
    """What `register_directory` did with `directory` ("": none); `failures` by name."""

    directory: str
    registered: Records = field(default_factory=list)
    removed: Records = field(default_factory=list)
    num_unchanged: int = 0
    failures: dict[str, AdapterError] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)  # adapters that did not come from start-up options
    doubts: list[str] = field(default_factory=list)

    def note(
        self,
        known: Mapping[str, AdapterRecord],
        kept: Records,
        doubt_of: Callable[[AdapterRecord], str | None],
    ) -> None:
        """`known`: what was registered before; `kept`: what of it stays as it is."""
        for record in self.registered:
            old = known.get(record.name)
            if old is not None and old.origin is not Origin.STARTUP:
                self.replaced.append(record.name)
        by_base: dict[str, list[AdapterRecord]] = defaultdict(list)
        for record in [*self.registered, *kept]:
            if doubt_of(record) is not None:
                by_base[record.trained_on].append(record)
        for trained_on, records in by_base.items():
            names = [record.name for record in records]
            base_model = records[0].base_model
            if len(names) == 1:
                self.doubts.append(str(doubt_of(records[0])))
            else:
                self.doubts.append(
                    f"{len(names)} adapters ({_some(names)}) say that they were trained on {trained_on!r}; "
                    f"the base model is {base_model!r}"
                )

    def log(self) -> None:
        for name, error in self.failures.items():
            logger.warning("adapter %s is left out: %s", shown(name), shown(str(error), MAX_REASON_CHARS))
        for name in self.replaced:
            logger.warning(
                "adapter %s, which was loaded while a server ran, gives way to the one in %s",
                name,
                self.directory,
            )
        for doubt in self.doubts:
            logger.warning("%s", doubt)
        if self.removed:
            names = _some([record.name for record in self.removed])
            where = f"in {self.directory}" if self.directory else "among the start-up options"
            logger.info("%d adapters are no longer %s and were removed: %s", len(self.removed), where, names)
        if self.directory and not (self.registered or self.num_unchanged or self.failures):
            logger.warning(
                "no adapters in %s: neither it nor a directory in it has an adapter_config.json",
                self.directory,
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
