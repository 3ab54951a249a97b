"""Rows handed to several processes that answer: shared memory against UNIX and TCP sockets.

A round: every receiver gets all rows and answers; its time ends with the last answer. Sockets carry the
payload to each receiver in turn. In shared memory it is written once, one number is published, and
receivers that poll answer with numbers of their own: their time should hardly grow with the receivers.
Every receiver reads all it got. The sender has one core, receivers have the others in turn, as LoRA workers
do: else the scheduler decides from run to run whether rows must travel from core to core. With fewer cores
than processes, times hold its share too.
"""

import mmap
import multiprocessing
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from toppings.lab.cpu import median_s
from toppings.lab.figures import draw_groups

WIDTH, ITEM_BYTES = 4096, 2
LINE_WORDS = 8
STOP = -1
SHARED_MEMORY = "shared memory"

RoundTimes = dict[str, dict[str, float]]
"""Microseconds of a round, by rows and receivers, then by way."""


def read_all(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).max(initial=0))


# --- sockets ---


def socket_receiver(family: int, address: str | tuple[str, int], num_bytes: int) -> None:
    with socket.socket(socket.AddressFamily(family)) as connection:
        connection.connect(address)
        if family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray(num_bytes))
        while receive_exactly(connection, buffer):
            read_all(buffer)
            connection.sendall(b"!")


def receive_exactly(connection: socket.socket, buffer: memoryview) -> bool:
    """False where the other end has closed."""
    filled = 0
    while filled < len(buffer):
        count = connection.recv_into(buffer[filled:])
        if count == 0:
            return False
        filled += count
    return True


def time_sockets(family: int, payload: bytes, cores: Sequence[int], num_rounds: int) -> float:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AddressFamily(family)) as listener:
        listener.bind(f"{folder}/socket" if family == socket.AF_UNIX else ("127.0.0.1", 0))
        listener.listen(len(cores))
        receivers = start(socket_receiver, cores, family, listener.getsockname(), len(payload))
        connections = [listener.accept()[0] for _ in receivers]
        if family != socket.AF_UNIX:
            for connection in connections:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def one_round() -> None:
            for connection in connections:
                connection.sendall(payload)
            for connection in connections:
                connection.recv(1)

        median = median_s(one_round, num_rounds) * 1e6
        for connection in connections:
            connection.close()
        join(receivers)
    return median


# --- shared memory ---


def memory_receiver(path: str, index: int, num_receivers: int, num_bytes: int) -> None:
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    data = memoryview(memory)
    words = data[: LINE_WORDS * 8 * (num_receivers + 1)].cast("q")
    start_bytes = words.nbytes
    seen = 0
    words[LINE_WORDS * (index + 1)] = 0
    while True:
        while words[0] == seen:
            os.sched_yield()
        seen = words[0]
        if seen == STOP:
            return
        read_all(data[start_bytes : start_bytes + num_bytes])
        words[LINE_WORDS * (index + 1)] = seen


def time_shared_memory(payload: bytes, cores: Sequence[int], num_rounds: int) -> float:
    num_receivers = len(cores)
    header_bytes = LINE_WORDS * 8 * (num_receivers + 1)
    fd = os.memfd_create("toppings-ipc")
    os.ftruncate(fd, header_bytes + len(payload))
    data = memoryview(mmap.mmap(fd, 0))
    words = data[:header_bytes].cast("q")
    answers = [LINE_WORDS * (i + 1) for i in range(num_receivers)]
    for word in answers:
        words[word] = STOP  # each receiver sets it to 0 when it has started
    path = f"/proc/{os.getpid()}/fd/{fd}"
    receivers = [
        process
        for i, core in enumerate(cores)
        for process in start(memory_receiver, [core], path, i, num_receivers, len(payload))
    ]
    wait_for(lambda: all(words[word] == 0 for word in answers))

    def one_round() -> None:
        data[header_bytes:] = payload
        number = words[0] + 1
        words[0] = number
        wait_for(lambda: all(words[word] == number for word in answers))

    median = median_s(one_round, num_rounds) * 1e6
    words[0] = STOP
    join(receivers)
    os.close(fd)
    return median


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        os.sched_yield()


# --- both ---


@contextmanager
def bound_sender() -> Iterator[list[int]]:
    """This process on one core; yields the others, for the receivers (that one again, where it is alone)."""
    available = os.sched_getaffinity(0)
    own, *others = sorted(available)
    os.sched_setaffinity(0, {own})
    try:
        yield others or [own]
    finally:
        os.sched_setaffinity(0, available)


def start(target: Callable[..., None], cores: Sequence[int], *args: object) -> list[BaseProcess]:
    """One process on each of `cores`."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=on_core, args=(core, target, *args), daemon=True) for core in cores]
    for process in processes:
        process.start()
    return list(processes)


def on_core(core: int, target: Callable[..., None], *args: object) -> None:
    os.sched_setaffinity(0, {core})
    target(*args)


def join(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(10)
        assert process.exitcode == 0, process


def copy_floor_us(payload: bytes, num_rounds: int) -> float:
    target = memoryview(bytearray(len(payload)))

    def copy() -> None:
        target[:] = payload

    return median_s(copy, num_rounds) * 1e6


def run(
    rows: list[int],
    receivers: list[int],
    num_rounds: int,
    *,
    num_repeats: int = 3,
    on_line: Callable[[str], None] = lambda _: None,
) -> tuple[RoundTimes, dict[str, float]]:
    """Medians over the rounds, and for each number of rows what one plain copy in this process takes, us.

    The least of `num_repeats` runs of each: what else the machine does makes pollers slower, never faster.
    """
    times: RoundTimes = {}
    floors = {}
    with bound_sender() as free:
        for num_rows in rows:
            payload = struct.pack("<Q", num_rows) * (num_rows * WIDTH * ITEM_BYTES // 8)
            floors[str(num_rows)] = copy_floor_us(payload, num_rounds)
            for count in receivers:
                cores = [free[i % len(free)] for i in range(count)]
                runs = [time_all_ways(payload, cores, num_rounds) for _ in range(num_repeats)]
                row = {name: min(run[name] for run in runs) for name in runs[0]}
                times[f"{num_rows} rows, {count} receivers"] = row
                cells = "".join(f"{name:>16s} {us:9.0f} us" for name, us in row.items())
                on_line(f"{num_rows:4d} rows to {count} receivers: {cells}")
            on_line(f"{num_rows:4d} rows, one copy in memory: {floors[str(num_rows)]:.0f} us")
    return times, floors


def time_all_ways(payload: bytes, cores: Sequence[int], num_rounds: int) -> dict[str, float]:
    return {
        SHARED_MEMORY: time_shared_memory(payload, cores, num_rounds),
        "UNIX socket": time_sockets(socket.AF_UNIX, payload, cores, num_rounds),
        "TCP socket": time_sockets(socket.AF_INET, payload, cores, num_rounds),
    }


def draw(axes: Any, times: RoundTimes) -> None:
    """Groups of bars on matplotlib axes."""
    ways = next(iter(times.values()))
    series = {way: [row[way] for row in times.values()] for way in ways}
    draw_groups(axes, series, [label.replace(", ", "\n") for label in times])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("time of a round, us")
    axes.legend()
