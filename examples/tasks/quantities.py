"""Quantities in words, as a number and the symbol of the unit."""

from tasks.task import Draw, Item, Task, exact
from tasks.words import ONES, spelled

UNITS = {
    "kilometres": "km",
    "metres": "m",
    "centimetres": "cm",
    "millimetres": "mm",
    "kilograms": "kg",
    "grams": "g",
    "litres": "L",
    "millilitres": "mL",
    "seconds": "s",
    "minutes": "min",
    "hours": "h",
    "degrees Celsius": "°C",
    "volts": "V",
    "watts": "W",
    "kilowatts": "kW",
    "per cent": "%",
    "newtons": "N",
    "hertz": "Hz",
}
SENTENCES = (
    "It is {}.",
    "We measured {}.",
    "The label says {}.",
    "About {}, I think.",
    "The meter shows {}.",
    "You need {} for this.",
    "At least {} are left.",
    "They ordered {} of it.",
    "The limit is {}.",
    "{} is too much.",
    "The sensor reported {} today.",
    "Write down {}.",
)


def amount(source: Draw) -> tuple[str, str]:
    """A number in words and in digits."""
    whole = source.number(2, 199)
    kind = source.rng.randrange(4)
    if kind == 0:
        return f"{spelled(whole)} and a half", f"{whole}.5"
    if kind == 1:
        tenth = source.rng.randint(1, 9)
        return f"{spelled(whole)} point {ONES[tenth]}", f"{whole}.{tenth}"
    return spelled(whole), str(whole)


def draw(source: Draw) -> Item:
    words, digits = amount(source)
    unit = source.any(tuple(UNITS))
    text = source.one(SENTENCES).format(f"{words} {unit}")
    return Item(text[0].upper() + text[1:], f"{digits} {UNITS[unit]}")


TASK = Task(
    "quantities",
    "a quantity in words, as number and unit symbol",
    "Write the quantity in digits with its unit's symbol, nothing else.",
    draw,
    exact,
    max_tokens=12,
)
