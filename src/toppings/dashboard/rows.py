"""Sections that servers and routers have in common: the busiest rows, and how many more there are."""

from collections import Counter
from heapq import nlargest
from typing import Any

MAX_ROWS = 50


def queue_section(waiting: Counter[tuple[str, str]], running: Counter[tuple[str, str]]) -> dict[str, Any]:
    """`waiting` and `running` by tenant and model. Told as well: each tenant's sum."""
    keys = waiting.keys() | running.keys()
    rows = nlargest(MAX_ROWS, keys, key=lambda key: (waiting[key], running[key], key))
    tenants: Counter[str] = Counter()
    for (tenant, _), number in (waiting + running).items():
        tenants[tenant] += number
    return {
        "rows": [
            {"tenant": key[0], "model": key[1], "waiting": waiting[key], "running": running[key]}
            for key in rows
        ],
        "num_more": len(keys) - len(rows),
        "tenants": dict(tenants.most_common(MAX_ROWS)),
    }
