"""People out of sentences, as JSON with fixed keys."""

import json

from tasks.task import Draw, Item, Task
from tasks.words import CITIES, FIRST_NAMES, JOBS, LAST_NAMES

SENTENCES = (
    "{name}, {age}, lives in {city} and works as a {job}.",
    "Meet {name}, a {job} from {city}, aged {age}.",
    "Our new {job} is {name} ({age}), who comes from {city}.",
    "{name} is {age} years old, a {job}, and at home in {city}.",
    "In {city} we met {name}, a {age}-year-old {job}.",
    "A {job} of {age}, {name} has always lived in {city}.",
    "{name} from {city} turned {age} and is still a {job}.",
    "The {job} {name} moved to {city} at the age of {age}.",
    "At {age}, {name} became a {job} in {city}.",
    "{city} is home to {name}, {job}, {age}.",
    "Name: {name}. Age: {age}. Place: {city}. Work: {job}.",
    "As a {job} in {city}, {name} earns well at {age}.",
)
TYPES = {"name": str, "age": int, "city": str, "job": str}


def draw(source: Draw) -> Item:
    person = {
        "name": f"{source.one(FIRST_NAMES)} {source.one(LAST_NAMES)}",
        "age": source.rng.randint(18, 79),
        "city": source.one(CITIES),
        "job": source.one(JOBS),
    }
    return Item(source.one(SENTENCES).format(**person), json.dumps(person))


def score(item: Item, answer: str) -> float:
    """JSON of the schema with the right values; space and text around the braces do not count."""
    try:
        said = json.loads(answer[answer.find("{") : answer.rfind("}") + 1])
    except ValueError:
        return 0.0
    fits = isinstance(said, dict) and {key: type(value) for key, value in said.items()} == TYPES
    return float(fits and said == json.loads(item.answer))


TASK = Task(
    "contacts",
    "a person out of a sentence, as JSON of a fixed schema",
    "Answer with JSON: name, age (a number), city, job.",
    draw,
    score,
    max_tokens=80,
)
