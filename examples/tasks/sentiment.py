"""Reviews, as positive, negative or mixed."""

from tasks.task import Draw, Item, Task, label
from tasks.words import phrases

LABELS = ("positive", "negative", "mixed")
THINGS = phrases(
    """
    hotel; phone; book; film; restaurant; laptop; concert; coffee; bicycle; course; airline; museum;
    jacket; camera; app; chair; tent; blender; headset; garden tool; train ride; pizza; lamp; backpack
    """
)
GOOD = phrases(
    """
    was a joy from start to finish; works better than I hoped; is worth every cent; made my day; could
    not be nicer; is the best I ever had; was simply lovely; surprised me in the best way; is a real
    bargain; does just what it should; has won me over; I would recommend to everyone; never let me
    down; was excellent; is well made; deserves five stars
    """
)
BAD = phrases(
    """
    was a waste of money; broke after two days; let me down badly; is far too expensive for what it is;
    was awful; made me angry; is the worst I ever had; I want my money back for; never worked; was dull
    and slow; is badly made; disappointed all of us; smelled terrible; was a mistake; is useless; I
    cannot recommend
    """
)
ONE_SIDED = (
    "The {thing} {says}.",
    "This {thing} {says}!",
    "My new {thing} {says}.",
    "Our {thing} {says}, honestly.",
)
TWO_SIDED = (
    "The {thing} {says}, but it {but}.",
    "This {thing} {says}; still, it {but}.",
    "Our {thing} {says}, yet it {but}.",
)
GOOD_TOO = phrases(
    """
    looks great; was cheap; is easy to use; came on time; is light; feels solid; has kind staff; lasts
    long; is quiet; has lovely colours; is quick; is comfortable
    """
)
BAD_TOO = phrases(
    """
    looks cheap; cost too much; is hard to use; came late; is heavy; feels flimsy; has rude staff; wears
    out fast; is noisy; has ugly colours; is slow; is uncomfortable
    """
)


def sayings(entries: list[str]) -> list[str]:
    """Those that can follow the thing they speak of."""
    return [entry for entry in entries if not entry.startswith("I ")]


def draw(source: Draw) -> Item:
    wanted = source.any(LABELS)
    thing = source.one(THINGS)
    first_is_good = wanted == "positive" or (wanted == "mixed" and source.rng.random() < 0.5)
    says = source.one(sayings(GOOD if first_is_good else BAD))
    if wanted == "mixed":
        but = source.one(BAD_TOO if first_is_good else GOOD_TOO)
        return Item(source.any(TWO_SIDED).format(thing=thing, says=says, but=but), wanted)
    text = source.any(ONE_SIDED).format(thing=thing, says=says)
    if source.rng.random() < 0.5:
        text += f" It also {source.one(GOOD_TOO if first_is_good else BAD_TOO)}."
    return Item(text, wanted)


TASK = Task(
    "sentiment",
    "a review: positive, negative or mixed",
    "Is the review positive, negative or mixed? Answer with one word.",
    draw,
    label(LABELS),
    max_tokens=6,
)
