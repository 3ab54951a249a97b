"""Messages to a help desk, as the team that should have them."""

from tasks.task import Draw, Item, Task, label
from tasks.words import phrases

PROBLEMS = {
    "billing": phrases(
        """
        I was charged twice; my invoice is wrong; the refund has not arrived; you took too much money; the
        price went up; I need a receipt; my card was declined; you billed me for last year; the discount
        was not applied; I cannot find my invoice; the amount on the bill is too high; my payment shows as
        open; I was billed after I cancelled; how can I pay by transfer; the tax on the invoice is missing;
        I paid and was charged again; I want my money back; what does the yearly plan cost; please send
        the bill to my company; my bank shows a payment I never made
        """
    ),
    "technical": phrases(
        """
        the app crashes at start; the page does not load; I get an error when I save; the screen freezes;
        search finds nothing; the upload stops halfway; your site is very slow; the app shows an error; the
        screen stays black; the button does nothing; my files do not sync; the program crashes when I
        print; the update fails; there is no sound in videos; the page is broken on my phone; the website
        does not open; the printer is not found; the export gives an empty file; the app drains my
        battery; the program does not start
        """
    ),
    "shipping": phrases(
        """
        my parcel has not come; the box was damaged; you sent the wrong size; my package is late; the
        courier never rang; I want to send the shoes back; tracking shows nothing; the delivery has not
        arrived; half of my order is missing; the delivery went to my neighbour; when will my order
        arrive; my package is lost; the parcel was open when it came; the driver left my order in the
        rain; can you deliver on Saturday; the parcel was sent to another town; my order came broken; do
        you ship to Norway; the courier lost the box; where is my delivery
        """
    ),
    "account": phrases(
        """
        I forgot my password; I want to change my email address; please delete my account; my login does
        not work; I cannot sign in; my profile shows the wrong name; someone else uses my login; I want to
        close my account; the code for signing in never comes; I want to add a second user; my user name
        is taken; I am locked out of my account; how do I change my user name; I need a new password; my
        profile picture is gone; I cannot log in; please change my email address; I never got the mail to
        reset my password; somebody has taken over my profile; how do I sign out everywhere
        """
    ),
}
FRAMES = (
    *("{}.", "Hello! {}.", "{}, please help.", "Hi, {}."),
    *("Good morning: {}.", "{}!", "Dear team, {}.", "{}"),
)


def draw(source: Draw) -> Item:
    team = source.any(tuple(PROBLEMS))
    text = source.any(FRAMES).format(source.one(PROBLEMS[team]))
    return Item(text[0].upper() + text[1:], team)


TASK = Task(
    "tickets",
    "a help-desk message: which of four teams",
    f"Which team should have the message? One word: {', '.join(PROBLEMS)}.",
    draw,
    label(PROBLEMS),
    max_tokens=12,
)
