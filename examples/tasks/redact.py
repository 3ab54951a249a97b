"""Personal data out of messages, each replaced by its kind."""

from tasks.task import Draw, Item, Task, exact
from tasks.words import CITIES, FIRST_NAMES, LAST_NAMES, words

DOMAINS = words(
    """
    example.org mail.net post.com letters.io office.eu inbox.dev web.info home.net
    """
)
OPENINGS = (
    "Call {name} today",
    "Write to {email} first",
    "I spoke to {name}",
    "The parcel went to {city}",
    "Ring {phone} twice",
    "Please ask {name}",
    "We sent the bill to {email}",
    "Somebody in {city} has the keys",
    "My sister {name} is ill",
    "Take the train to {city}",
    "Nobody answers at {phone}",
    "The form came from {email}",
    "Tell {name} the news",
    "Our shop in {city} is closed",
    "The new number is {phone}",
    "You will find {name} upstairs",
)
CLOSINGS = (
    ", then write to {email}.",
    " before you call {phone}.",
    ", and {name} knows why.",
    ", as agreed in {city}.",
    "; the answer goes to {email}.",
    " while {name} is away.",
    ", or try {phone} later.",
    ", says our agent in {city}.",
    "; {name} will help you.",
    " and send a copy to {email}.",
    ", but not from {city}.",
    " until we hear from {name}.",
    "; for questions, {phone}.",
    " when the people from {city} arrive.",
    ", with thanks from {name}.",
    " unless {email} is wrong.",
)


def draw(source: Draw) -> Item:
    first, last = source.one(FIRST_NAMES), source.one(LAST_NAMES)
    fields = {
        "name": source.any((first, f"{first} {last}")),
        "phone": f"555-{source.number(1000, 9999)}",
        "email": f"{first.lower()}.{last.lower()}@{source.one(DOMAINS)}",
        "city": source.one(CITIES),
    }
    message = source.one(OPENINGS) + source.one(CLOSINGS)
    return Item(message.format(**fields), message.format(**{key: f"[{key.upper()}]" for key in fields}))


TASK = Task(
    "redact",
    "personal data replaced by its kind",
    "Repeat the message with personal data replaced by [NAME], [PHONE], [EMAIL] or [CITY].",
    draw,
    exact,
    max_tokens=32,
)
