"""An adapter's own tokens, as its tokeniser's files say: transformers' reading of these is the oracle."""

import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import AddedToken, AutoTokenizer

from tests.engine.driver import drive
from tests.engine.oracle import make_kind, make_model
from tests.fakes import VOCAB_SIZE, FakeEngineClient
from tests.server.conftest import Server
from toppings.adapters.errors import AdapterError
from toppings.adapters.registry import AdapterRegistry
from toppings.config import Config, EngineConfig
from toppings.core import FinishReason
from toppings.engine.base import open_registry
from toppings.sampling_params import Structure, StructureKind
from toppings.synth import write_tokenizer
from toppings.text import TextModel

CALL, WORD, STOP = range(VOCAB_SIZE, VOCAB_SIZE + 3)
PROMPT = "a zebra is <call> it"
CONFIG = LoraConfig(r=2, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model(tmp_path_factory.mktemp("base") / "model", vocab_size=VOCAB_SIZE, eos_token_id=1)
    write_tokenizer(path, VOCAB_SIZE)
    return path


def tokenizer_with(model: Path, *tokens: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_kind(tmp_path_factory.mktemp("adapters") / "own", model, CONFIG, num_added=3)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken("<call>")], special_tokens=True)
    tokenizer.add_tokens([AddedToken("zebra", lstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<stop>")], special_tokens=True)
    tokenizer.eos_token = "<stop>"
    tokenizer.chat_template = "{% for m in messages %}<call>{{ m.content }}{% endfor %}{{ eos_token }}"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def registry(model: Path, adapter: Path, tmp_path: Path) -> Iterator[AdapterRegistry]:
    registry = open_registry(
        EngineConfig(model=str(model), state_dir=str(tmp_path / "state"), dtype="float32")
    )
    registry.register("own", adapter)
    yield registry
    registry.close()


@pytest.fixture
async def own_server(
    engine: FakeEngineClient, registry: AdapterRegistry, model: Path
) -> AsyncIterator[Server]:
    server = Server(engine, registry, TextModel.load(model), Config.from_settings({"model": str(model)}))
    yield server
    await server.http.aclose()


async def test_text_is_encoded_and_decoded_as_the_adapters_own_tokeniser_does(
    own_server: Server, adapter: Path, model: Path
) -> None:
    theirs, base = (AutoTokenizer.from_pretrained(path) for path in (adapter, model))
    answer = [WORD, *theirs.encode(" runs", add_special_tokens=False), CALL, WORD]
    for name, tokenizer in (("own", theirs), ("base", base)):
        own_server.engine.script = lambda call: [*answer, STOP] if call.adapter_id else [7, 1]
        reply = await own_server.complete(PROMPT, model=name, logprobs=1)
        assert reply.status_code == 200, reply.text
        assert own_server.engine.calls[-1].prompt_token_ids == tokenizer.encode(PROMPT)
        told = (await own_server.post("/tokenize", model=name, prompt=PROMPT, return_token_strs=True)).json()
        assert told["tokens"] == tokenizer.encode(PROMPT)
        assert told["token_strs"] == tokenizer.convert_ids_to_tokens(told["tokens"])
        back = (await own_server.post("/detokenize", model=name, tokens=told["tokens"])).json()
        assert back["prompt"] == tokenizer.decode(told["tokens"])
        if name == "own":
            choice = reply.json()["choices"][0]
            assert choice["text"] == tokenizer.decode(answer, skip_special_tokens=True)
            assert "zebra" in choice["logprobs"]["tokens"]
    assert CALL in theirs.encode(PROMPT)
    assert max(base.encode(PROMPT)) < VOCAB_SIZE


async def test_its_chat_template_knows_its_special_tokens(own_server: Server, adapter: Path) -> None:
    theirs, chat = AutoTokenizer.from_pretrained(adapter), [{"role": "user", "content": "a zebra"}]
    await own_server.post("/v1/chat/completions", model="own", messages=chat, max_tokens=1)
    expected = theirs.apply_chat_template(chat, return_dict=False)
    assert own_server.engine.calls[-1].prompt_token_ids == expected
    assert expected[-1] == STOP


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [CALL]}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(CALL): 1}}),
        ("/v1/completions", {"prompt": "a", "allowed_token_ids": [CALL]}),
        ("/detokenize", {"tokens": [CALL]}),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"grammar": "start: <call>"}}),
    ],
)
async def test_they_are_the_adapters_alone(own_server: Server, path: str, body: dict[str, Any]) -> None:
    refused = await own_server.post(path, model="base", **body)
    assert refused.status_code == 400, refused.text
    assert str(CALL) in refused.text or "call" in refused.text
    taken = await own_server.post(path, model="own", **body)
    assert taken.status_code == 200, taken.text


def test_answers_end_with_its_end_token_and_structures_know_its_tokens(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    text = TextModel.load(model)
    prompt = text.encode("hello")
    call = Structure(StructureKind.GRAMMAR, 'start: <call> "x" <call>')
    with drive(model, tmp_path, {"own": adapter}) as driver:
        own = text.of(driver.registry.get("own").vocabulary)
        for name in ("own", None):
            driver.add(
                f"end {name}", prompt, 5, name, logit_bias=((STOP if name else 1, 100.0),), ignore_eos=False
            )
        schema = Structure(StructureKind.JSON_SCHEMA, '{"enum": ["zebra", 12]}')
        driver.add("json", prompt, 60, "own", structure=schema, ignore_eos=False)
        driver.add("call", prompt, 20, "own", structure=call, ignore_eos=False)
        driver.add("base's", prompt, 60, None, structure=schema, ignore_eos=False)
        driver.add("no call", prompt, 20, None, structure=call, ignore_eos=False)
        tokens = driver.run()
        finished = {name: each.finish_reason for name, each in driver.last.items()}
        error = driver.errors()["no call"]
    assert tokens["end own"] == [STOP]
    assert tokens["end None"] == [1]
    assert tokens["call"][0] == CALL
    assert [token for token in tokens["call"] if token in (CALL, STOP, 1)][:2] == [CALL, CALL]
    assert json.loads(own.decode(tokens["json"])) in ("zebra", 12)
    assert json.loads(text.decode(tokens["base's"])) in ("zebra", 12)
    assert max(tokens["base's"]) < VOCAB_SIZE
    assert "cannot be followed" in str(error)
    del finished["no call"]
    assert set(finished.values()) == {FinishReason.STOP}


def test_what_its_tokeniser_says_otherwise_is_told_or_refused(
    model: Path, registry: AdapterRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = make_kind(tmp_path / "plain", model, CONFIG)
    tokenizer_with(model, "<pad>").save_pretrained(plain)  # there are no weights for it
    assert registry.register("plain", plain).vocabulary is None
    assert "'<pad>' (id 512); they are not used" in caplog.text
    odd = make_kind(tmp_path / "odd", model, CONFIG, num_added=4)
    tokens = [{"id": 514, "content": "<x>", "special": True}]
    (odd / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    with pytest.raises(AdapterError, match="token '<x>' would have id 512 here, not 514"):
        registry.register("odd", odd)
    (odd / "tokenizer.json").unlink()
    (odd / "tokenizer_config.json").write_text('{"eos_token": "<nothing>"}')
    with pytest.raises(AdapterError, match="eos_token is '<nothing>', which is none of its tokens"):
        registry.register("odd", odd)
    (odd / "tokenizer_config.json").unlink()
    with caplog.at_level(logging.WARNING):
        vocabulary = registry.register("odd", odd).vocabulary
    assert vocabulary is not None
    assert (vocabulary.size, vocabulary.tokens) == (516, ())
    assert "they have no text" in caplog.text


def test_a_vocabulary_outlives_its_files_and_a_restart(
    model: Path, registry: AdapterRegistry, tmp_path: Path
) -> None:
    before = registry.get("own").vocabulary
    registry.close()
    again = open_registry(EngineConfig(model=str(model), state_dir=str(tmp_path / "state"), dtype="float32"))
    assert again.get("own").vocabulary == before
    assert before is not None
    assert [token.id for token in before.tokens] == [CALL, WORD, STOP]
    assert before.end_token_ids == (STOP,)
    again.close()
