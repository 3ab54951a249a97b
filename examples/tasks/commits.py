"""What was done, told as Conventional Commits."""

from tasks.task import Draw, Item, Task, exact
from tasks.words import words

KINDS = {
    "fix": ("fixed", "repaired", "corrected", "mended", "solved"),
    "feat": ("added", "introduced", "built", "implemented", "made"),
    "docs": ("documented", "explained", "described", "wrote about", "wrote up"),
    "perf": ("sped up", "accelerated", "made faster", "quickened", "optimised"),
}
SCOPES = words(
    """
    parser router cache login editor search billing mailer scheduler importer menu database player
    printer calendar gateway tokenizer archive installer dashboard invoice sidebar compiler wallet chat
    keyboard backup camera map profile queue server shop theme toolbar updater viewer widget window
    worker
    """
)
DEEDS = words(
    """
    lookup upload export retry order check preview merge count reload download choice rounding report
    list undo handling reading layout colour speed size removal storage parsing naming printing sharing
    sorting filtering locking caching
    """
)
OBJECTS = words(
    """
    names files prices images users words settings logs fonts pages letters orders tables dates photos
    numbers messages icons quotes links notes rows columns keys songs tickets passwords invoices events
    videos maps tags
    """
)
SENTENCES = (
    "In the {scope} I {verb} {thing}.",
    "We {verb} {thing} in the {scope}.",
    "I have {verb} {thing}; it is part of the {scope}.",
    "{scope}: somebody {verb} {thing}",
    "Today I {verb} {thing} of the {scope}.",
    "The {scope} changed: we {verb} {thing}.",
    "For the {scope}, our team {verb} {thing}.",
    "Yesterday she {verb} {thing} in the {scope}.",
)


def draw(source: Draw) -> Item:
    kind, scope = source.any(tuple(KINDS)), source.one(SCOPES)
    thing = f"the {source.one(DEEDS)} of {source.one(OBJECTS)}"
    text = source.one(SENTENCES).format(scope=scope, verb=source.any(KINDS[kind]), thing=thing)
    return Item(text, f"{kind}({scope}): {thing.removeprefix('the ')}")


TASK = Task(
    "commits",
    "what was done, as a Conventional Commits title",
    "Write a commit title: fix, feat, docs or perf, the part in brackets, a colon and what was changed, "
    "without 'the'.",
    draw,
    exact,
    max_tokens=24,
)
