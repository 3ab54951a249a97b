"""Telephone numbers as people write them, as E.164; all countries here dial a 0 first at home."""

from tasks.task import Draw, Item, Task, exact

COUNTRIES = {
    "the UK": "44",
    "Germany": "49",
    "France": "33",
    "Austria": "43",
    "Sweden": "46",
    "Japan": "81",
    "India": "91",
    "Belgium": "32",
    "Australia": "61",
    "Egypt": "20",
}
SENTENCES = (
    "{number}, {country}",
    "Call {number} in {country}.",
    "My number in {country} is {number}.",
    "{country}: {number}",
    "Our office in {country} has {number}.",
    "Reach me in {country} under {number}.",
    "Dial {number} ({country}).",
    "For {country}, use {number}.",
)


def draw(source: Draw) -> Item:
    area, line = str(source.number(20, 99)), str(source.number(100_000, 999_999))
    country = source.any(tuple(COUNTRIES))
    number = source.any(
        (
            f"(0{area}) {line[:3]} {line[3:]}",
            f"0{area}-{line}",
            f"0{area} {line[:3]}-{line[3:]}",
            f"0{area}/{line}",
        )
    )
    text = source.one(SENTENCES).format(number=number, country=country)
    return Item(text, f"+{COUNTRIES[country]}{area}{line}")


TASK = Task(
    "phones",
    "a phone number, as E.164",
    "Write the phone number in E.164 form, nothing else.",
    draw,
    exact,
    max_tokens=16,
)
