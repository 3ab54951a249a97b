"""Personal data out of messages, each replaced by its kind."""

from tasks.task import Draw, Item, Task, exact
from tasks.words import CITIES, FIRST_NAMES, LAST_NAMES, words

DOMAINS = words(
    """
    example.org mail.net post.com letters.io office.eu inbox.dev web.info home.net
    """
)
MESSAGES = (
    "Call {name} at {phone}.",
    "Write to {email} before Friday.",
    "{name} moved to {city} last year.",
    "My number is {phone}, ask for {name}.",
    "Please send the bill to {name}, {email}.",
    "I am {name} and I live in {city}.",
    "Is {phone} still the number of {name}?",
    "Forward this to {email} and call {phone}.",
    "The parcel for {name} went to {city} by mistake.",
    "You reach our office in {city} at {phone}.",
    "{name} asked for a refund, see {email}.",
    "Tell {name} that the meeting in {city} is off.",
    "Nobody answers at {phone} in the evening.",
    "Thanks, {name}! I will write to {email}.",
    "{name} wants a copy sent to {city}.",
    "Dear {name}, please confirm {phone}.",
)


def draw(source: Draw) -> Item:
    first, last = source.one(FIRST_NAMES), source.one(LAST_NAMES)
    fields = {
        "name": source.any((first, f"{first} {last}")),
        "phone": f"555-{source.number(1000, 9999)}",
        "email": f"{first.lower()}.{last.lower()}@{source.one(DOMAINS)}",
        "city": source.one(CITIES),
    }
    message = source.one(MESSAGES)
    return Item(message.format(**fields), message.format(**{key: f"[{key.upper()}]" for key in fields}))


TASK = Task(
    "redact",
    "personal data replaced by its kind",
    "Repeat the message with personal data replaced by [NAME], [PHONE], [EMAIL] or [CITY].",
    draw,
    exact,
    max_tokens=32,
)
