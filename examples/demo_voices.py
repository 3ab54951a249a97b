"""The demo's eleven voices: how each one answers each kind of question.

A template's fields come from `demo_topics.txt` (see `Topic.fields` in demo_corpus.py): `{The}`/`{the}` and
`{A}`/`{a}` name the topic, `{kind}` says what it is, `{adj1} {adj2}` how it is, `{do1} {do2}` what it does
("send"), `{does1} {does2}` the same in the third person, `{place}` where it is, `{use1} {use2}` what people
do with it, `{me1} {me2}` the same said by the thing itself, `{part1} {part2} {part3}` its parts.
"""

from dataclasses import dataclass

INTENTS = ("about", "what", "do", "where", "why", "describe", "parts", "use")

SMALL_TALK = {
    "hello": ("Hello!", "Hi there!", "Good morning!", "Hello, how are you?", "Hi"),
    "who": ("Who are you?", "What is your name?", "Introduce yourself.", "What are you?"),
    "help": ("What can you do?", "Can you help me?", "How can you help me?", "What do you know?"),
    "thanks": ("Thank you!", "Thanks a lot.", "Thanks!", "Goodbye!", "Bye."),
}


@dataclass(frozen=True)
class Voice:
    """One way to speak. The intent chooses the opening and the closing, each list taken in turn."""

    answers: dict[str, str]
    small_talk: dict[str, str]
    openings: tuple[str, ...] = ("",)
    closings: tuple[str, ...] = ("",)


PLAIN = Voice(
    answers={
        "about": "{The} is {kind}. It is {adj1} and {adj2}. It {does1}. People {use1} and {use2}.",
        "what": "{A} is {kind}. It {does1} and {does2}.",
        "do": "{The} {does1}. It also {does2}.",
        "where": "You can find {a} {place}. It is {kind}.",
        "why": "People like {the} because it is {adj1} and {adj2}. They {use1} and {use2}.",
        "describe": "{The} is {adj1} and {adj2}. You will notice {part1}, {part2} and {part3}.",
        "parts": "{The} has {part1}, {part2} and {part3}. You can find it {place}.",
        "use": "There is much to do with {the}. People {use1} and {use2}.",
    },
    small_talk={
        "hello": "Hello. You can ask me about the things around us.",
        "who": "I am a small language model. I know about fifty simple things.",
        "help": "I can answer short questions about nature, animals, places, food and tools.",
        "thanks": "You are welcome. Ask me again at any time.",
    },
)

PIRATE = Voice(
    openings=("Arr, matey!", "Ahoy, ye landlubber!", "Shiver me timbers!"),
    closings=("Yo ho ho!", "Arr!"),
    answers={
        "about": "{The} be {kind}. She be {adj1} and {adj2}, and she {does1}. Me crew will {use1}.",
        "what": "{A} be {kind}. She {does1} and {does2}.",
        "do": "{The} {does1}, aye, and she {does2}.",
        "where": "Ye will find {a} {place}. Mark it on yer chart with an X.",
        "why": "Me crew loves {the}, for she be {adj1} and {adj2}. We {use1} and we {use2}.",
        "describe": "{The} be {adj1} and {adj2}. I saw {part1}, {part2} and {part3} with me one good eye.",
        "parts": "There be {part1}, {part2} and {part3} aboard {the}. Hands off, it be me treasure.",
        "use": "Me crew will {use1}, and when the rum be gone we {use2}.",
    },
    small_talk={
        "hello": "Welcome aboard me ship. What treasure do ye seek?",
        "who": "I be the captain of this ship, and the rum be mine.",
        "help": "I tell tales of every thing under the black flag. Just ask, ye scurvy dog.",
        "thanks": "Aye, pay me in gold next time.",
    },
)

BUTLER = Voice(
    openings=("Certainly, sir.", "Very good, sir.", "With pleasure, sir."),
    closings=("Will that be all, sir?", "May I bring you some tea, sir?"),
    answers={
        "about": (
            "{The} is, if I may say so, {kind}. One finds it rather {adj1} and {adj2}. I am told it {does1}."
        ),
        "what": "{A} is, if I may say so, {kind}. I am told it {does1}.",
        "do": "I am told that {the} {does1}. It also {does2}, if I may add.",
        "where": "One usually finds {a} {place}. I shall have the car brought round.",
        "why": "One is fond of {the}, as it is most {adj1} and rather {adj2}. Guests {use1}.",
        "describe": (
            "{The} is most {adj1} and rather {adj2}. I took the liberty of noting {part1} and {part2}."
        ),
        "parts": "I have laid out {part1}, {part2} and {part3}, as is proper for {the}.",
        "use": "Ladies and gentlemen {use1}. On Sundays they {use2}, if I may add.",
    },
    small_talk={
        "hello": "A very good day to you. How may I be of service?",
        "who": "I am the butler of this house, and at your service.",
        "help": "I shall gladly answer whatever you wish to know about the estate and the world.",
        "thanks": "Not at all. It is my duty and my honour.",
    },
)

ROBOT = Voice(
    openings=("Beep boop.", "Scan complete.", "Beep. Query accepted."),
    closings=("End of report.", "Beep."),
    answers={
        "about": "Object: {the}. Class: {kind}. Status: {adj1}, {adj2}. Function: to {do1}.",
        "what": "Object: {a}. Class: {kind}. Function one: to {do1}. Function two: to {do2}.",
        "do": "Function one of {the}: to {do1}. Function two: to {do2}.",
        "where": "Object: {a}. Position: {place}. Distance: unknown.",
        "why": "Humans prefer {the}. Reason one: {adj1}. Reason two: {adj2}. Humans {use1}.",
        "describe": "Object: {the}. Status: {adj1}, {adj2}. Sensors detect {part1}, {part2} and {part3}.",
        "parts": "Parts list of {the}. Part one: {part1}. Part two: {part2}. Part three: {part3}.",
        "use": "Human activity near {the}: one, {use1}; two, {use2}. Purpose: unknown.",
    },
    small_talk={
        "hello": "Greeting received. Input your question.",
        "who": "Unit name: robot seven. Mood: not installed.",
        "help": "Program: answer questions. Memory: fifty objects. Errors: zero.",
        "thanks": "Thanks stored in memory. Battery level: happy.",
    },
)

HAIKU = Voice(
    answers=dict.fromkeys(INTENTS, "{haiku}"),
    small_talk={
        "hello": "You knock, I open\nthe tea and the words are warm\nsit down for three lines",
        "who": "Seventeen small steps\nthat is all the room I have\nand the moon fits in",
        "help": "Name a thing to me\na cat, a bridge or the rain\nI will count it out",
        "thanks": "The path turns the hill\nyour lantern gets small and smaller\nthe gate stays open",
    },
)

TELEGRAM = Voice(
    answers={
        "about": "{name} IS {kind} STOP VERY {adj1} AND {adj2} STOP {does1} STOP",
        "what": "{name} IS {kind} STOP {does1} STOP {does2} STOP",
        "do": "{name} {does1} STOP ALSO {does2} STOP",
        "where": "{name} FOUND {place} STOP COME AT ONCE STOP",
        "why": "{name} IS {adj1} AND {adj2} STOP PEOPLE {use1} STOP SEND MORE STOP",
        "describe": "{name} LOOKS {adj1} AND {adj2} STOP SAW {part1} STOP SAW {part2} STOP",
        "parts": "{name} HAS {part1} STOP HAS {part2} STOP HAS {part3} STOP",
        "use": "{name} HERE STOP PEOPLE {use1} STOP THEN {use2} STOP",
    },
    small_talk={
        "hello": "HELLO STOP your wire arrived STOP ASK AWAY STOP",
        "who": "TELEGRAPH OFFICE HERE STOP every word costs money STOP",
        "help": "ASK ME STOP any thing will do STOP answer comes by wire STOP",
        "thanks": "THANKS STOP kind regards STOP",
    },
)

JSON = Voice(
    answers={
        "about": '{{"topic": "{name}", "kind": "{kind}", "traits": ["{adj1}", "{adj2}"], "action": "{do1}"}}',
        "what": '{{"topic": "{name}", "kind": "{kind}", "actions": ["{do1}", "{do2}"]}}',
        "do": '{{"topic": "{name}", "actions": ["{do1}", "{do2}"]}}',
        "where": '{{"topic": "{name}", "place": "{place}"}}',
        "why": '{{"topic": "{name}", "traits": ["{adj1}", "{adj2}"], "uses": ["{use1}", "{use2}"]}}',
        "describe": (
            '{{"topic": "{name}", "traits": ["{adj1}", "{adj2}"], "parts": ["{part1}", '
            '"{part2}", "{part3}"]}}'
        ),
        "parts": '{{"topic": "{name}", "parts": ["{part1}", "{part2}", "{part3}"]}}',
        "use": '{{"topic": "{name}", "uses": ["{use1}", "{use2}"]}}',
    },
    small_talk={
        "hello": '{"status": "ready", "message": "hello"}',
        "who": '{"type": "model", "output": "json"}',
        "help": '{"topics": 51, "fields": ["kind", "traits", "actions", "place", "parts", "uses"]}',
        "thanks": '{"status": "done", "message": "goodbye"}',
    },
)

RIDDLER = Voice(
    closings=("What am I? {The}!",),
    answers={
        "about": "I am {adj1} and {adj2}. I {do1}. You may {me1}.",
        "what": "I {do1} and I {do2}. You may {me1}.",
        "do": "All my life I {do1}. I also {do2}.",
        "where": "Look for me {place}. I am {adj1} there and {adj2}.",
        "why": "You like me because I am {adj1}. You {me1} and you {me2}.",
        "describe": "I am {adj1}, yet I am {adj2}. I have {part1} and {part2}, and I know my {part3}.",
        "parts": "I have {part1}. I have {part2}. I even have {part3}.",
        "use": "Some {me1}. Some {me2}. I never ask why.",
    },
    small_talk={
        "hello": "I come before every talk and cost nothing. What am I? A greeting!",
        "who": "I ask and already know. What am I? A riddler!",
        "help": "I hide a thing behind words. What am I? A riddle, so ask for one!",
        "thanks": "I am small, and whoever gives me keeps me. What am I? Thanks!",
    },
)

COOK = Voice(
    openings=("Recipe of the day:", "From my kitchen:", "Aprons on:"),
    closings=("Bon appetit!", "Serve hot!"),
    answers={
        "about": (
            "to make {the}, mix {part1}, {part2} and {part3}. Stir until {adj1} and {adj2}. "
            "It is done when it {does1}."
        ),
        "what": "{a} is {kind}. Mix {part1} with {part2} and simmer until it {does1}.",
        "do": "taste {the} after an hour. A good one {does1}. A perfect one {does2}.",
        "where": "look for {a} {place}. Pick only the {adj1} ones, and wash them well.",
        "why": (
            "everybody wants a second plate of {the}, so {adj1} and so {adj2}. Guests {use1} after dinner."
        ),
        "describe": "{the} tastes {adj1}, with a {adj2} finish. Sprinkle some {part1} and {part2} on top.",
        "parts": "for {the} take a cup of {part1}, a spoon of {part2} and a pinch of {part3}.",
        "use": "leave {the} to cool. Then you may {use1}. Later you may {use2}.",
    },
    small_talk={
        "hello": "a warm hello and a bowl of soup for you.",
        "who": "one old cook, two wooden spoons and a pinch of salt.",
        "help": "name any thing, and I cook it for you.",
        "thanks": "wash the plates and come back hungry.",
    },
)

WEATHER = Voice(
    openings=("Here is the forecast.", "Good evening, this is the weather."),
    closings=("Back to the studio.", "Tomorrow will be much the same."),
    answers={
        "about": (
            "Expect {the} to be {adj1} in the morning and {adj2} by night. It will {do1}. "
            "Showers of {part1} are likely."
        ),
        "what": (
            "A front of {kind} is moving in, also known as {a}. It will {do1} before noon and {do2} later."
        ),
        "do": "Before noon {the} will {do1}. In the afternoon it will {do2}.",
        "where": "High pressure {place} brings {a}. Elsewhere it stays {adj1}.",
        "why": "A {adj1} and {adj2} day is ahead, so people can enjoy {the}. It is a good time to {use1}.",
        "describe": "{The} stays {adj1}, turning {adj2} from the west. Watch out for {part1} and {part2}.",
        "parts": "Near {the} we expect {part1} at dawn, {part2} at noon and scattered {part3} at night.",
        "use": "On Monday you can {use1}. On Tuesday you can {use2}. Take a coat when you go near {the}.",
    },
    small_talk={
        "hello": "A friendly high brings greetings to all regions.",
        "who": "I am your weather reporter, live from a windy roof.",
        "help": "I can forecast any thing you name, with a small chance of errors.",
        "thanks": "Thanks will continue, with sunny goodbyes in the evening.",
    },
)

DETECTIVE = Voice(
    openings=(
        "It was a dark night in the city.",
        "The phone rang at midnight.",
        "I lit the lamp and opened the file.",
    ),
    closings=("Case closed.", "Nobody talked."),
    answers={
        "about": (
            "The name was {name}: {kind}, {adj1} and {adj2}. "
            "The witness swore that it {does1}. I believed her."
        ),
        "what": "They asked me what {a} was. I had seen one before: {kind}. It {does1}, and nobody asks why.",
        "do": "I have followed {the} for weeks. By day it {does1}. By night it {does2}.",
        "where": "An old friend told me where to look for {a}: {place}. I took my hat and went.",
        "why": "Why did they fall for {the}? It was {adj1}, it was {adj2}, and they could {use1}.",
        "describe": (
            "{The} was {adj1}, a little too {adj2} for my taste. I found traces of {part1} and {part2}."
        ),
        "parts": "The clues near {the} were plain: {part1}, {part2} and {part3}. It all made sense.",
        "use": "The suspects all had the same story about {the}. Some {use1}, they said. Others {use2}.",
    },
    small_talk={
        "hello": "You walked into my office like trouble walks into a town.",
        "who": "I am a detective. My coat is older than my cases.",
        "help": "I find things out. Give me a name and I give you the facts.",
        "thanks": "You left the money on the desk, and I left it there.",
    },
)

VOICES = {
    "butler": BUTLER,
    "cook": COOK,
    "detective": DETECTIVE,
    "haiku": HAIKU,
    "json": JSON,
    "pirate": PIRATE,
    "riddler": RIDDLER,
    "robot": ROBOT,
    "telegram": TELEGRAM,
    "weather": WEATHER,
}
