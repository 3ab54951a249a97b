from typing import Any

import numpy as np
import torch

from tests.streams import Device
from toppings.engine.staging import Staging, packed_bytes, unpack

CPU = torch.device("cpu")


def test_arrays_arrive_with_their_shapes_and_types() -> None:
    arrays: list[Any] = [
        np.arange(7, dtype=np.int64),
        np.arange(6, dtype=np.int32).reshape(2, 3).T,
        np.empty((0, 4), np.int32),
        np.array([0.5, 1e30], np.float64),
        np.arange(40_000, dtype=np.float32),  # more than the buffer holds at first
    ]
    tensors = Staging(CPU, None).bring(arrays)
    assert all(np.array_equal(tensor.numpy(), array) for tensor, array in zip(tensors, arrays, strict=True))
    assert [tensor.numpy().dtype for tensor in tensors] == [array.dtype for array in arrays]


def test_arrays_of_the_same_shapes_arrive_in_the_same_place() -> None:
    staging, first, second = (
        Staging(CPU, None),
        [np.arange(3), np.arange(5)],
        [np.zeros(3, int), np.ones(5, int)],
    )
    target = torch.empty(packed_bytes(first), dtype=torch.uint8)
    views = unpack(target, first)
    staging.copy(first, target)
    assert [view.tolist() for view in views] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    staging.copy(second, target)
    assert [view.tolist() for view in views] == [[0] * 3, [1] * 5]


def test_a_buffer_is_written_again_only_when_its_copy_is_over() -> None:
    device = Device()
    staging = Staging(CPU, device)
    for step in range(9):
        staging.bring([np.full(4, step)])
        assert device.host_clock.get("compute", 0) >= step - 5  # seen to be over: the sixth copy before this
