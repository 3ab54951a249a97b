"""Titles as slugs for addresses."""

import re

from tasks.task import Draw, Item, Task, exact
from tasks.words import phrases, words

HOWS = (
    "How to {verb} {thing}",
    "Why We {verb} {thing}",
    "10 Ways to {verb} {thing}!",
    "{verb} {thing} & Save Money",
    "A Guide: {verb} {thing}",
    "Can You {verb} {thing}?",
    "Don't {verb} {thing} Yet",
    "When to {verb} {thing}, and How",
    "{thing}: What to {verb} First",
    "Never {verb} {thing} Again",
    "{verb} {thing} (Part 2)",
    "The Best Time to {verb} {thing}",
)
VERBS = words(
    """
    Bake Clean Paint Build Sell Repair Grow Cook Store Choose Buy Wash Cut Move Pack Test Hide Draw Plan
    Share Find Carry Trade Dry
    """
)
THINGS = phrases(
    """
    Bread; Old Windows; Your First Boat; a Garden Wall; Used Books; Wooden Chairs; Tomatoes at Home; a
    Winter Coat; Small Rooms; the Right Bike; Green Tea; a Music Box; Fresh Fish; Heavy Boxes; Kids'
    Shoes; a Stone Oven; Red Apples; an Attic Door; Soft Cheese; Your Old Phone; Two Tents; a Hot Bath;
    Long Letters; the Last Key; Plum Jam; Cheap Lamps; a Paper Kite; New Shelves
    """
)


def slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower().replace("'", "")).strip("-")


def draw(source: Draw) -> Item:
    title = source.one(HOWS).format(verb=source.one(VERBS), thing=source.one(THINGS))
    return Item(title, slug(title))


TASK = Task(
    "slugs",
    "a title, as a URL slug",
    "Write the title as a URL slug: lower case, words joined by hyphens.",
    draw,
    exact,
    max_tokens=28,
)
