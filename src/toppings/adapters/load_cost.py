"""What an adapter's load costs where nobody has measured it: as many tokens of a prompt as a device of its
kind computes in the time that the bytes take."""

from toppings.adapters.layout import BaseShapes

DEVICE_FLOPS = {"cuda": 1e14, "cpu": 2e11}
"""What a device of today computes in a second of a long prompt, in 16 bits."""
LINK_BYTES = {"cuda": 2.5e10, "cpu": 1e10}
"""What travels to it in a second: over PCIe 4.0 x16, from memory to memory."""


def tokens_per_byte(shapes: BaseShapes, device: str, link_gbps: float = 0.0) -> float:
    """Two operations of a token for each parameter of the layers that it meets; `link_gbps` (10^9 bytes per
    second): of a link that is known."""
    *attention, gate, up, down = (num_in * num_out for num_in, num_out in shapes.sizes)
    num_used = 1 if shapes.mixture is None else shapes.mixture.num_per_token
    num_parameters = shapes.num_layers * (sum(attention) + (gate + up + down) * num_used)
    link_bytes = link_gbps * 1e9 if link_gbps else LINK_BYTES[device]
    return DEVICE_FLOPS[device] / link_bytes / (2 * num_parameters)
