import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.fakes import Call, FakeEngineClient
from toppings.bad_input import RequestError
from toppings.core import FinishReason
from toppings.detokenizer import Detokenizer, GenerationCutError, GenerationError, TextOutput, generate_text
from toppings.sampling_params import SamplingParams
from toppings.stop_strings import StopMatcher
from toppings.synth import write_tokenizer
from toppings.text import TextModel

UNICODE = "naïve café — 東京 🦜🎉 end"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, 512)
    return TextModel.load(path)


def scripted(tokens: list[int]) -> Callable[[Call], list[int]]:
    return lambda _: tokens


async def outputs(
    text: TextModel, engine: FakeEngineClient, sampling: SamplingParams, *, include_stop: bool = False
) -> list[TextOutput]:
    stream = generate_text(engine, text, [5], sampling, include_stop=include_stop)
    return [output async for output in stream]


def plain(text: TextModel, value: str) -> list[int]:
    return text.encode(value, add_special_tokens=False)


def test_text_in_pieces_is_the_text_in_one_piece(text: TextModel) -> None:
    detokenizer = Detokenizer(text)
    pieces = [detokenizer.push(token_id) for token_id in plain(text, UNICODE)]
    assert "".join(pieces) + detokenizer.flush() == UNICODE


def test_no_piece_shows_half_a_character(text: TextModel) -> None:
    detokenizer = Detokenizer(text)
    assert all("\ufffd" not in detokenizer.push(token_id) for token_id in plain(text, UNICODE))


def test_an_unfinished_character_comes_out_at_the_end(text: TextModel) -> None:
    detokenizer = Detokenizer(text)
    tokens = plain(text, "🦜")[:2]
    assert [detokenizer.push(token_id) for token_id in tokens] == ["", ""]
    assert detokenizer.flush() == text.decode(tokens)


def test_bytes_that_are_never_a_character_are_not_held_for_ever(text: TextModel) -> None:
    detokenizer = Detokenizer(text)
    broken = plain(text, "é")[-1]
    assert any(detokenizer.push(broken) for _ in range(20))


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_stop_string_is_found_across_pieces(size: int) -> None:
    matcher = StopMatcher(["STOP"])
    shown, ended = "", None
    value = "S ST STO no STOP after"
    for start in range(0, len(value), size):
        piece, ended = matcher.push(value[start : start + size])
        shown += piece
        if ended:
            break
    assert (shown, ended) == ("S ST STO no ", "STOP")


def test_what_might_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("text E") == ("text ", None)
    assert matcher.push("Nough") == ("ENough", None)


def test_held_text_is_shown_when_the_stop_string_never_comes() -> None:
    matcher = StopMatcher(["END"])
    matcher.push("EN")
    assert matcher.flush() == "EN"


def test_the_earliest_stop_string_wins() -> None:
    assert StopMatcher(["later", "soon"]).push("soon or later") == ("", "soon")


async def test_a_stop_string_ends_the_text_and_aborts_the_request(text: TextModel) -> None:
    engine = FakeEngineClient(scripted(plain(text, "one two three four")))
    result = await outputs(text, engine, SamplingParams(max_tokens=99, stop=("three",)))
    assert "".join(o.text for o in result) == "one two "
    assert (result[-1].finish_reason, result[-1].stop_reason) == (FinishReason.STOP, "three")
    assert engine.calls[0].was_aborted


async def test_a_stop_string_is_shown_when_asked_for(text: TextModel) -> None:
    engine = FakeEngineClient(scripted(plain(text, "one two three four")))
    result = await outputs(text, engine, SamplingParams(max_tokens=99, stop=("three",)), include_stop=True)
    assert "".join(o.text for o in result) == "one two three"


async def test_stop_strings_do_not_count_before_min_tokens(text: TextModel) -> None:
    tokens = plain(text, "x x x x")
    engine = FakeEngineClient(scripted(tokens))
    sampling = SamplingParams(max_tokens=len(tokens), min_tokens=len(tokens), stop=("x",))
    result = await outputs(text, engine, sampling)
    assert "".join(o.text for o in result) == "x x x x"


async def test_the_token_that_ended_the_text_is_not_shown(text: TextModel) -> None:
    tokens = plain(text, "abc!")
    engine = FakeEngineClient(scripted(tokens))
    result = await outputs(text, engine, SamplingParams(max_tokens=99, stop_token_ids=(tokens[-1],)))
    assert "".join(o.text for o in result) == "abc"
    assert result[-1].stop_reason == tokens[-1]
    assert sum(len(o.token_ids) for o in result) == len(tokens)


async def test_all_text_is_out_with_the_last_token(text: TextModel) -> None:
    tokens = plain(text, "🦜🎉")
    for count in range(1, len(tokens) + 1):
        engine = FakeEngineClient(scripted(tokens[:count]))
        result = await outputs(text, engine, SamplingParams(max_tokens=count, stop=("never",)))
        assert "".join(o.text for o in result) == text.decode(tokens[:count])


async def test_an_engine_error_is_raised_with_its_reason(text: TextModel) -> None:
    with pytest.raises(GenerationError, match="weights are gone"):
        await outputs(text, FakeEngineClient(error="weights are gone"), SamplingParams())


async def test_a_cut_request_is_told_apart_from_a_failed_one(text: TextModel) -> None:
    engine = FakeEngineClient()
    engine.cut.set()
    with pytest.raises(GenerationCutError):
        await outputs(text, engine, SamplingParams())


async def test_closing_the_text_closes_the_request(text: TextModel) -> None:
    engine = FakeEngineClient()
    stream = generate_text(engine, text, [5], SamplingParams(max_tokens=50))
    await anext(stream)
    await stream.aclose()
    assert engine.calls[0].was_aborted


async def test_cancelling_a_waiting_reader_closes_the_request(text: TextModel) -> None:
    engine = FakeEngineClient()
    engine.gate.clear()
    reader = asyncio.create_task(outputs(text, engine, SamplingParams()))
    await asyncio.sleep(0.01)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    assert engine.calls[0].was_aborted


async def test_logprobs_carry_token_texts(text: TextModel) -> None:
    tokens = plain(text, " to")
    engine = FakeEngineClient(scripted(tokens))
    [first, *_] = await outputs(text, engine, SamplingParams(max_tokens=len(tokens), logprobs=1))
    assert first.logprobs is not None
    assert first.logprobs[0].text == text.token_text(tokens[0])
    assert first.logprobs[0].top == [(tokens[0], text.token_text(tokens[0]), -0.5)]


def test_token_texts_keep_their_leading_space(text: TextModel) -> None:
    assert "".join(text.token_text(t) for t in plain(text, "a to the")) == "a to the"


def test_a_special_token_has_its_name_as_text(text: TextModel) -> None:
    assert text.token_text(1) == "<|end|>"


def test_chat_uses_the_template(text: TextModel) -> None:
    tokens = text.chat([{"role": "user", "content": "hi"}])
    assert (
        text.decode(tokens, skip_special_tokens=False)
        == "<|begin|><|turn|>user\nhi<|end|><|turn|>assistant\n"
    )


def test_chat_can_continue_the_last_message(text: TextModel) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
    tokens = text.chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.decode(tokens, skip_special_tokens=False).endswith("assistant\nWell")


def test_chat_without_a_template_says_so(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 512)
    config = (tmp_path / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config.replace("chat_template", "unused"))
    with pytest.raises(RequestError, match="no chat template"):
        TextModel.load(tmp_path).chat([{"role": "user", "content": "hi"}])


def test_a_directory_without_tokeniser_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read a tokeniser"):
        TextModel.load(tmp_path)


def test_byte_tokens_of_sentencepiece_have_their_byte() -> None:
    vocab = {"<unk>": 0, "a": 1, "▁": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    model = TextModel(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    ids = model.encode("€a", add_special_tokens=False)
    assert [model.token_bytes(i) for i in ids] == [b"\xe2", b"\x82", b"\xac", b"a"]
    assert [model.token_name(i) for i in ids] == [r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac", "a"]


def test_a_replacement_character_of_the_text_is_itself(text: TextModel) -> None:
    ids = text.encode("\ufffd", add_special_tokens=False)
    assert b"".join(text.token_bytes(i) for i in ids) == "\ufffd".encode()


def test_held_text_costs_no_more_the_longer_it_is() -> None:
    """Each character is looked at once or twice for each stop string, however much is held back."""
    matcher = StopMatcher(["a" * 1023 + chr(0x100 + i) for i in range(4)])
    calls: list[int] = []
    for begun in matcher._begun:
        begun._border = _counted(begun._border, calls)  # type: ignore[method-assign, assignment]
    for _ in range(4000):
        matcher.push("a")
    assert len(calls) < 2 * 4 * 4000


def _counted(function: Callable[[int], int], calls: list[int]) -> Callable[[int], int]:
    def counted(length: int) -> int:
        calls.append(length)
        return function(length)

    return counted
