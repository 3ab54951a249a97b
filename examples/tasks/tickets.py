"""Messages to a help desk, as the team that should have them and how urgent they are."""

from tasks.task import Draw, Item, Task, exact
from tasks.words import phrases

PROBLEMS = {
    "billing": phrases(
        """
        I was charged twice; my invoice is wrong; the refund has not arrived; the price went up without
        notice; I need a receipt; my card was declined; you billed me for last year; the discount was
        not applied; I cannot find my invoice; the amount you took is too high; my payment shows as
        open; I was billed after I cancelled
        """
    ),
    "technical": phrases(
        """
        the app crashes at start; the page does not load; I get an error when I save; the export is
        empty; search finds nothing; the upload stops halfway; your site is very slow; the screen stays
        black; the button does nothing; my files do not sync; the program freezes; the printer is not
        found
        """
    ),
    "shipping": phrases(
        """
        my parcel has not come; the box was damaged; you sent the wrong size; the courier never rang; I
        want to send the shoes back; tracking shows nothing; half of my order is missing; the delivery
        went to my neighbour; my package is lost; I ordered two weeks ago and have nothing; the parcel
        was open when it came; the driver left my order in the rain
        """
    ),
    "account": phrases(
        """
        I forgot my password; I want to change my email address; please delete my account; I cannot sign
        in; my profile shows the wrong name; someone else uses my login; the code for signing in never
        comes; I want to add a second user; my user name is taken; I am locked out; how do I close my
        account; I never got the mail to reset my password
        """
    ),
}
URGENT = phrases(
    """
    This is urgent!; I need help today.; Everything stands still until this is solved.; Please hurry.;
    We are losing money by the hour.; It cannot wait.; Answer at once, please.; My boss is waiting.;
    This is an emergency.; I need this within the hour.; Please act right now.; It has to work by noon.
    """
)
CALM = phrases(
    """
    There is no hurry.; Whenever you have time.; Next week is fine.; Just so you know.; Take your time.;
    It is not important.; I can wait.; Thanks in advance.; It does not bother me much.; Have a nice
    weekend.; Any day will do.; No rush at all.
    """
)


def draw(source: Draw) -> Item:
    team, is_urgent = source.any(tuple(PROBLEMS)), source.rng.random() < 0.5
    problem, tone = source.one(PROBLEMS[team]), source.one(URGENT if is_urgent else CALM)
    problem = f"{problem[0].upper()}{problem[1:]}."
    text = source.any((f"{problem} {tone}", f"{tone} {problem}", f"Hello! {problem} {tone}"))
    return Item(text, f"{team}/{'high' if is_urgent else 'low'}")


TASK = Task(
    "tickets",
    "a help-desk message: team and priority",
    "Answer with team/priority. Teams: billing, technical, shipping, account. Priority: high or low.",
    draw,
    exact,
    max_tokens=12,
)
