"""Adapters whose tensors are odd: types, shapes, values, names."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hostile.workshop import RANK, Kind, Tensors, Workshop

Change = Callable[[Tensors, str, Workshop], object]
NAN, INFINITY = float("nan"), float("inf")


def tensor_kinds() -> Iterator[Kind]:
    yield from _types()
    yield from _shapes()
    yield from _contents()
    yield from _names()
    yield from _missing_and_more()


def _kind(
    name: str, change: Change, reason: str = "", *, half: str = "A", rank: int = RANK, **more: bool
) -> Kind:
    """`change` gets all tensors, and the key of layer 1's q_proj."""

    def make(shop: Workshop, path: Path) -> None:
        tensors = shop.tensors(rank)
        change(tensors, shop.key(1, "q_proj", half), shop)
        shop.write(path, tensors, r=rank)

    return Kind(name, make, reason, **more)


def _types() -> Iterator[Kind]:
    for dtype in (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64):
        yield _kind(
            f"a tensor of {dtype}",
            lambda t, k, s, d=dtype: t.update({k: t[k].to(d)}),  # type: ignore[misc]
            "q_proj.*type|type.*q_proj",
        )
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        yield _kind(
            f"tensors of {dtype}",
            lambda t, k, s, d=dtype: t.update({n: x.to(d) for n, x in t.items()}),  # type: ignore[misc]
            "_proj.*type|type.*_proj",
        )
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        yield _kind(
            f"tensors of {dtype}",
            lambda t, k, s, d=dtype: t.update({n: x.to(d) for n, x in t.items()}),  # type: ignore[misc]
            must_serve=True,
        )
    yield _kind(
        "tensors of two types", lambda t, k, s: t.update({k: t[k].to(torch.bfloat16)}), must_serve=True
    )


def _shapes() -> Iterator[Kind]:
    for half in "AB":
        for name, change in {
            "transposed": lambda x: x.T.contiguous(),
            "a row short": lambda x: x[:-1].clone(),
            "a column short": lambda x: x[:, :-1].contiguous(),
            "a row more": lambda x: torch.cat([x, x[:1]]),
            "flat": lambda x: x.flatten(),
            "with a third dimension": lambda x: x[None].clone(),
            "a number": lambda x: torch.tensor(1.0),
            "empty": lambda x: torch.zeros(0, x.shape[1]),
        }.items():
            yield _kind(
                f"{half} is {name}",
                lambda t, k, s, c=change: t.update({k: c(t[k])}),  # type: ignore[misc]
                "q_proj.*shape",
                half=half,
            )
    yield _kind("rank 513", lambda t, k, s: None, r"\br\b.*513", rank=513)


def _contents() -> Iterator[Kind]:
    def put(value: float) -> Change:
        return lambda tensors, key, shop: tensors[key].view(-1)[-1:].fill_(value)

    for half in "AB":
        for value in (NAN, INFINITY, -INFINITY):
            yield _kind(f"{half} holds {value}", put(value), "q_proj.*(NaN|infinite|finite)", half=half)
    # Finite as stored, but perhaps not in the arithmetic of the server.
    for half, value in (("A", 3e38), ("B", 3e38), ("B", -3e38), ("B", 1e36)):
        yield _kind(
            f"{half} holds {value}",
            put(value),
            "q_proj.*(finite|overflow|range|large|fit|infinite)|bfloat16|float",
            half=half,
        )
    yield _kind(
        "an A of 64 bits beyond 32",
        lambda t, k, s: t.update({k: t[k].double() * 1e300}),
        "q_proj.*(finite|overflow|range|large|fit|infinite)|float",
    )
    yield _kind("all zero", lambda t, k, s: [x.zero_() for x in t.values()], must_serve=True)
    yield _kind("B zero", put(0.0), must_serve=True, half="B")
    yield _kind("values too small for bf16", put(1e-42), must_serve=True)


def _rename(change: Callable[[str], str]) -> Change:
    def renamed(tensors: Tensors, key: str, shop: Workshop) -> None:
        tensors[change(key)] = tensors.pop(key)

    return renamed


def _rename_all(change: Callable[[str], str]) -> Change:
    def renamed(tensors: Tensors, key: str, shop: Workshop) -> None:
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return renamed


def _names() -> Iterator[Kind]:
    """One key is renamed, so that its other half is alone; or all are, so that nothing is left of them."""
    for name, old, new in (
        *(("an unknown projection", "q_proj", "c_attn"), ("capitals", "q_proj", "Q_PROJ")),
        *(("the wrong block", "self_attn", "mlp"), ("a third half", "lora_A", "lora_C")),
        *(("a magnitude vector", "lora_A.weight", "lora_magnitude_vector"), ("a bias", "weight", "bias")),
        *(("an embedding's half", "lora_A.weight", "lora_embedding_A"), ("no suffix", ".weight", "")),
        *(("a space behind it", ".weight", ".weight "), ("a line feed", "q_proj", "q_\nproj")),
        *(("a NUL", "q_proj", "q_proj\0"), ("a base layer", "lora_A", "base_layer")),
        *(("a whole weight", "lora_A.weight", "weight"), ("a module to save", "lora_A", "modules_to_save")),
        *(("layer 99", "layers.1", "layers.99"), ("layer -1", "layers.1", "layers.-1")),
        *(("layer 01", "layers.1", "layers.01"), ("a layer in Arabic digits", "layers.1", "layers.\u0661")),
        *(
            ("a layer of 5,000 digits", "layers.1", "layers." + "9" * 5000),
            ("no layer", "layers.1", "layers."),
        ),
        *(("an enormous key", "q_proj", "q" * 100_000), ("an encoder", "model.layers", "encoder.layers")),
        *(("another adapter's name", ".weight", ".other.weight"), ("a path", "q_proj", "../q_proj")),
    ):
        reason = "key|lora_B|weights|layer"
        yield _kind(f"a key with {name}", _rename(lambda key, o=old, n=new: key.replace(o, n)), reason)  # type: ignore[misc]
    for name, old, new in (
        *(
            ("without their prefix", "base_model.model.", ""),
            ("with it twice", "base_model.", "base_model.model.base_model."),
        ),
        *(
            ("of diffusers", ".lora_A.weight", ".lora.down.weight"),
            ("of kohya", "base_model.model.model.layers.", "lora_unet_"),
        ),
        *(("of a multimodal model", "model.model.layers", "model.model.language_model.layers"),),
        *(("of another family", "self_attn.q_proj", "attention.query_key_value"),),
    ):
        yield _kind(
            f"all keys {name}",
            _rename_all(lambda key, o=old, n=new: key.replace(o, n, 1)),  # type: ignore[misc]
            "key|weights",
        )
    yield _kind(
        "keys with the adapter's name",
        _rename_all(lambda key: key.replace(".weight", ".default.weight")),
        must_serve=True,
    )
    yield _kind("an empty key", _rename(lambda key: ""), "key|lora_B")


def _missing_and_more() -> Iterator[Kind]:
    def drop(part: str) -> Change:
        return lambda tensors, key, shop: [tensors.pop(name) for name in list(tensors) if part in name]

    def add(key: str, *sizes: int) -> Change:
        return lambda tensors, _, shop: tensors.update({key: torch.zeros(*sizes)})

    for half in "AB":
        yield _kind(f"no {half} anywhere", drop(f"lora_{half}"), "lora_[AB]|weights|key")
        yield _kind(f"one {half} missing", lambda t, k, s: t.pop(k), "lora_[AB]|weights|key", half=half)
    yield _kind("no weights of a layer", drop("layers.1."), "layers.1.*weights|target_modules")
    yield _kind("no weights of a projection", drop("v_proj"), "v_proj.*weights|target_modules")
    yield _kind("no tensors at all", drop(""), "no tensors")
    prefix = "base_model.model."
    yield _kind("an output layer's LoRA beside it", add(f"{prefix}lm_head.lora_A.weight", 4, 32), "lm_head")
    yield _kind("an output layer beside it", add(f"{prefix}lm_head.weight", 64, 32), "lm_head")
    yield _kind("an embedding beside it", add(f"{prefix}model.embed_tokens.weight", 64, 32), "embed_tokens")
    yield _kind("a norm beside it", add(f"{prefix}model.norm.weight", 32), "norm")
    yield _kind("a stranger beside it", add("optimizer.state", 3), "optimizer.state")
    yield _kind("an empty stranger beside it", add("optimizer.state", 0), "optimizer.state")
    yield _kind(
        "a base layer's copy of the output", add(f"{prefix}lm_head.base_layer.weight", 4, 4), must_serve=True
    )
    yield _kind(
        "a B's bias beside it", add(f"{prefix}model.layers.1.self_attn.q_proj.lora_B.bias", 32), "bias"
    )
    yield _kind(
        "5,000 strangers beside it",
        lambda t, k, s: t.update({f"k{i}": torch.zeros(1) for i in range(5000)}),
        "key|k0",
    )
