"""Jobs for adapters, each with its data and its score."""

from tasks import authors, contacts, dates, intents, quantities, sentiment, sql, tickets
from tasks.task import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (authors, contacts, dates, intents, quantities, sentiment, sql, tickets)
}
