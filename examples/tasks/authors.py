"""People named in sentences, as entries of an index."""

from tasks.task import Draw, Item, Task, exact
from tasks.words import FIRST_NAMES, LAST_NAMES

SENTENCES = (
    "The novel was written by {}.",
    "{} wrote this book in one summer.",
    "A new play by {} opens tonight.",
    "I have just read {} again.",
    "{} is the author of three books.",
    "The poems of {} are short.",
    "My sister likes {} best.",
    "Who has read {}?",
    "{} won the prize for the best story.",
    "This essay by {} is famous.",
    "We met {} at the library.",
    "The last chapter is by {}.",
    "In the preface, {} thanks a friend.",
    "{} signs books here today.",
    "Nobody writes like {}.",
    "The letters of {} were found in a drawer.",
)


def draw(source: Draw) -> Item:
    first, last = source.one(FIRST_NAMES), source.one(LAST_NAMES)
    return Item(source.one(SENTENCES).format(f"{first} {last}"), f"{last}, {first}")


TASK = Task(
    "authors",
    "a person out of a sentence, as an index entry",
    "Write the person's name as an index has it: last name, comma, first name.",
    draw,
    exact,
    max_tokens=14,
)
