"""What was done, told as Conventional Commits."""

from tasks.task import Draw, Item, Task, exact
from tasks.words import phrases, words

KINDS = {
    "fix": ("fixed", "repaired", "corrected", "mended", "solved"),
    "feat": ("added", "introduced", "built", "implemented", "made"),
    "docs": ("documented", "explained", "described", "wrote about", "wrote up"),
    "perf": ("sped up", "accelerated", "made faster", "quickened", "optimised"),
}
SCOPES = words(
    """
    parser router cache login editor search billing mailer scheduler importer menu database player
    printer calendar gateway tokenizer archive installer dashboard
    """
)
THINGS = phrases(
    """
    the lookup of names; the upload of large files; the export to CSV; the retry after a timeout; the
    sort order; the dark theme; the reading of empty files; the list of users; the monthly report; the
    handling of quotes; the start page; the undo of moves; the check of passwords; the preview of
    images; the merge of duplicates; the count of words; the reload of settings; the download of logs;
    the choice of fonts; the rounding of prices
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
    kind, scope, thing = source.any(tuple(KINDS)), source.one(SCOPES), source.one(THINGS)
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
