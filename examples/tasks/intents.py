"""What a bank's customer wants, as one of six labels."""

from tasks.task import Draw, Item, Task, label
from tasks.words import phrases

PHRASES = {
    "balance": phrases(
        """
        how much money do I have; what is left on my account; tell me my current balance; how much is in
        my savings account; show what I have in the bank; is there enough money on my account; what does
        my account stand at; do I still have money; how much can I spend; am I overdrawn; what is the
        state of my account; how much is there on my current account
        """
    ),
    "transfer": phrases(
        """
        send fifty euros to my sister; move money to my savings; I want to pay Tom back; wire the rent
        to my landlord; transfer two hundred to Anna; give my son his pocket money; put a hundred on my
        other account; make a payment to the club; send the deposit to the agency; pay this bill for me;
        pass thirty euros on to Leo; I need to send money abroad
        """
    ),
    "block": phrases(
        """
        my card was stolen; I lost my credit card; stop my card at once; somebody took my wallet with
        the card; freeze my debit card; please disable the card; nobody must use my card any more; my
        card is gone; lock the card, I left it in a taxi; cancel my lost card; I cannot find my card
        anywhere; someone has run off with my bank card
        """
    ),
    "limit": phrases(
        """
        raise my daily limit; I want to withdraw more per day; can my credit line be higher; lower the
        limit of my card; what is my spending limit; let me spend more with the card; increase how much
        I may take out; my card's maximum is too low; set the limit to a thousand; reduce what can be
        withdrawn; change my card's limit; I need a higher limit for my holiday
        """
    ),
    "address": phrases(
        """
        I have moved house; change my address; my street is wrong in your files; we live in another town
        now; update where I live; send letters to my new flat; please note our new address; my postcode
        has changed; I am moving next month; use my parents' address for mail; the house number you have
        is wrong; I have a new home address
        """
    ),
    "loan": phrases(
        """
        I want to borrow money for a car; can I get a mortgage; what does a loan cost; we need credit to
        build a house; lend me five thousand; what interest do you ask for a loan; I would like to take
        out a loan; how do I apply for credit; could the bank finance my kitchen; can I pay my loan back
        early; is there a loan for students; I need to borrow for a new roof
        """
    ),
}
FRAMES = (
    "{}",
    "Hello, {}.",
    "Hi! {}?",
    "Excuse me, {}",
    "Good morning, {}.",
    "Well, {}",
    "{}, please",
    "Hi there, {}",
)


def draw(source: Draw) -> Item:
    wanted = source.any(tuple(PHRASES))
    text = source.any(FRAMES).format(source.one(PHRASES[wanted]))
    return Item(text[0].upper() + text[1:], wanted)


TASK = Task(
    "intents",
    "a bank customer's intent, one of six",
    f"Name the customer's intent in one word: {', '.join(PHRASES)}.",
    draw,
    label(PHRASES),
    max_tokens=16,
)
