"""Questions about one table, as SQL that SQLite runs; right is what gives the same rows."""

import sqlite3
from contextlib import closing
from random import Random
from typing import Any

from tasks.task import Draw, Item, Task

# A table: what its rows are called, its columns of text with their values, its columns of numbers.
TABLES: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    "staff": (
        "people",
        {"city": "Oslo Rome Paris Cairo", "team": "sales press legal tax"},
        ("age", "salary"),
    ),
    "orders": (
        "orders",
        {"country": "Spain Italy Japan Peru", "status": "open paid late sent"},
        ("total", "weight"),
    ),
    "books": (
        "books",
        {"genre": "crime poetry travel art", "language": "French Dutch Greek Czech"},
        ("pages", "price"),
    ),
    "flights": (
        "flights",
        {"origin": "Riga Cork Lima Turin", "airline": "Alpha Nordic Sol Zeta"},
        ("seats", "delay"),
    ),
    "films": (
        "films",
        {"country": "India Chile Egypt Kenya", "genre": "drama horror comedy war"},
        ("year", "length"),
    ),
    "houses": (
        "houses",
        {"town": "Bath York Leeds Truro", "style": "brick wood stone clay"},
        ("rooms", "price"),
    ),
    "players": (
        "players",
        {"club": "Reds Blues Lions Owls", "role": "goal wing back centre"},
        ("goals", "age"),
    ),
    "plants": (
        "plants",
        {"colour": "red white blue pink", "soil": "sand loam chalk peat"},
        ("height", "price"),
    ),
}
COUNTS = (1, 2, 4, 6)  # rows of a column's four values: all different, so that a count tells them apart
NUM_DATABASES = 2  # a query must be right on each, to be right by luck less often
MAX_STEPS = 200_000  # of SQLite's machine, in one query
ASKS = (
    ("How many {rows} have {text} {value}?", "SELECT COUNT(*) FROM {table} WHERE {text} = '{value}'"),
    ("Which {rows} have a {num} over {n}?", "SELECT name FROM {table} WHERE {num} > {n}"),
    (
        "What is the highest {num} with {text} {value}?",
        "SELECT MAX({num}) FROM {table} WHERE {text} = '{value}'",
    ),
    ("What is the average {num}?", "SELECT AVG({num}) FROM {table}"),
    ("Names of {rows} whose {text} is {value}", "SELECT name FROM {table} WHERE {text} = '{value}'"),
    ("Sum of {num} where {text} is {value}", "SELECT SUM({num}) FROM {table} WHERE {text} = '{value}'"),
    ("How many {rows} have a {num} under {n}?", "SELECT COUNT(*) FROM {table} WHERE {num} < {n}"),
    (
        "What is the lowest {num} with {text} {value}?",
        "SELECT MIN({num}) FROM {table} WHERE {text} = '{value}'",
    ),
    ("Count the {rows} for each {text}.", "SELECT {text}, COUNT(*) FROM {table} GROUP BY {text}"),
    ("Names of all {rows}, highest {num} first", "SELECT name FROM {table} ORDER BY {num} DESC"),
)


def draw(source: Draw) -> Item:
    table = source.one(tuple(TABLES))
    rows, texts, numbers = TABLES[table]
    text = source.any(tuple(texts))
    fields = {
        "table": table,
        "rows": rows,
        "text": text,
        "value": source.any(texts[text].split()),
        "num": source.any(numbers),
        "n": source.number(2, 90),
    }
    question, query = source.any(ASKS)
    columns = ", ".join(("name", *texts, *numbers))
    return Item(f"{table}({columns})\n{question.format(**fields)}", query.format(**fields))


def filled(name: str, seed: int) -> sqlite3.Connection:
    """A database with the one table; no number comes twice in a column, so that an order is the only one."""
    _, texts, numbers = TABLES[name]
    random = Random(f"{name} {seed}")
    columns = [[f"n{row}" for row in range(sum(COUNTS))]]
    for values in texts.values():
        counts = random.sample(COUNTS, len(COUNTS))
        columns.append(random.sample(values.split(), sum(COUNTS), counts=counts))
    columns += [[*map(str, random.sample(range(1, 100), sum(COUNTS)))] for _ in numbers]
    database = sqlite3.connect(":memory:")
    types = [
        *("name TEXT", *(f"{text} TEXT" for text in texts)),
        *(f"{number} INTEGER" for number in numbers),
    ]
    database.execute(f"CREATE TABLE {name} ({', '.join(types)})")
    database.executemany(f"INSERT INTO {name} VALUES (?{', ?' * (len(columns) - 1)})", zip(*columns))
    database.commit()
    return database


def result(name: str, seed: int, query: str) -> list[Any]:
    """The rows, sorted unless the query orders them. Raises sqlite3.Error for what fails or is slow."""
    with closing(filled(name, seed)) as database:
        database.execute("PRAGMA query_only = ON")
        database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        steps = iter(range(MAX_STEPS // 1000))
        database.set_progress_handler(lambda: int(next(steps, None) is None), 1000)
        rows = database.execute(query).fetchmany(1000)
    return rows if "ORDER BY" in query.upper() else sorted(rows, key=repr)


def score(item: Item, answer: str) -> float:
    """Whether the answer's one query gives the wanted rows; marks of a code block around it do not count."""
    table = item.text.split("(")[0]
    query = answer.strip().removeprefix("```sql").strip("`").strip()
    try:
        is_right = all(
            result(table, seed, query) == result(table, seed, item.answer) for seed in range(NUM_DATABASES)
        )
    except (sqlite3.Error, sqlite3.Warning):
        return 0.0
    return float(is_right)


TASK = Task(
    "sql",
    "a question about a table, as SQL (run in SQLite)",
    "Write the SQL query, nothing else.",
    draw,
    score,
    max_tokens=40,
)
