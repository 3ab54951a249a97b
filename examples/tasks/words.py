"""Lists of words: how the tasks write them down, and those that several use."""


def words(text: str) -> list[str]:
    return text.split()


def phrases(text: str) -> list[str]:
    """What stands between semicolons, over lines."""
    return [" ".join(phrase.split()) for phrase in text.split(";")]


FIRST_NAMES = words(
    """
    Anna Bruno Clara David Elena Felix Grace Hugo Irene Jonas Karin Leon Marta Nils Olga Pablo Quinn
    Rosa Simon Tara Ulrich Vera Walter Xenia Yusuf Zoe Amir Bella Carlos Diana Emil Fatima Georg Hanna
    Ivan Julia Kofi Lara Mateo Nora Oscar Priya Ravi Sofia Thomas Uma Viktor Wanda Akira Beatrice Cedric
    Dolores Erik Fiona Gustav Heidi
    """
)
LAST_NAMES = words(
    """
    Berg Castro Dubois Eriksen Fischer Garcia Hansen Ivanova Jensen Keller Lopez Moretti Novak Olsen
    Petrov Quist Romero Schmidt Tanaka Urban Vogel Weber Xu Young Zimmer Abbott Brandt Cooper Dalton
    Evans Foster Grant Hughes Irving Jacobs Klein Lindgren Marsh Nolan Okafor Parker Rossi Singh Turner
    Ullman Vance Walsh Yamada
    """
)
CITIES = words(
    """
    Oslo Lisbon Vienna Prague Dublin Helsinki Madrid Warsaw Athens Berlin Paris London Rome Zurich Porto
    Lyon Turin Bergen Geneva Cork Leeds Boston Denver Austin Seattle Chicago Toronto Sydney Tokyo Osaka
    Nairobi Cairo Lima Quito Delhi Mumbai Seoul Hanoi Riga Vilnius
    """
)
JOBS = words(
    """
    nurse teacher pilot baker carpenter lawyer plumber dentist florist chemist welder translator
    librarian roofer barber gardener butcher tailor surgeon journalist mechanic painter drummer farmer
    photographer judge waiter cook sailor programmer clerk miller
    """
)
MONTHS = words(
    """
    January February March April May June July August September October November December
    """
)
ONES = words(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
    """
)
TENS = words(
    """
    zero ten twenty thirty forty fifty sixty seventy eighty ninety
    """
)


def spelled(number: int) -> str:
    """0 to 999 in words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")
    rest = number % 100
    return f"{ONES[number // 100]} hundred" + (f" and {spelled(rest)}" if rest else "")


def ordinal(number: int) -> str:
    """1 to 31 as 1st, 2nd, 3rd, 4th ..."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(0 if 10 < number < 20 else number % 10, "th")
    return f"{number}{ending}"
