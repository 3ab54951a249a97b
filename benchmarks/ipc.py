"""Handing rows to several processes: shared memory against UNIX and TCP sockets.

    python benchmarks/ipc.py                       # 1, 3 and 5 receivers; 64 and 256 rows of 4096 bf16
    python benchmarks/ipc.py --toy                 # small and short: does the script still work?
    python benchmarks/ipc.py --json ipc.json --figure ipc.png

A round: every receiver gets all rows and answers; its time ends with the last answer. Sockets carry the
payload to each receiver in turn. In shared memory it is written once, one number is published, and
receivers that poll answer with numbers of their own: their time should hardly grow with the receivers.
Every receiver reads all it got. With fewer cores than processes, times hold the scheduler's share too. Ends
in one JSON line, whose `floor_us` is the time of one plain copy of the payload within this process.
"""

import argparse
import json
import mmap
import multiprocessing
import os
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

WIDTH, ITEM_BYTES = 4096, 2
LINE_WORDS = 8
STOP = -1

RoundTimes = dict[str, dict[str, float]]


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


def time_sockets(family: int, payload: bytes, num_receivers: int, num_rounds: int) -> float:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AddressFamily(family)) as listener:
        listener.bind(f"{folder}/socket" if family == socket.AF_UNIX else ("127.0.0.1", 0))
        listener.listen(num_receivers)
        receivers = start(socket_receiver, num_receivers, family, listener.getsockname(), len(payload))
        connections = [listener.accept()[0] for _ in receivers]
        if family != socket.AF_UNIX:
            for connection in connections:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def one_round() -> None:
            for connection in connections:
                connection.sendall(payload)
            for connection in connections:
                connection.recv(1)

        median = median_us(one_round, num_rounds)
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


def time_shared_memory(payload: bytes, num_receivers: int, num_rounds: int) -> float:
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
        for i in range(num_receivers)
        for process in start(memory_receiver, 1, path, i, num_receivers, len(payload))
    ]
    wait_for(lambda: all(words[word] == 0 for word in answers))

    def one_round() -> None:
        data[header_bytes:] = payload
        number = words[0] + 1
        words[0] = number
        wait_for(lambda: all(words[word] == number for word in answers))

    median = median_us(one_round, num_rounds)
    words[0] = STOP
    join(receivers)
    os.close(fd)
    return median


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        os.sched_yield()


# --- both ---


def start(target: Callable[..., None], count: int, *args: object) -> list[BaseProcess]:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=args, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    return list(processes)


def join(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(10)
        assert process.exitcode == 0, process


def median_us(action: Callable[[], None], num_rounds: int) -> float:
    times = []
    for _ in range(num_rounds + 3):
        started_at = time.perf_counter()
        action()
        times.append(time.perf_counter() - started_at)
    return statistics.median(times[3:]) * 1e6


def copy_floor_us(payload: bytes, num_rounds: int) -> float:
    target = memoryview(bytearray(len(payload)))

    def copy() -> None:
        target[:] = payload

    return median_us(copy, num_rounds)


def run(rows: list[int], receivers: list[int], num_rounds: int) -> tuple[RoundTimes, dict[str, float]]:
    times: RoundTimes = {}
    floors = {}
    for num_rows in rows:
        payload = struct.pack("<Q", num_rows) * (num_rows * WIDTH * ITEM_BYTES // 8)
        floors[str(num_rows)] = copy_floor_us(payload, num_rounds)
        for count in receivers:
            row = times[f"{num_rows} rows, {count} receivers"] = {
                "shared memory": time_shared_memory(payload, count, num_rounds),
                "UNIX socket": time_sockets(socket.AF_UNIX, payload, count, num_rounds),
                "TCP socket": time_sockets(socket.AF_INET, payload, count, num_rounds),
            }
            cells = "".join(f"{name:>16s} {us:9.0f} us" for name, us in row.items())
            print(f"{num_rows:4d} rows to {count} receivers: {cells}")
        print(f"{num_rows:4d} rows, one copy in memory: {floors[str(num_rows)]:.0f} us")
    return times, floors


def draw(times: RoundTimes, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(next(iter(times.values()))):
        axes.bar(
            [x + 0.27 * i for x in range(len(times))], [row[name] for row in times.values()], 0.27, label=name
        )
    axes.set_xticks(
        [x + 0.27 for x in range(len(times))], [label.replace(", ", "\n") for label in times], fontsize=8
    )
    axes.set_yscale("log")
    axes.set_ylabel("time of a round, us")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="small and short: checks that it runs")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--figure", type=Path, help="draw bars there (needs matplotlib)")
    options = parser.parse_args()
    rows, receivers, num_rounds = ([2], [1, 2], 3) if options.toy else ([64, 256], [1, 3, 5], 200)
    times, floors = run(rows, receivers, num_rounds)
    if options.figure:
        draw(times, options.figure)
    result = {"benchmark": "ipc", "num_cores": os.cpu_count(), "us": times, "floor_us": floors}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
