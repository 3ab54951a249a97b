"""Jobs for adapters, each with its data and its score."""

from tasks import (
    clock,
    commits,
    contacts,
    dates,
    intents,
    phones,
    quantities,
    redact,
    sentiment,
    shell,
    slugs,
    sql,
    tickets,
)
from tasks.task import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (
        *(clock, commits, contacts, dates, intents, phones, quantities, redact, sentiment, shell, slugs, sql),
        tickets,
    )
}
