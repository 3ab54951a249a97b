"""Non-negative least squares, for costs of which none can be below zero."""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def fit_non_negative(columns: FloatArray, target: FloatArray) -> FloatArray:
    """The x [F], all at least 0, that makes |columns x - target| least; `columns` [N, F], `target` [N].

    Of the unconstrained solutions over subsets of the columns, the best that happens to be non-negative,
    which is the exact optimum (all are tried: for some eight columns).
    """
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-12)  # token counts dwarf a constant column
    best, least = np.zeros(columns.shape[1]), float(target @ target)
    for size in range(columns.shape[1], 0, -1):
        for subset in map(list, combinations(range(columns.shape[1]), size)):
            solution = np.linalg.lstsq(columns[:, subset] / scale[subset], target, rcond=None)[0]
            if (solution < 0).any():
                continue
            found = np.zeros(len(best))
            found[subset] = solution / scale[subset]
            residual = target - columns @ found
            if residual @ residual < least:
                best, least = found, float(residual @ residual)
    return best
