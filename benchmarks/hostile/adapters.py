"""All kinds of bad adapter, and names that no adapter may have."""

from hostile.kinds_of_config import config_kinds
from hostile.kinds_of_files import file_kinds
from hostile.kinds_of_tensors import tensor_kinds
from hostile.workshop import Kind

ADAPTER_KINDS: tuple[Kind, ...] = (*config_kinds(), *file_kinds(), *tensor_kinds())

BAD_NAMES = (
    *(
        "",
        " ",
        " a",
        "a ",
        "a,b",
        "a\nb",
        "a\r\nb",
        "a\tb",
        "a\0",
        "\x7f",
        "a\x1b[31m",
        "x" * 257,
        "x" * 2**20,
    ),
    *("a/pin", "\ud83d", "a\udc00b", "a\u0085b"),
)
"""Refused for every adapter, however good; the base model's own names beside them."""
