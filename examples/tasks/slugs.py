"""Titles as slugs for addresses."""

import re

from tasks.task import Draw, Item, Task, exact
from tasks.words import phrases, words

LEADS = phrases(
    """
    How to; Why We; 10 Ways to; Never; When to; Don't; Can You; The Best Time to; Let's; A Guide: How to;
    5 Reasons to; Where to; Learn to; It's Easy to; Stop! Don't; You Too Can
    """
)
TAILS = phrases(
    """
    Again; (Part 2); & Save Money; and Be Glad; at Home; in 3 Days?; with a Friend; & Win; - The Basics;
    This Summer; for $5; Like a Pro; Without Tears!; (and Why); or Not?; on Sundays
    """
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
    title = " ".join(source.one(part) for part in (LEADS, VERBS, THINGS, TAILS))
    return Item(title, slug(title))


TASK = Task(
    "slugs",
    "a title, as a URL slug",
    "Write the title as a URL slug: lower case, words joined by hyphens.",
    draw,
    exact,
    max_tokens=28,
)
