"""The same requests to a server in each loading mode in turn."""

import asyncio
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from toppings.bench.client import LoadClient
from toppings.bench.comparison import LOADS, REFERENCE_MODE, Comparison, ModeResult, ModesSpec, Survey
from toppings.bench.load import LoadShape, make_calls, run_load
from toppings.bench.outcome import Outcome
from toppings.bench.report import is_prompt_step, read_steps
from toppings.bench.server import Command, drop_page_cache, free_port, run_dir, running_server, serve_command
from toppings.bench.summary import LoadSummary, summarize
from toppings.config import Config, ConfigError

NUM_SURVEY_WARMUP = 10
NUM_SURVEY = 15
SHUTDOWN_S = 1.0

OnProgress = Callable[[str, int], None]
"""Called with what is going on, and how many more requests are done."""


async def compare_modes(
    spec: ModesSpec, work_dir: Path, on_progress: OnProgress, command: Command = serve_command
) -> Comparison:
    """Runs everything; adapters that are made, and the servers' registry, go to the empty `work_dir`.

    Raises ValueError where a server does not start or its requests fail before anything is measured.
    """
    base = await _with_adapters(spec, work_dir, on_progress)
    survey = await _survey(spec, base, work_dir, on_progress, command)
    rps = spec.load.rps or _round(0.5e3 / survey.e2e_ms)
    link_gbps = base.engine.link_gbps
    if spec.load_ratio:
        mean_bytes = survey.used_bytes / len(survey.adapters)
        link_gbps = _round(mean_bytes / (spec.load_ratio * survey.prefill_ms) / 1e6)
    spec = replace(spec, load=replace(spec.load, rps=rps))
    results = []
    for mode in spec.modes:
        config = Config.from_settings(_mode_settings(spec, mode, survey, link_gbps), base)
        results.append(await _run_mode(spec, config, survey, on_progress, command))
    return Comparison(spec, survey, link_gbps, rps, results)


def _round(value: float) -> float:
    return float(f"{value:.3g}")


# --- what all servers have in common ---


async def _with_adapters(spec: ModesSpec, work_dir: Path, on_progress: OnProgress) -> Config:
    """The configuration with a registry of its own, a free port and adapters; these are made if need be."""
    settings: dict[str, Any] = {
        "state_dir": str(work_dir / "state"),
        "port": free_port(),
        "shutdown_timeout_s": SHUTDOWN_S,
        "max_queue": max(spec.base.server.max_queue, spec.load.num_requests),
    }
    if not spec.base.server.adapters:
        on_progress("making adapters", 0)
        settings["adapters"] = str(work_dir / "adapters")
        await _make_adapters(spec, settings["adapters"])
    return Config.from_settings(settings, spec.base)


async def _make_adapters(spec: ModesSpec, directory: str) -> None:
    """In a process of its own: making them needs torch, which has no place in a load generator."""
    model = spec.base.engine.model or _demo_model()
    options = {"model": model, "count": spec.num_adapters, "ranks": spec.ranks, "targets": spec.targets}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "toppings", "synth", "adapters", directory, *arguments),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, errors = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise ValueError(f"adapters could not be made: {lines[-1] if lines else process.returncode}")


def _demo_model() -> str:
    from toppings.demo import demo_model_dir

    return str(demo_model_dir())


def _mode_settings(spec: ModesSpec, mode: str, survey: Survey, link_gbps: float) -> dict[str, Any]:
    """`cached` gets a pool for all adapters, the others for one in `POOL_SHARE`. The host store has room for
    all, or for no more than that pool where adapters are to come from the disk."""
    is_reference = mode == REFERENCE_MODE
    return {
        "mode": mode,
        "link_gbps": link_gbps,
        "device_pool_bytes": survey.registered_bytes if is_reference else survey.pool_bytes,
        "host_store_bytes": 2 * survey.used_bytes if spec.home == "host" else survey.pool_bytes,
    }


# --- the runs ---


async def _survey(
    spec: ModesSpec, base: Config, work_dir: Path, on_progress: OnProgress, command: Command
) -> Survey:
    """Also registers the adapters, so that later starts find them packed."""
    on_progress("survey", 0)
    settings = {"mode": "on_demand", "link_gbps": 0.0, "log_dir": str(work_dir / "logs")}
    config = Config.from_settings(settings, base)
    async with running_server(config, command) as client:
        rows = {row["name"]: row["bytes"] for row in (await client.get("/adapters"))["adapters"]}
        if len(rows) < spec.num_adapters:
            raise ConfigError(
                f"num_adapters is {spec.num_adapters}, but {base.server.adapters} has {len(rows)} usable ones"
            )
        used = sorted(rows)[: spec.num_adapters]
        shape = spec.load.one_after_another(NUM_SURVEY_WARMUP + NUM_SURVEY)
        outcomes = await run_load(client, make_calls(shape, used[:1]), is_sequential=True)
        _require_success(outcomes)
        steps = [step for step in read_steps(run_dir(config) / "steps.jsonl") if is_prompt_step(step)]
    return Survey(
        {name: rows[name] for name in used},
        sum(rows.values()),
        statistics.median(step.ms - step.load_ms for step in steps[-NUM_SURVEY:]),
        statistics.median(outcome.e2e_ms for outcome in outcomes[-NUM_SURVEY:]),
    )


async def _run_mode(
    spec: ModesSpec, config: Config, survey: Survey, on_progress: OnProgress, command: Command
) -> ModeResult:
    mode, settings = config.engine.mode, config.to_settings()
    del settings["api_key"]
    on_progress(f"{mode}: starting", 0)
    async with running_server(config, command) as client:
        run = _ModeRun(spec, config, list(survey.adapters), client, on_progress)
        await run.warm_up()
        loads, outcomes = {}, {}
        for kind in LOADS:
            loads[kind], outcomes[kind] = await run.measure(kind)
    return ModeResult(mode, settings, loads, outcomes)


class _ModeRun:
    """Adapters are used in turn over all loads, so that none comes again before all others have come."""

    def __init__(
        self,
        spec: ModesSpec,
        config: Config,
        adapters: list[str],
        client: LoadClient,
        on_progress: OnProgress,
    ) -> None:
        self._spec = spec
        self._config = config
        self._adapters = adapters
        self._client = client
        self._on_progress = on_progress
        self._num_sent = 0

    async def warm_up(self) -> None:
        """With `home` host, a token of each adapter brings it to the host store. Leaves an empty step log."""
        shape = self._spec.load.one_after_another(len(self._adapters))
        if self._spec.home == "host":
            _require_success(await self._run(replace(shape, prompt_tokens=1, max_tokens=1), "preload"))
        if self._spec.num_warmup:
            _require_success(await self._run(shape.one_after_another(self._spec.num_warmup), "warm-up"))
        with suppress(FileNotFoundError):
            os.truncate(run_dir(self._config) / "steps.jsonl", 0)  # the server appends, wherever the end is

    async def measure(self, kind: str) -> tuple[LoadSummary, list[Outcome]]:
        shape = self._spec.load
        if self._spec.home == "disk":
            await asyncio.to_thread(drop_page_cache, Path(self._config.engine.state_dir))
        before = await self._num_misses()
        is_sequential = kind == "sequential"
        outcomes = await self._run(
            shape.one_after_another(shape.num_requests) if is_sequential else shape, kind
        )
        return summarize(outcomes, num_cold=await self._num_misses() - before), outcomes

    async def _run(self, shape: LoadShape, what: str) -> list[Outcome]:
        calls = make_calls(shape, self._adapters, first=self._num_sent)
        self._num_sent += len(calls)
        label = f"{self._config.engine.mode}: {what}"
        self._on_progress(label, 0)
        return await run_load(
            self._client, calls, is_sequential=not shape.rps, on_done=lambda: self._on_progress(label, 1)
        )

    async def _num_misses(self) -> int:
        return int((await self._client.get("/stats"))["counters"]["device_misses"])


def _require_success(outcomes: list[Outcome]) -> None:
    """What fails before the measurement would fail in it."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise ValueError(f"a request for {outcome.adapter} failed in the warm-up: {outcome.error}")
