"""Jobs for adapters, each with its data and its score."""

from tasks import contacts, dates, intents, quantities, sentiment, sql
from tasks.task import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (contacts, dates, intents, quantities, sentiment, sql)
}
