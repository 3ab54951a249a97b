"""Classes of requests by what is promised to them: `interactive` ones are to be within the objectives, and
`batch` ones have time.

A batch request takes what interactive ones leave: a router sends it where it breaks nobody's objective, or
holds it until there is such a place; a server starts it after interactive ones, and has it make way for one
that needs its place.
"""

from toppings.bad_input import shown

SLO_CLASS_HEADER = "X-Toppings-SLO-Class"
INTERACTIVE, BATCH = "interactive", "batch"
SLO_CLASSES = (INTERACTIVE, BATCH)


def is_batch(asked: str | None, tenants: str = INTERACTIVE) -> bool:
    """Whether a request is, by the class that its header asks for and by its tenant's: where that is batch,
    all are. Raises ValueError for a class that there is not.
    """
    asked = asked.strip().lower() if asked is not None else ""
    if asked and asked not in SLO_CLASSES:
        raise ValueError(f"{SLO_CLASS_HEADER} is {shown(repr(asked))}; it must be {' or '.join(SLO_CLASSES)}")
    return BATCH in (asked, tenants)
