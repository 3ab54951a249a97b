"""Dates out of sentences, as ISO 8601."""

from datetime import date, timedelta

from tasks.task import Draw, Item, Task, exact
from tasks.words import MONTHS, ordinal

FIRST_DAY = date(1960, 1, 1)
NUM_DAYS = 28_000  # up to 2036
FORMS = (
    "{day} {month} {year}",
    "{month} {day}, {year}",
    "{month} {ordinal}, {year}",
    "the {ordinal} of {month} {year}",
    "{short} {day}, {year}",
    "{day}-{short}-{year}",
    "{day} {short}. {year}",
)
SENTENCES = (
    "We met on {}.",
    "The lease ends on {}.",
    "Please pay by {}.",
    "Her passport expires {}.",
    "{}: opening of the new library",
    "Born {}, in a small village.",
    "The contract was signed on {} by both sides.",
    "Delivery is planned for {}, before noon.",
    "He has worked here since {}.",
    "Invoice dated {}",
    "The concert takes place on {} in the park.",
    "Her first day at school was {}.",
)


def draw(source: Draw) -> Item:
    day = FIRST_DAY + timedelta(source.number(0, NUM_DAYS))
    month = MONTHS[day.month - 1]
    written = source.any(FORMS).format(
        day=day.day, ordinal=ordinal(day.day), month=month, short=month[:3], year=day.year
    )
    return Item(source.one(SENTENCES).format(written), day.isoformat())


TASK = Task(
    "dates",
    "a date out of a sentence, as ISO 8601",
    "Find the date and write it as YYYY-MM-DD, nothing else.",
    draw,
    exact,
    max_tokens=14,
)
