"""Recorded work gives what the work gives when it is called, as often as it runs, on any threads."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.gate import NO_TEAM
from toppings.ops.activation import silu_mul
from toppings.ops.gpu_plan import LoraBatch, lora_chunks
from toppings.ops.linear import QuantizedLinear
from toppings.ops.lora import LoraSegments, add_lora_
from toppings.ops.norm import rms_norm
from toppings.ops.quantized import quantize

WIDTH = 256


@pytest.fixture(params=[1, 2, 5])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    from toppings.ops import cpu_kernel

    if request.param > 1 and not cpu_kernel.USE_TEAM:
        pytest.skip(NO_TEAM)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Work:
    """Kernels for one thread and for many, and operators of torch before, between and after them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weight = torch.rand(WIDTH)
        self.up = QuantizedLinear(quantize(torch.randn(2 * WIDTH, WIDTH), 8))
        self.down = QuantizedLinear(quantize(torch.randn(WIDTH, WIDTH), 4))

    def __call__(self, x: Tensor) -> Tensor:
        x = x * 2
        for _ in range(3):
            x = self.down(silu_mul(self.up(rms_norm(x, self.weight, 1e-6))))
        x = x.to(torch.float64).view(-1).to(torch.float32)
        x += 1
        return rms_norm(x.view(-1, WIDTH), self.weight, 1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_recording_gives_the_same_bits_for_whatever_its_input_holds(
    num_rows: int, num_threads: int
) -> None:
    from toppings.ops.cpu_recording import Memory, Recorder

    work, x = Work(), torch.zeros(num_rows, WIDTH)
    with Recorder(Memory()) as recorder:
        y = work(x)
    recording = recorder.recording()
    for seed in range(20):
        x.copy_(torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(seed)))
        recording.replay()
        assert torch.equal(y, work(x))


@torch.inference_mode()
def test_recordings_that_share_memory_run_in_turn() -> None:
    from toppings.ops.cpu_recording import Memory, Recorder

    work, memory, recorded = Work(), Memory(), []
    for num_rows in (4, 1, 2):
        x = torch.randn(num_rows, WIDTH)
        with Recorder(memory) as recorder:
            y = work(x)
        recorded.append((x, y, recorder.recording()))
    for x, y, recording in 2 * recorded:
        recording.replay()
        assert torch.equal(y, work(x))
    assert len(memory.chunks) == 1


def test_work_that_reads_values_is_refused_and_what_is_called_afterwards_runs() -> None:
    from toppings.ops.cpu_recording import Memory, Recorder

    x, weight = torch.randn(2, WIDTH), torch.rand(WIDTH)
    expected = rms_norm(x, weight, 1e-6)
    with pytest.raises(ValueError, match="reads"), Recorder(Memory()):
        rms_norm(x, weight, 1e-6).sum().item()
    assert torch.equal(rms_norm(x, weight, 1e-6), expected)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapters_are_those_that_the_chunks_name_when_it_runs(dtype: torch.dtype) -> None:
    from toppings.ops.cpu_recording import Memory, Recorder

    torch.manual_seed(0)
    width, rank, num_rows = 64, 6, 4
    arena = torch.randn(3 * 2 * rank * width).to(dtype)
    starts = [[slot * 2 * rank * width, (2 * slot + 1) * rank * width, rank] for slot in range(3)]
    table = torch.tensor(starts).view(3, 1, 1, 3).expand(3, 1, 7, 3).contiguous()
    x, chunks = torch.randn(num_rows, width).to(dtype), torch.tensor([[0, 0, -1]] * num_rows).int()
    y, places = torch.zeros_like(x), (0,)

    def add(segments: LoraSegments) -> None:
        y.zero_()
        options = {"layer": 0, "group": places, "out_offsets": places, "segments": segments}
        add_lora_(y, x, arena=arena, table=table, **options)  # type: ignore[arg-type]

    captured = LoraSegments(list(range(num_rows + 1)), [-1] * num_rows)
    captured.batches[torch.device("cpu")] = LoraBatch(chunks, "mbgmv", rank)
    with Recorder(Memory()) as recorder:
        add(captured)
    for segments in (LoraSegments([0, 1, 3, 4], [2, 0, -1]), LoraSegments([0, 2, 4], [-1, 1])):
        add(segments)
        expected = y.clone()
        chunks.copy_(torch.tensor([[0, 0, -1]] * num_rows))
        own = torch.from_numpy(lora_chunks(segments, "mbgmv"))
        chunks[: len(own)] = own
        recorder.recording().replay()
        assert torch.equal(y, expected)
