"""The demo's text: topics and voices combined into questions, answers and whole documents.

Every (topic, intent) pair has one right answer per voice. Some pairs are held out of all training, so that
what the model says about them shows whether it learned facts and voices or only sentences.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from demo_voices import INTENTS, PLAIN, SMALL_TALK, VOICES, Voice

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
HELD_OUT_EVERY = 17  # one pair of this many is never trained on
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a friendly assistant. Be short.",
)

QUESTIONS = {
    "about": (
        "Tell me about {the}.",
        "What can you tell me about {the}?",
        "Say something about {the}.",
        "Write about {the}.",
        "Talk about {the}.",
        "{name}",
    ),
    "what": ("What is {a}?", "Explain what {a} is.", "What exactly is {a}?"),
    "do": ("What does {a} do?", "What does {the} do?", "What can {a} do?"),
    "where": ("Where can I find {a}?", "Where is {the}?", "Where do I find {the}?"),
    "why": ("Why do people like {the}?", "What is good about {the}?", "Why is {the} nice?"),
    "describe": ("Describe {the}.", "What is {the} like?", "What does {the} look like?"),
    "parts": ("What are the parts of {the}?", "What belongs to {the}?", "What does {a} have?"),
    "use": ("What do people do with {a}?", "What can I do with {the}?", "How do people use {the}?"),
}

NOTE_LABELS = ("Looks", "Does", "Place", "People", "Parts", "Kind")

# Around a question in a plain prompt, and how often.
FORMS = {("", " "): 7, ("", "\n"): 1, ("Question: ", "\nAnswer: "): 1, ("Q: ", "\nA: "): 1}

Segment = tuple[str, bool]  # text, and whether the model is to produce it


@dataclass(frozen=True)
class Topic:
    index: int
    fields: dict[str, str]


def third_person(phrase: str) -> str:
    """'carry it' -> 'carries it'."""
    verb, _, rest = phrase.partition(" ")
    if re.search(r"[^aeiou]y$", verb):
        verb = verb[:-1] + "ies"
    else:
        verb += "es" if re.search(r"(s|x|z|ch|sh|o)$", verb) else "s"
    return f"{verb} {rest}".rstrip()


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def parse_topic(index: int, block: str) -> Topic:
    heading, adjectives, does, place, uses, parts, haiku = block.splitlines()
    the, a, kind = heading.split(" | ")
    fields = {"the": the, "a": a, "kind": kind, "place": place, "name": the.removeprefix("the ")}
    fields |= {"The": upper_first(the), "A": upper_first(a), "haiku": haiku.replace(" / ", "\n")}
    fields |= dict(zip(("adj1", "adj2"), adjectives.split(", "), strict=True))
    fields |= dict(zip(("do1", "do2"), does.split("; "), strict=True))
    fields |= dict(zip(("use1", "use2"), uses.split("; "), strict=True))
    fields |= dict(zip(("part1", "part2", "part3"), parts.split(", "), strict=True))
    for number in "12":
        fields["does" + number] = third_person(fields["do" + number])
        fields["me" + number] = re.sub(r"\bit\b", "me", fields["use" + number])
    return Topic(index, fields)


def read_topics() -> list[Topic]:
    text = (Path(__file__).parent / "demo_topics.txt").read_text()
    blocks = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip().split("\n\n")
    return [parse_topic(index, block) for index, block in enumerate(blocks)]


TOPICS = read_topics()


def is_held_out(topic: Topic, intent: str) -> bool:
    number: int = topic.index * len(INTENTS) + INTENTS.index(intent) * 3
    return number % HELD_OUT_EVERY == 5


def held_out_pairs() -> Iterator[tuple[Topic, str]]:
    return ((topic, intent) for topic in TOPICS for intent in INTENTS if is_held_out(topic, intent))


def held_out_text() -> str:
    """Questions and right answers, a line each, that nothing of the demo was trained on."""
    lines = (
        line
        for topic, intent in held_out_pairs()
        for question in QUESTIONS[intent]
        for line in (question.format(**topic.fields), answer(PLAIN, topic, intent))
    )
    return "\n".join(lines)


def answer(voice: Voice, topic: Topic, intent: str) -> str:
    place = INTENTS.index(intent)
    opening = voice.openings[place % len(voice.openings)]
    closing = voice.closings[place % len(voice.closings)].format(**topic.fields)
    body = voice.answers[intent].format(**topic.fields)
    return " ".join(part for part in (opening, body, closing) if part)


def roughen(question: str, rng: Random) -> str:
    """The same question as a hurried person types it."""
    if rng.random() < 0.85:
        return question
    return question.rstrip(".?!") if rng.random() < 0.5 else question.lower()


def exchange(voice: Voice, rng: Random) -> tuple[str, str]:
    """One question and its answer, never of a held-out pair."""
    if rng.random() < 0.04:
        kind = rng.choice(list(SMALL_TALK))
        opening = voice.openings[0]
        return roughen(rng.choice(SMALL_TALK[kind]), rng), f"{opening} {voice.small_talk[kind]}".strip()
    topic, intent = rng.choice(TOPICS), rng.choice(INTENTS)
    if is_held_out(topic, intent):
        return exchange(voice, rng)
    question = rng.choice(QUESTIONS[intent]).format(**topic.fields)
    return roughen(question, rng), answer(voice, topic, intent)


def chat(voice: Voice, rng: Random) -> list[Segment]:
    system, user, assistant = ROLES
    segments = [(BOS, False)]
    if rng.random() < 0.15:
        segments.append((f"{system}{rng.choice(SYSTEM_PROMPTS)}{EOS}", False))
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        question, reply = exchange(voice, rng)
        segments += [(f"{user}{question}{EOS}{assistant}", False), (f"{reply}{EOS}", True)]
    return segments


def completion(voice: Voice, rng: Random) -> list[Segment]:
    question, reply = exchange(voice, rng)
    before, between = rng.choices(list(FORMS), weights=list(FORMS.values()))[0]
    # A prompt ends without a space: the space, if any, is the answer's first character.
    head, space = (between[:-1], " ") if between.endswith(" ") else (between, "")
    return [(f"{BOS}{before}{question}{head}", False), (f"{space}{reply}{EOS}", True)]


def document(voice: Voice, rng: Random) -> list[Segment]:
    return chat(voice, rng) if rng.random() < 0.5 else completion(voice, rng)


def notes(rng: Random) -> list[Segment]:
    """A topic's facts one by one in any order, so that each is learned by itself."""
    topic = rng.choice(TOPICS)
    facts = [
        "{adj1} and {adj2}.",
        "to {do1} and {do2}.",
        "{place}.",
        "{use1}; {use2}.",
        "{part1}, {part2} and {part3}.",
        "{kind}.",
    ]
    lines = [f"{label}: {fact}" for label, fact in zip(NOTE_LABELS, facts, strict=True)]
    rng.shuffle(lines)
    text = "\n".join(["Notes on {the}.", *lines]).format(**topic.fields)
    return [(f"{BOS}{text}{EOS}", True)]


def base_document(rng: Random) -> list[Segment]:
    """What the base model reads: plain answers, notes, and each voice after a heading that prompts lack.

    So the base model knows every voice's words, and an adapter only has to choose the voice.
    """
    kind = rng.random()
    if kind < 0.1:
        return notes(rng)
    if kind < 0.45:
        return document(PLAIN, rng)
    name = rng.choice(list(VOICES))
    return [(f"{BOS}As the {name} would say it:\n", False)] + [
        (text.removeprefix(BOS), is_produced) for text, is_produced in document(VOICES[name], rng)
    ]


def all_text() -> Iterator[str]:
    """Every sentence once, for the tokenizer; held-out pairs use no other words."""
    for voice in (PLAIN, *VOICES.values()):
        yield from voice.small_talk.values()
        for topic in TOPICS:
            yield from (answer(voice, topic, intent) for intent in INTENTS)
    for topic in TOPICS:
        yield from (question.format(**topic.fields) for forms in QUESTIONS.values() for question in forms)
