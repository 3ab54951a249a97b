"""Our own CSV: arrival_s, adapter, rank, prompt_tokens, response_tokens, and where requests are of tenants,
tenant and weight; one request a row, in any order."""

from pathlib import Path

import numpy as np

from toppings.sim.assign import TraceOptions, windowed
from toppings.sim.readers.base import (
    Array,
    Codes,
    Converter,
    TraceFormat,
    header_is,
    number,
    read_columns,
    whole,
)
from toppings.sim.trace import COLUMNS, TENANT_COLUMNS, Tenants, Trace, TraceError


def _read(path: Path, options: TraceOptions) -> Trace:
    """Adapters and lengths are the file's own; of the options, the window and the rate apply.

    The trace lasts until its last arrival.
    """
    codes, owners = Codes(), Codes()
    kinds: tuple[Converter, ...] = (number, codes, whole, whole, whole)
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        head = {name.strip() for name in file.readline().split(",")}
    extra: dict[str, Converter] = dict(zip(TENANT_COLUMNS, (owners, number)))
    known = {name: kind for name, kind in extra.items() if name in head}
    columns = read_columns(path, {**dict(zip(COLUMNS, kinds)), **known})
    for name in ("rank", "prompt_tokens", "response_tokens"):
        _refuse(path, columns[name] < 1, f"{name} is 0; it must be at least 1")
    adapters, ranks = columns["adapter"], np.zeros(len(codes.numbers), dtype=np.int32)
    ranks[adapters[::-1]] = columns["rank"][::-1]  # the first of each stays
    _refuse(path, ranks[adapters] != columns["rank"], "the adapter has another rank than in its first row")
    order = np.argsort(columns["arrival_s"], kind="stable")
    arrivals_s = columns["arrival_s"][order]
    trace = Trace(
        arrivals_s,
        adapters[order],
        columns["prompt_tokens"][order].astype(np.int32),
        columns["response_tokens"][order].astype(np.int32),
        ranks,
        duration_s=max(float(arrivals_s[-1]), 1e-9),
        origin=path.name,
        names=tuple(codes.numbers),
        tenants=_tenants(path, columns, owners, order) if "tenant" in columns else None,
    )
    return windowed(trace, options)


def _tenants(path: Path, columns: dict[str, Array], owners: Codes, order: Array) -> Tenants:
    indices = columns["tenant"]
    given = columns.get("weight", np.ones(len(indices)))
    _refuse(path, given <= 0, "weight is 0; it must be above 0")
    weights = np.ones(len(owners.numbers))
    weights[indices[::-1]] = given[::-1]  # the first of each stays
    _refuse(path, weights[indices] != given, "the tenant has another weight than in its first row")
    return Tenants(indices[order], tuple(owners.numbers), weights.tolist())


def _refuse(path: Path, is_bad: Array, reason: str) -> None:
    if is_bad.any():
        raise TraceError(f"{path}:{int(is_bad.argmax()) + 2}: {reason}")


FORMAT = TraceFormat(header_is(*COLUMNS), _read)
