"""Adapters whose configuration is odd."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile.values import DEPTH, MEGABYTE
from hostile.workshop import CONFIG, Kind, Make, Workshop

NAN, INFINITY = float("nan"), float("inf")
BACKTRACKS = r"(([a-z0-9._]+)+)+!"
"""Matches no projection, and takes Python's matcher longer than anyone waits to find out."""

_ODD: dict[str, tuple[Any, ...]] = {
    "peft_type": (..., None, "lora", "IA3", "LOHA", "ADALORA", "PROMPT_TUNING", "X" * 1000, 5, [], {}),
    "r": (..., None, 0, -1, 1.5, "8", True, [], {}, NAN, 3, 8, 513, 2**31, 2**64),
    "lora_alpha": (None, "16", [], {}, True, NAN, INFINITY, -INFINITY, 1e30, 1e31, 1e300, 10**400),
    "use_rslora": ("yes", 1, [], {"a": 1}),
    "rank_pattern": (
        *([], "q_proj", 5, {"q_proj": 0}, {"q_proj": "8"}, {"q_proj": None}, {"q_proj": 1.5}, {"(": 4}),
        *({"q_proj": 5}, {".*": 8}, {"q_proj": {}}, {BACKTRACKS: 4}, {"\\": 4}, {"[": 4}, {"(?P<a": 4}),
    ),
    "alpha_pattern": (
        *([], "q_proj", {"q_proj": "x"}, {"q_proj": NAN}, {"q_proj": 1e31}, {"q_proj": 1e30}, {"(": 1}),
        *({"q_proj": None}, {"q_proj": [1]}, {BACKTRACKS: 1}, {"x" * 100_000: 1}),
    ),
    "target_modules": (
        *(..., None, [], "", 5, {}, [5], [None], [[]], ["lm_head"], ["embed_tokens"], ["nothing"], "("),
        *(["q_proj"], ["q_proj", "k_proj", "v_proj"], "all-linear", "ALL-LINEAR", BACKTRACKS, r"(?<=q)_proj"),
        *(r"(q_proj)\1", "q_proj", ["Q_PROJ", "V_PROJ"], ["model.layers.0.self_attn.q_proj"], "a" * 100_000),
        *([f"module{i}" for i in range(50_000)], ["q_proj", "c_attn"], "(?i:.*Q_PROJ)", "(" * 5000),
    ),
    "exclude_modules": (5, {"a": 1}, "(", ["q_proj"], "q_proj", ".*", ["v_proj", 5], "(" * 5000),
    "layers_to_transform": (
        "0",
        [0, "1"],
        -1,
        [99],
        [0],
        True,
        1.5,
        {},
        [None],
        10**400,
        list(range(50_000)),
    ),
    "layers_pattern": ("(", 5, {}, [5], "nothing"),
    "bias": ("all", "lora_only", 5, True, [], "none "),
    "modules_to_save": (["lm_head"], ["embed_tokens"], "lm_head", ["nothing"], 5),
    "init_lora_weights": ("pissa", "pissa_niter_4", "PISSA", "olora", "corda", "loftq", "lora_ga"),
    "use_dora": (True, "yes", 1),
    "lora_bias": (True, "yes"),
    "fan_in_fan_out": ("yes",),
    "layer_replication": ([[0, 2]], "x", [[0, 99]]),
    "alora_invocation_tokens": ([1, 2], [], "x"),
    "trainable_token_indices": ([1], [], {"embed_tokens": [1]}),
    "target_parameters": (["mlp.experts"], "x"),
    "use_qalora": (True,),
    "use_bdlora": ({"target_modules_bd_a": ["q_proj"]},),
    "arrow_config": ({"top_k": 2},),
}
"""Values of fields; each is refused with the field's name in the reason, or served as PEFT would."""

_SERVED: dict[str, tuple[Any, ...]] = {
    "lora_alpha": (0, -8, 0.5, 1e-3, 1),
    "use_rslora": (True, False, None),
    "rank_pattern": ({}, {"q_proj": 4}),
    "alpha_pattern": ({"q_proj": 100}, {"layers.1.self_attn.q_proj": 1}, {"[qv]_proj": 3}, {"v_proj": -1.5}),
    "target_modules": (r".*\.(q|v)_proj", ["self_attn.q_proj", "v_proj"], ["v_proj", "q_proj", "q_proj"]),
    "exclude_modules": ([], None, ["k_proj"], r".*\.o_proj"),
    "layers_to_transform": ([], None),
    "layers_pattern": ([], None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva"),
    "lora_dropout": (0.5, 0.0),
    "inference_mode": (True, False),
    "task_type": ("CAUSAL_LM", None),
    "base_model_name_or_path": ("another/model", "", None),
    "peft_version": ("99.0",),
}

_SERVED_BY_PEFT: dict[str, tuple[Any, ...]] = {
    "rank_pattern": ({"c_attn": 24},),
    "alpha_pattern": ({"^q_proj": 100}, {"c_attn": 1}),
    "fan_in_fan_out": (True,),
    "swift_type": ("LORA",),
    "lorap_lr_ratio": (16.0,),
    "some_bookkeeping": (True,),
}
"""What PEFT computes as a plain LoRA, odd as it looks."""


def config_kinds() -> Iterator[Kind]:
    for name, values in _ODD.items():
        for value in values:
            # The reason names the field, or the weights that do not fit what it says.
            yield Kind(
                _say(name, value), _with(name, value), rf"\b{name}\b|shape|weights|not among|pattern|rank"
            )
    for table, must_serve in ((_SERVED, True), (_SERVED_BY_PEFT, True)):
        for name, values in table.items():
            for value in values:
                yield Kind(_say(name, value), _with(name, value), must_serve=must_serve)
    for field in ("exclude_modules", "layers_pattern"):
        yield Kind(
            f"{field} that backtracks",
            _with(field, BACKTRACKS if field == "exclude_modules" else [BACKTRACKS]),
            field,
            is_plain=True,
        )
    yield Kind("rank_pattern is None", _with("rank_pattern", None), "rank_pattern", is_plain=True)
    yield from _texts()


def _say(name: str, value: Any) -> str:
    text = "missing" if value is ... else repr(value)
    return f"{name} is {text if len(text) <= 40 else f'{text[:37]}...'}"


def _with(name: str, value: Any) -> Make:
    return lambda shop, path: shop.write(path, **{name: value})


def _texts() -> Iterator[Kind]:
    """Files that hold something else than a JSON object, or hold it in another way."""

    def text(name: str, write: Callable[[str], str | bytes], reason: str = CONFIG, **more: bool) -> Kind:
        def make(shop: Workshop, path: Path) -> None:
            shop.write(path)
            written = write(json.dumps(shop.config()))
            (path / CONFIG).write_bytes(written if isinstance(written, bytes) else written.encode())

        return Kind(f"configuration {name}", make, reason, **more)

    for name, content in {
        **{
            "empty": b"",
            "of one brace": b"{",
            "a list": b"[]",
            "a number": b"3",
            "null": b"null",
            "a string": b'"a"',
        },
        **{"not UTF-8": b"\xff\xfe{}", "of NULs": b"\0" * 100, "a web page": b"<!DOCTYPE html><html></html>"},
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    }.items():
        yield text(name, lambda good, content=content: content)  # type: ignore[misc]
    yield text("deep list", lambda good: "[" * DEPTH + "]" * DEPTH)
    yield text("deep object", lambda good: '{"a":' * DEPTH + "1" + "}" * DEPTH)
    yield text("deep in a known field", lambda good: good[:-1] + ', "x": ' + "[" * DEPTH + "]" * DEPTH + "}")
    yield text("cut in half", lambda good: good[: len(good) // 2])
    yield text("with more behind it", lambda good: good + "{}")
    yield text("with comments", lambda good: "// PEFT\n" + good)
    yield text("in UTF-16", lambda good: good.encode("utf-16"), is_plain=True)
    yield text("with a byte order mark", lambda good: good.encode("utf-8-sig"), is_plain=True)
    yield text("with single quotes", lambda good: good.replace('"', "'"))
    yield text(
        "with a number of 5,000 digits",
        lambda good: good[:-1] + f', "lora_alpha": {"9" * 5000}}}',
        "lora_alpha|JSON|digits|number",
    )
    yield text("with half an emoji", lambda good: good[:-1] + r', "revision": "\ud83d"}', is_plain=True)
    yield text("with a field twice", lambda good: '{"r": 99, ' + good[1:], is_plain=True)
    yield text(
        "of 40 MB", lambda good: good[:-1] + " " * (40 * MEGABYTE) + "}", "MB|bytes|large|size", is_plain=True
    )
