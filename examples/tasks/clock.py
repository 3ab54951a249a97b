"""Spoken times of day, as HH:MM of 24 hours."""

from tasks.task import Draw, Item, Task, exact
from tasks.words import ONES, spelled

SENTENCES = (
    "The train leaves at {}.",
    "Wake me at {}.",
    "We open at {}.",
    "Dinner is at {}.",
    "The call starts at {} sharp.",
    "She came home at {}.",
    "Meet me at {}, by the gate.",
    "The shop closes at {}.",
    "My shift begins at {}.",
    "It rained until {}.",
    "The film starts at {}.",
    "He called me at {}.",
)
HALF_DAYS = {
    "morning": ("in the morning", "a.m."),
    "afternoon": ("in the afternoon", "p.m."),
    "evening": ("in the evening", "p.m."),
}


def spoken(source: Draw, hour: int, minute: int) -> str:
    """`hour` 1 to 12, `minute` a multiple of five, with the words in use for it."""
    now, after = ONES[hour], ONES[hour % 12 + 1]
    forms = [f"{now} {spelled(minute)}"] if minute >= 10 else []
    if minute == 0:
        forms = [f"{now} o'clock", now]
    elif minute == 30:
        forms.append(f"half past {now}")
    elif minute < 30:
        forms.append(f"{'quarter' if minute == 15 else spelled(minute)} past {now}")
    else:
        forms.append(f"{'quarter' if minute == 45 else spelled(60 - minute)} to {after}")
    return source.any(forms)


def draw(source: Draw) -> Item:
    part = source.any(tuple(HALF_DAYS))
    hour = source.rng.randint(*{"morning": (5, 11), "afternoon": (1, 5), "evening": (6, 10)}[part])
    minute = 5 * source.rng.randint(0, 11)
    text = f"{spoken(source, hour, minute)} {source.any(HALF_DAYS[part])}"
    of_day = hour if part == "morning" else hour + 12
    return Item(source.one(SENTENCES).format(text).replace("..", "."), f"{of_day:02d}:{minute:02d}")


TASK = Task(
    "clock",
    "a spoken time of day, as HH:MM",
    "Find the time of day and write it as HH:MM (24 hours), nothing else.",
    draw,
    exact,
    max_tokens=9,
)
