"""A follower: one part of a split model, which does what the lead says (parallel.py)."""

import os
import socket
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from toppings.adapters.arena import HostArena
from toppings.adapters.cuda_loader import CudaLoader
from toppings.adapters.device_pool import DevicePool
from toppings.adapters.layout import BaseShapes
from toppings.adapters.loader import CpuLoader, Loader
from toppings.adapters.mirror import FollowerAdapters
from toppings.adapters.modes import PipelinedMode
from toppings.config import EngineConfig
from toppings.engine.build import load_decoder, make_cache, make_runner, make_staging, set_threads
from toppings.engine.decode_form import choose_decode_form
from toppings.engine.model_runner import ModelRunner
from toppings.engine.parallel import meet
from toppings.engine.part_messages import (
    Begin,
    Failed,
    Landed,
    Loaded,
    Start,
    Step,
    Stop,
    batch_of,
    encode,
    receive_command,
)
from toppings.model.parts import split_model
from toppings.ops import warm_up

LANDING_POLL_S = 0.001
"""How often a follower with loads under way looks whether they are in place."""


class Follower:
    """Obeys until it is told to stop. Raises EOFError where the lead has gone."""

    def __init__(self, connection: Connection, runner: ModelRunner, adapters: FollowerAdapters) -> None:
        self._connection = connection
        self._runner = runner
        self._adapters = adapters

    @classmethod
    def start(cls, connection: Connection) -> "Follower":
        """Raises ValueError or OSError where the part of the model cannot be had."""
        start = receive_command(connection)
        assert isinstance(start, Start)
        config, model = start.config, start.model
        set_threads(config)
        if config.device == "cuda":
            torch.cuda.set_device(start.index)
        part = split_model(model, config.tensor_parallel_size)[start.index]
        decoder = load_decoder(config, model, part)
        if config.device == "cpu":
            warm_up(decoder.dtype)
        connection.send_bytes(encode(Loaded()))
        meet(config, start.store_path, start.index)
        begin = receive_command(connection)
        assert isinstance(begin, Begin)
        shapes = BaseShapes(*part.config.base_shapes())
        arena = HostArena(begin.arena_bytes, _receive_descriptor(connection))
        adapters = _make_adapters(config, begin, shapes, decoder.dtype, arena, start.index)
        cache = make_cache(config, part.config, begin.num_pages, decoder.dtype)
        manager: Any = adapters  # all that a runner asks of one
        staging, mode = make_staging(config, decoder), PipelinedMode()
        form = choose_decode_form(config, part.config, decoder.dtype)
        runner = make_runner(config, decoder, cache, manager, mode, staging, form)
        return cls(connection, runner, adapters)

    @staticmethod
    def send_failure(connection: Connection, reason: str) -> None:
        connection.send_bytes(encode(Failed(reason)))

    def run(self) -> None:
        while True:
            self._await_command()
            match receive_command(self._connection):
                case Stop():
                    return
                case Step() as step:
                    self._runner.start(batch_of(step)).result()
                case command:
                    assert not isinstance(command, Start | Begin)
                    self._adapters.obey(command)

    def _await_command(self) -> None:
        """Tells the lead meanwhile which loads have landed."""
        while self._adapters.is_loading:
            if landed := self._adapters.take_landed():
                self._connection.send_bytes(encode(Landed(landed)))
            if self._connection.poll(LANDING_POLL_S):
                return

    def close(self) -> None:
        dist.destroy_process_group()


def _receive_descriptor(connection: Connection) -> int:
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        _, descriptors, _, _ = socket.recv_fds(end, 1, 1)
    return descriptors[0]


def _make_adapters(
    config: EngineConfig,
    begin: Begin,
    shapes: BaseShapes,
    dtype: torch.dtype,
    arena: HostArena,
    part: int,
) -> FollowerAdapters:
    pool = DevicePool(
        shapes.num_layers, config.device_pool_bytes, dtype, config.device, num_slots=begin.num_slots
    )
    loader: Loader
    if config.device == "cuda":
        arena.lock_pages()
        arena.use_all()  # the lead does not tell how far it has come
        loader = CudaLoader(pool.arena)
    else:
        loader = CpuLoader(pool.arena, link_gbps=config.link_gbps)
    return FollowerAdapters(pool, loader, arena, shapes, str(dtype).removeprefix("torch."), part)
