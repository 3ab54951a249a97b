"""A Triton kernel that draws from a row of probabilities cut by top-k, min-p and top-p without sorting it:
for the few rows whose kept tokens are not certainly among the likeliest ones.

`truncation.cut` and `sampling.choose` say what is drawn: tokens stand in the order of their probabilities,
descending, equals by their ids. Probabilities are added up in fixed point (40 bits), so that sums do not
depend on the order. Three things are found by bisection over the bits of fp32, which are in the order of the
numbers: the k-th probability, the last one that top-p keeps, and the one that is drawn. Each takes up to 31
passes over the row, out of the L2 cache; a row that is `certain` takes none.

Checked with Triton's interpreter; not yet run on a GPU.
"""

import triton
import triton.language as tl
from torch import Tensor

from toppings.ops.gpu_launch import kernel

_BLOCK = 4096
_SMALL_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _at_least(probs, num_tokens, least, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(Sum in fixed point, number) of the probabilities whose bits are at least `least`."""
    mass = tl.zeros([BLOCK], tl.int64)
    count = tl.zeros([BLOCK], tl.int64)
    bound = least.to(tl.float32, bitcast=True)
    for start in range(0, num_tokens, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(probs + columns, mask=columns < num_tokens, other=-1.0)
        is_in = values >= bound
        mass += tl.where(is_in, values * 1099511627776.0, 0.0).to(tl.int64)
        count += is_in.to(tl.int64)
    return tl.sum(mass, axis=0), tl.sum(count, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _search(probs, num_tokens, high, goal, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest bits below `high` such that the probabilities of at least that many are, or add up to,
    `goal` or more; 0 where none are."""
    low = high * 0
    for _ in range(31):
        middle = low + (high - low) // 2
        mass, count = _at_least(probs, num_tokens, middle, BLOCK)
        reached = count if BY_COUNT else mass
        is_enough = reached >= goal
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    return low


@triton.jit
def _fixed(bits):  # type: ignore[no-untyped-def]
    return (bits.to(tl.float32, bitcast=True) * 1099511627776.0).to(tl.int64)


@kernel()
def _draw_kernel(  # type: ignore[no-untyped-def]
    token_ids,
    all_probs,
    is_certain,
    top_ks,
    top_ps,
    min_ps,
    uniforms,
    num_tokens,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(is_certain + row):
        return
    probs = all_probs + row.to(tl.int64) * num_tokens
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    largest = tl.full([], 0.0, tl.float32)
    for start in range(0, num_tokens, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(probs + columns, mask=columns < num_tokens, other=0.0)
        largest = tl.maximum(largest, tl.max(values, axis=0))
    high = largest.to(tl.int32, bitcast=True) + 1

    # What top-k and min-p leave: all that is above `last`, and `num_last` of those that are equal to it.
    last = (tl.load(min_ps + row) * largest).to(tl.int32, bitcast=True)
    kth = last * 0
    if top_k > 0:
        kth = _search(probs, num_tokens, high, top_k, True, BLOCK)
    last = tl.maximum(last, kth)
    above, num_above = _at_least(probs, num_tokens, last + 1, BLOCK)
    _, num_reached = _at_least(probs, num_tokens, last, BLOCK)
    num_last = num_reached - num_above
    if (top_k > 0) & (kth == last):
        num_last = tl.minimum(num_last, top_k - num_above)
    total = above + num_last * _fixed(last)
    if num_above + num_last == num_tokens:
        total = tl.full([], 1 << 40, tl.int64)

    # What top-p leaves of that: likewise.
    if top_p < 1:
        goal = (top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        nucleus = _search(probs, num_tokens, high, goal, False, BLOCK)
        if nucleus > last:
            num_last = tl.full([], 1 << 40, tl.int64)
            last = nucleus
            above, num_above = _at_least(probs, num_tokens, last + 1, BLOCK)
        each = tl.maximum(_fixed(last), 1)
        num_last = tl.maximum(tl.minimum(num_last, (goal - above + each - 1) // each), 1)
    kept = above + num_last * _fixed(last)
    target = (tl.load(uniforms + row) * kept.to(tl.float64)).to(tl.int64)
    target = tl.minimum(target, tl.maximum(kept - 1, 0))
    drawn = tl.maximum(_search(probs, num_tokens, high, target + 1, False, BLOCK), last)
    above, num_above = _at_least(probs, num_tokens, drawn + 1, BLOCK)
    place = (target - above) // tl.maximum(_fixed(drawn), 1)
    if drawn == last:
        place = tl.minimum(place, num_last - 1)

    value = drawn.to(tl.float32, bitcast=True)
    num_seen = tl.full([], 0, tl.int64)
    found = tl.full([], -1, tl.int64)
    for start in range(0, num_tokens, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_equal = (tl.load(probs + columns, mask=columns < num_tokens, other=-1.0) == value).to(tl.int64)
        order = num_seen + tl.cumsum(is_equal, axis=0) - 1
        is_it = (is_equal > 0) & (order == place)
        found = tl.maximum(found, tl.max(tl.where(is_it, columns.to(tl.int64), -1), axis=0))
        num_seen += tl.sum(is_equal, axis=0)
    tl.store(token_ids + row, tl.maximum(found, 0))


def draw_uncertain_(
    token_ids: Tensor,
    probs: Tensor,
    is_certain: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> None:
    """Draws token_ids int64 [n] anew where not `is_certain` [n]; probs fp32 [n, V]; top_k int64, 0 is off;
    top_p, min_p fp32; uniform fp64, of [0, 1)."""
    assert probs.is_contiguous()
    num_rows, num_tokens = probs.shape
    _draw_kernel(
        (num_rows, 1, 1),
        token_ids,
        probs,
        is_certain.int(),
        top_k.contiguous(),
        top_p.contiguous(),
        min_p.contiguous(),
        uniform.contiguous(),
        num_tokens,
        BLOCK=_BLOCK if num_tokens > _BLOCK else _SMALL_BLOCK,
        num_warps=16 if num_tokens > _BLOCK else 4,
    )
