"""What a run of these benchmarks ends in: one JSON line, with aims that were met or missed."""

import json
from pathlib import Path
from typing import Any


def aim(name: str, value: float, limit: float) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": f"<= {limit:g}", "is_met": value <= limit}


def finish(result: dict[str, Any], path: Path | None) -> int:
    """Prints and writes `result`; the exit code: 1 where an aim was missed."""
    for each in result["aims"]:
        print(f"{'met   ' if each['is_met'] else 'MISSED'} {each['name']}: {each['value']:g} {each['limit']}")
    write(result, path)
    print(json.dumps(result))
    return int(not all(each["is_met"] for each in result["aims"]))


def write(result: dict[str, Any], path: Path | None) -> None:
    """Whole or not at all: a run may be ended while it writes what it has so far."""
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(path)
