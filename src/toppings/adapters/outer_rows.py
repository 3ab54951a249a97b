"""A weight of an end of the model, a row for each token, as an adapter has it beside the base model's."""

from collections.abc import Callable, Sequence

import torch

ROWS_AT_ONCE = 4096


def own_rows(
    weight: torch.Tensor | None,
    trained: tuple[Sequence[int], torch.Tensor] | None,
    base: Callable[[], torch.Tensor],
    *,
    is_copy: bool,
) -> dict[str, torch.Tensor]:
    """By extra (`layout.py`): `ids` and `rows` of what differs from the base model's weight, ids ascending,
    to be searched; the whole `weight` where that is most of its rows.

    `weight` [tokens, hidden] stands for all of the base model's, and `trained` (ids, rows) for some rows of
    either. `base`: the base model's, fp32, rounded as it is served. `is_copy`: as `_changed_rows`.
    """
    ids, rows = (torch.tensor(trained[0], dtype=torch.int64), trained[1]) if trained else (None, None)
    if weight is not None:
        if ids is not None and rows is not None:
            weight = weight.index_copy(0, ids, rows.to(weight.dtype))
        ids = _changed_rows(weight, base(), is_copy=is_copy)
        if 2 * len(ids) > len(weight):
            return {"weight": weight}
        rows = weight[ids]
    if ids is None or rows is None or not len(ids):
        return {}
    ids, order = ids.int().sort()
    return {"ids": ids, "rows": rows[order]}


def _changed_rows(weight: torch.Tensor, base: torch.Tensor, *, is_copy: bool) -> torch.Tensor:
    """int64, ascending: rows of `weight` that are not the base model's; those that it has not are among them.

    `is_copy`: it was saved beside what was trained, and what is lost where that was in a narrower type is no
    change.
    """
    changed = torch.ones(len(weight), dtype=torch.bool)
    for start in range(0, len(base), ROWS_AT_ONCE):
        theirs = base[start : start + ROWS_AT_ONCE]
        ours = weight[start : start + len(theirs)].float()
        is_same = torch.isclose(ours, theirs, rtol=2**-7 if is_copy else 0.0, atol=0)
        changed[start : start + len(theirs)] = ~is_same.all(1)
    return changed.nonzero()[:, 0]
