"""What the documents name is there: options, settings, metrics, files, and what their links lead to."""

import asyncio
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from peft import LoraConfig, LoraModel, VeraConfig
from typer import Context
from typer.core import TyperGroup

from tests.engine.driver import drive
from tests.engine.oracle import make_model
from toppings import command
from toppings.adapters.merges import METHODS
from toppings.adapters.records import AdapterRecord
from toppings.adapters.text_files import SPECIAL_NAMES
from toppings.cluster.placement import PLACEMENTS
from toppings.cluster.policies import POLICIES
from toppings.cluster.ray_serve.settings import FleetConfig
from toppings.cluster.router.meters import Meters
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.config import MODES, EngineConfig, ServerConfig
from toppings.core import FUSED_MODULES, MODULES
from toppings.engine.assist import Assist
from toppings.messages import EngineStats, MergedStatus
from toppings.model.families import Family
from toppings.sampling_params import SamplingParams
from toppings.server import lightllm, lorax
from toppings.server.chat_body import ChatBody
from toppings.server.embeddings import EmbeddingBody, ScoreBody
from toppings.server.fields import LenientBody
from toppings.server.messages_body import MessagesBody
from toppings.server.metrics import Metrics
from toppings.server.models import LoadBody, MergeBody
from toppings.server.protocol import CompletionBody, StreamOptions
from toppings.server.responses_body import ResponsesBody
from toppings.server.schemas.administration import MergedPart
from toppings.server.tokens import DetokenizeBody, TokenizeBody
from toppings.sim.settings import SimConfig
from toppings.tenants.file import parse
from toppings.tenants.tenant import Tenant

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = (EngineConfig, ServerConfig, RouterConfig, InstanceConfig, FleetConfig, SimConfig, Tenant)
OF_MODELS = {"desc_act", "gate_up", "lm_head", "model_type", "tie_word_embeddings", *FUSED_MODULES}
BODIES = (
    *(CompletionBody, ChatBody, ResponsesBody, MessagesBody, TokenizeBody, DetokenizeBody),
    *(EmbeddingBody, ScoreBody),
    *(lorax.Body, lorax.Parameters, lightllm.Body, lightllm.Parameters, StreamOptions),
)
OF_BODIES = {name for each in BODIES for name in (*each.known(), *each.neutral, *each.harmless)}
OF_MERGES = {
    *("add_weighted_adapter",) * hasattr(LoraModel, "add_weighted_adapter"),
    *METHODS,
    *(name for each in (LoadBody, MergeBody, MergedPart) for name in each.model_fields),
}
OF_REQUESTS = {
    *(
        "budget_tokens",
        "cache_control",
        "count_tokens",
        "hash_ids",
        "lora_int_id",
        "lora_name",
    ),
    *("max_model_len", "src"),
}
OF_ANSWERS = {
    *(
        "cached_tokens",
        "context_length_exceeded",
        "invalid_api_key",
        "rate_limit_exceeded",
        "slo_unattainable",
        "finish_reason",
        "is_error",
        "reasoning_text",
        "token_strs",
    ),
    "tool_result",
}
OF_TOOLS = {
    *(
        "allowed_tools",
        "deepseek_r1",
        "enable_thinking",
        "llama3_json",
        "mistral_named",
        "reasoning_content",
        "tool_call_id",
    ),
    *("tool_calls", "tool_use"),
}
OF_RECORDS = {
    *("request_id", "prompt_tokens", "completion_tokens"),
    *("wait_ms", "queue_ms", "ttft_ms", "tpt_ms", "e2e_ms", "read_ms", "copy_ms", "exposed_ms"),
}
FOLDERS = ("benchmarks", "configs", "deploy", "docker", "docs", "examples", "scripts", "src", "tests")
OF_OTHER_COMMANDS = {"--help", "--build-arg", "--shm-size"}  # Docker's
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")


def _options(command: Any) -> dict[tuple[str, ...], set[str]]:
    """Every verb with its options, those of verbs below it as well."""
    own = {name for param in command.params for name in param.opts}
    if not isinstance(command, TyperGroup):
        return {(): own}
    context = Context(command)
    groups = {name: command.get_command(context, name) for name in command.list_commands(context)}
    below = {(name, *verb): opts for name, sub in groups.items() for verb, opts in _options(sub).items()}
    return {(): own.union(*below.values()), **below}


SCRIPTS = {
    option
    for folder in ("benchmarks", "examples")
    for file in (ROOT / folder).rglob("*.py")
    for option in OPTION.findall(file.read_text())
}
VERBS = _options(typer.main.get_command(command.app))


def _code(text: str) -> list[str]:
    """Lines of indented and fenced code, and inline code, each with what continues it."""
    joined = text.replace("\\\n", " ")
    indented = re.findall(r"^    (.+)$", joined, re.MULTILINE)
    fenced = [
        line for block in re.findall(r"```.*?\n(.*?)```", joined, re.DOTALL) for line in block.split("\n")
    ]
    return [*indented, *fenced, *re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", joined)]


def _missing(code: str) -> list[str]:
    """Options in a command line of `toppings` that its verb has not."""
    words = code.partition("#")[0].split()
    at = next((i for i, word in enumerate(words) if word.rpartition("/")[2] == "toppings"), None)
    if at is None:
        return []
    verb: tuple[str, ...] = ()
    for word in words[at + 1 :]:
        if (*verb, word) not in VERBS and not any(known[: len(verb) + 1] == (*verb, word) for known in VERBS):
            break
        verb = (*verb, word)
    if not verb:
        return []  # of another command, for which toppings is but a word
    known = VERBS[verb] | {"--help"}
    return [name for name in OPTION.findall(" ".join(words[at:])) if name not in known]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_in_a_documents_command_is_one_of_its_verb(document: Path) -> None:
    missing = {code: gone for code in _code(document.read_text()) if (gone := _missing(code))}
    assert missing == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_named_by_itself_is_one_of_some_verb(document: Path) -> None:
    alone = {code.split()[0] for code in _code(document.read_text()) if OPTION.match(code)}
    assert alone - VERBS[()] - SCRIPTS - OF_OTHER_COMMANDS == set()


def test_route_has_an_option_for_every_setting() -> None:
    names = {f"--{f.name.replace('_', '-')}" for f in fields(RouterConfig)}
    assert names - VERBS[("route",)] == set()


def test_the_routers_settings_are_documented_with_their_defaults() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    block = next(block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "policy:" in block)
    documented = {**yaml.safe_load(block), "instances": ()}
    defaults = {f.name: f.default for f in fields(RouterConfig)}
    assert documented == defaults


@pytest.mark.parametrize("body", BODIES, ids=lambda body: f"{body.__module__}.{body.__name__}")
def test_every_field_of_a_body_is_documented(body: type[LenientBody]) -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    named = set(re.findall(r"`([A-Za-z_0-9]+)`", text))
    assert {*body.known(), *body.neutral, *body.harmless} - named == set()


def _anchors(text: str) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _dead_links(document: Path, text: str) -> Iterator[str]:
    """Relative links to a file or a heading that is not there."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        file = document.parent / path if path else document
        target = text if not path else file.read_text() if file.is_file() and anchor else ""
        if not file.exists() or (anchor and anchor not in _anchors(target)):
            yield link


def _lost_files(text: str) -> Iterator[str]:
    """Paths from the repository's root, and modules below `src/toppings`, that are not there."""
    for code in _code(text):
        for path in re.findall(r"(?<![\w./~-])(?:[\w-]+/)+[\w.*-]*", code):
            first, is_module = path.partition("/")[0], path.endswith(".py")
            roots = [ROOT] if first in FOLDERS else [ROOT / "src" / "toppings"] if is_module else []
            if roots and not any(list(root.glob(path.rstrip("./"))) for root in roots):
                yield path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_are_there(document: Path) -> None:
    text = document.read_text()
    assert list(_dead_links(document, text)) == []
    assert list(_lost_files(text)) == []


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> EngineStats:
    home = tmp_path_factory.mktemp("documents")
    with drive(make_model(home / "model"), home / "state", {}, merged_mode="auto") as driver:
        return driver.engine.stats(0)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_metrics_are_those_of_a_server(document: Path, stats: EngineStats) -> None:
    told = asyncio.run(Metrics("base").render(stats, str, 0)).decode()
    metrics = set(re.findall(r"^# TYPE (\S+)", told, re.MULTILINE))
    named = set(re.findall(r"\b(?:toppings|vllm):[a-z]+_[a-z_]+", "\n".join(_code(document.read_text()))))
    assert named - metrics == set()


def test_the_table_of_the_routers_metrics_has_all_of_them() -> None:
    table = r"^\| `toppings_router_…` .*\n\|-.*\n((?:\|.*\n)+)"
    [rows] = re.findall(table, (ROOT / "docs" / "cluster.md").read_text(), re.MULTILINE)
    named = {name for row in rows.splitlines() for name in re.findall(r"`([a-z_]+)", row.split("|")[1])}
    told = re.findall(r"^# TYPE toppings_router_(\S+) ", Meters().render().decode(), re.MULTILINE)
    assert named == {name for name in told if not name.endswith("_created")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_are_those_of_settings_or_known_others(document: Path, stats: EngineStats) -> None:
    """A setting that has gone, or is misspelt, is none of these."""
    of_peft = (LoraConfig, VeraConfig)
    known = {field.name for each in (*SETTINGS, SamplingParams, Family, *of_peft) for field in fields(each)}
    known |= {
        *MODES,
        *MODULES,
        *POLICIES,
        *PLACEMENTS,
        *stats.counters,
        *(field.name for each in (MergedStatus, AdapterRecord) for field in fields(each)),
        *OF_MODELS,
        *OF_REQUESTS,
        *OF_BODIES,
        *OF_ANSWERS,
        *OF_TOOLS,
        *OF_MERGES,
        *OF_RECORDS,
        *SPECIAL_NAMES,
    }
    known |= set(
        re.findall(r'"(assist_\w+)"', inspect.getsource(Assist.counters))
    )  # of a server with workers
    known |= set(re.findall(r"^# TYPE toppings_router_(\S+) ", Meters().render().decode(), re.MULTILINE))
    named = set(re.findall(r"(?<!`)`([a-z]+(?:_[a-z0-9]+)+)`", document.read_text()))
    assert named - known == set()


def test_a_check_of_documents_finds_what_is_not_there() -> None:
    assert _missing("toppings route --nonsense 3 --policy random") == ["--nonsense"]
    assert _missing(".venv/bin/toppings up --candidates 2") == ["--candidates"]
    links = "## One `thing`, said\n[a](#one-thing-said) [b](#two) [c](../README.md#toppings) [d](gone.md)"
    assert list(_dead_links(ROOT / "docs" / "cpu.md", links)) == ["#two", "gone.md"]
    files = "`src/toppings/`, `python tests/gone.py --x`, `engine/engine.py`, `engine/gone.py`"
    assert list(_lost_files(files)) == ["tests/gone.py", "engine/gone.py"]


def test_the_settings_of_a_tenant_are_documented_with_their_defaults() -> None:
    text = (ROOT / "docs" / "tenants.md").read_text()
    rows = re.findall(r"^\| `([a-z_]+)` \| ([^|]+) \|", text, re.MULTILINE)
    defaults = {f.name: f.default for f in fields(Tenant) if f.name != "name"}
    assert [name for name, _ in rows] == list(defaults)
    words = {
        "interactive": "interactive",
        "on": "on",
        "off": "off",
        "none": (),
        '`["*"]`': ("*",),
        "0": 0,
        "1": 1,
    }
    assert {name: words[told.split()[0]] for name, told in rows} == defaults


def test_the_example_of_a_tenants_file_can_be_read() -> None:
    text = (ROOT / "docs" / "tenants.md").read_text()
    [example] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert list(parse(example, "tenants.yaml").tenants) == ["search", "trial", "operations"]
