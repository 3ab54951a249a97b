"""The rooms of `src/toppings` import from one another as docs/architecture.md says, no modules in a circle.

Imports count as they are written, wherever in a module; those for type checkers alone make no circle.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import toppings

SOURCE = Path(toppings.__file__).parent
DOCUMENT = Path(__file__).parents[1] / "docs" / "architecture.md"
ROOT = "toppings"


class Import(NamedTuple):
    importer: str
    imported: str
    is_for_types: bool


def modules_in(source: Path) -> dict[str, Path]:
    places = {path: path.relative_to(source.parent).with_suffix("").parts for path in source.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in places.items()}


def imports_in(modules: dict[str, Path]) -> list[Import]:
    """Those among the modules. What a package's name stands before counts as its module, else as the
    package."""
    found = []
    for name, path in modules.items():
        for whole, is_for_types in _imports(ast.parse(path.read_text()), is_for_types=False):
            other = whole if whole in modules else whole.rpartition(".")[0]
            if other in modules and other != name:
                found.append(Import(name, other, is_for_types))
    return found


def _imports(node: ast.AST, *, is_for_types: bool) -> Iterator[tuple[str, bool]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, is_for_types) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "an import says the whole name"
        yield from ((f"{node.module}.{alias.name}", is_for_types) for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for statement in node.body:
            yield from _imports(statement, is_for_types=True)
        for statement in node.orelse:
            yield from _imports(statement, is_for_types=is_for_types)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, is_for_types=is_for_types)


def rows_of(document: str) -> list[list[str]]:
    """The rooms of each row, from the top down, as prefixes of modules' names: `a/b/` is `toppings.a.b.`."""
    table = re.search(r"\n\| room \|.*\n\|[-|]+\n((?:\|.*\n)+)", document)
    assert table is not None, "there is no table of rooms"
    cells = [line.split("|")[1] for line in table[1].splitlines()]
    names = [re.findall(r"`([^`]+)`", cell) for cell in cells]
    return [
        [f"{ROOT}.{name.removesuffix('.py').rstrip('/').replace('/', '.')}." for name in row] for row in names
    ]


def row_of(module: str, rows: list[list[str]]) -> int | None:
    """Of the room that says most of the module's name."""
    fitting = [(len(room), i) for i, row in enumerate(rows) for room in row if f"{module}.".startswith(room)]
    return max(fitting)[1] if fitting else None


def upward(imports: list[Import], rows: list[list[str]]) -> list[str]:
    """The package itself is above all rooms, and what is imported of it is its version."""
    found = []
    for importer, imported, _ in imports:
        if ROOT in (importer, imported):
            continue
        above, below = row_of(importer, rows), row_of(imported, rows)
        if above is None or below is None or below < above:
            found.append(f"{importer} imports {imported}")
    return found


MODULES = modules_in(SOURCE)
ROWS = rows_of(DOCUMENT.read_text())


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return imports_in(MODULES)


def test_every_module_is_in_a_room_and_every_room_is_there() -> None:
    assert [name for name in MODULES if name != ROOT and row_of(name, ROWS) is None] == []
    rooms = [room for row in ROWS for room in row]
    assert len(set(rooms)) == len(rooms)
    assert [room for room in rooms if not any(f"{name}.".startswith(room) for name in MODULES)] == []


def test_rooms_import_only_downward(imports: list[Import]) -> None:
    assert len(imports) > 500
    assert upward(imports, ROWS) == []


def test_no_modules_import_one_another_in_a_circle(imports: list[Import]) -> None:
    graph: dict[str, set[str]] = {}
    for importer, imported, is_for_types in imports:
        if not is_for_types and ROOT not in (importer, imported):
            graph.setdefault(importer, set()).add(imported)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_an_import_that_goes_up_and_one_in_a_circle_are_found(tmp_path: Path) -> None:
    source = tmp_path / ROOT
    (source / "low").mkdir(parents=True)
    (source / "__init__.py").touch()
    (source / "high.py").write_text("from toppings.low.a import x\n")
    (source / "low" / "a.py").write_text("def f():\n    from toppings.low import b\n")
    (source / "low" / "b.py").write_text(
        "from typing import TYPE_CHECKING\nimport toppings.low.a\n"
        "if TYPE_CHECKING:\n    from toppings import high\n"
    )
    imports = imports_in(modules_in(source))
    rows = rows_of("\n| room | what |\n|---|---|\n| `high.py` | |\n| `low/` | |\n")
    assert upward(imports, rows) == ["toppings.low.b imports toppings.high"]
    graph = {
        name: {i.imported for i in imports if i.importer == name and not i.is_for_types}
        for name, *_ in imports
    }
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()
