"""The page's files: nothing from outside, nothing inline, nothing that makes markup of a text."""

import re
from html.parser import HTMLParser

import pytest

from toppings.dashboard.page import FOLDER, HEADERS, INDEX, TYPES, Search, assets, is_page

FILES = {name: asset.content.decode() for name, asset in assets().items()}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
EXPORT = r"^export (?:async )?(?:function|const|class) (\w+)"
MAKES_MARKUP = (
    *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "createContextualFragment"),
    *("DOMParser", "setHTML", "srcdoc", "eval(", "new Function", "javascript:", 'setAttribute("style'),
)


class Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page() -> Reader:
    return Reader(FILES[INDEX])


def test_every_file_has_a_type_and_is_small() -> None:
    assert {file.suffix for file in FOLDER.iterdir()} <= TYPES.keys()
    assert sum(map(len, FILES.values())) < 64 * 2**10


def test_nothing_is_inline(page: Reader) -> None:
    for tag, attributes in page.tags:
        assert tag != "style"
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert re.findall(r"<script[^>]*>(.*?)</script>", FILES[INDEX], re.DOTALL) == [""]


def test_nothing_comes_from_outside(page: Reader) -> None:
    for _, attributes in page.tags:
        for name in ("src", "href", "action"):
            place = attributes.get(name)
            assert place is None or place.startswith(("#", "dashboard/static/"))
            if place and not place.startswith("#"):
                assert place.removeprefix("dashboard/static/") in FILES
    for name, text in FILES.items():
        places = set(re.findall(r"[a-z]+://[^\s\"'`]+", text)) - {"http://www.w3.org/2000/svg"}
        assert places == set(), name
        assert "url(" not in text
        assert "@import" not in text


def test_scripts_import_each_other_and_nothing_else() -> None:
    for name, text in SCRIPTS.items():
        imports = re.findall(r"from \"([^\"]+)\"", text)
        assert all(each.startswith("./") and each[2:] in SCRIPTS for each in imports), name
        wanted = re.findall(r"^import \{([^}]+)\} from \"\./([^\"]+)\"", text, re.MULTILINE)
        for names, other in wanted:
            exported = set(
                re.findall(r"^export (?:async )?(?:function|const|class) (\w+)", SCRIPTS[other], re.M)
            )
            assert {each.strip() for each in names.split(",")} - {""} <= exported


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_makes_markup_of_a_text(name: str) -> None:
    assert [each for each in MAKES_MARKUP if each in SCRIPTS[name]] == []


def test_every_element_that_scripts_look_for_is_there_once(page: Reader) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    looked_for = {each for text in SCRIPTS.values() for each in re.findall(r"byId\(\"([\w-]+)\"\)", text)}
    assert looked_for
    assert looked_for <= set(ids)


def test_it_can_be_used_by_keyboard_and_read_aloud(page: Reader) -> None:
    assert page.tags[0] == ("html", {"lang": "en"})
    labelled = {attributes["for"] for tag, attributes in page.tags if tag == "label"}
    assert {attributes["id"] for tag, attributes in page.tags if tag == "input"} == labelled
    titles = {attributes["id"] for tag, attributes in page.tags if tag == "h2"}
    assert {a["aria-labelledby"] for tag, a in page.tags if tag == "section"} == titles
    assert all("tabindex" not in a or a["tabindex"] in ("0", "-1") for _, a in page.tags)
    assert ("viewport", "width=device-width, initial-scale=1") in [
        (a.get("name"), a.get("content")) for _, a in page.tags
    ]
    style = FILES["style.css"]
    assert "prefers-color-scheme: dark" in style
    assert ":focus-visible" in style
    assert "outline: none" not in style


def test_the_policy_lets_nothing_else_in() -> None:
    rules = dict(part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";"))
    assert rules["default-src"] == "'none'"
    for name, value in rules.items():
        assert value in ("'self'", "'none'", "'script'"), name
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert HEADERS["X-Content-Type-Options"] == "nosniff"


def test_only_the_pages_own_paths_are_open() -> None:
    assert is_page("/dashboard")
    assert is_page("/dashboard/static/app.js")
    closed = (
        "/dashboard/data",
        "/dashboard/events",
        "/dashboard/adapters",
        "/dashboardx",
        "/dashboard/",
        "/",
    )
    assert not any(map(is_page, closed))


def test_a_search_finds_a_page_of_names() -> None:
    names = [f"adapter-{number:05}" for number in range(10_000)]
    assert Search.of({}).page(names) == (10_000, names[:50])
    assert Search.of({"find": "R-0012", "limit": "3"}).page(names) == (10, names[120:123])
    assert Search.of({"find": "ADAPTER-09", "offset": "998"}).page(names) == (
        1000,
        names[9998 - 0 : 10_000][:2],
    )
    assert Search.of({"find": "nowhere"}).page(names) == (0, [])


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"limit": "0"}, "limit is '0'; it must be a number from 1 to 200"),
        ({"limit": "201"}, "limit is '201'"),
        ({"offset": "-1"}, "offset is '-1'"),
        ({"offset": "\u0663"}, "offset is"),
        ({"offset": "9" * 5000}, "offset is '9999"),
        ({"find": "x" * 257}, "find has 257 characters; it may have 256"),
    ],
)
def test_a_bad_search_is_told_what_is_wrong(query: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        Search.of(query)
    assert len(str(raised.value)) < 200
