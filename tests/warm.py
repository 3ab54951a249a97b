"""Processes of tests that start warm: `python -m toppings...` is forked from one that has imported all.

Each would take seconds of a core to import torch and the rest. `install()` puts `WarmPopen` in the place of
`subprocess.Popen`: a child is forked with the arguments, environment, working directory and descriptors that
it was to get, and is a child of the process that asked. A server soon starts one more, to fork engines: it
has a child that was forked as warm and waits to become that one. So are a few other modules and scripts, and
code (`python -c`) whose environment says `WARM`. What measures imports goes `COLD`.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

COLD = "TOPPINGS_TESTS_COLD"
"""A variable of the environment: where a child's has it, the child is started as ever."""
WARM = "TOPPINGS_TESTS_WARM"
"""Where a child's environment has it, its code (`python -c`) runs in a warm process. The value: how many
processes that it starts itself shall be warm, too."""
SERVER = ["-m", "toppings", "serve"]
MODULES = (
    "toppings",
    "toppings.engine.process",
    "toppings.engine.follower_process",
    "toppings.assist.worker",
    *("peers.limits", "peers.with_toppings", "tests.cluster.fakes"),
)
SCRIPTS = ("benchmarks/plain/side.py", "tests/bench/fake_server.py")
READ_AT_IMPORT = ("ATEN_CPU_CAPABILITY", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")
"""A child that is to have others than this process is started as ever."""
ROOT = Path(__file__).parents[1]
IMPORTED = (
    *("numpy", "torch", "numba", "zmq", "msgspec", "yaml", "uvicorn", "fastapi", "aiohttp", "transformers"),
    *(
        "safetensors.torch",
        "toppings",
        "toppings.cli.serving",
        "toppings.engine.build",
        "toppings.engine.loop",
    ),
    *("toppings.engine.process", "toppings.assist.worker", "toppings.assist.product", "toppings.remote"),
    *("toppings.engine.follower_process", "toppings.server.app", "toppings.cluster.router.app"),
)
MAX_BYTES = 1 << 17
_ARGUMENT_ROOM = "-" * 4096
"""What the warm process was started with; a child's command line, as /proc shows it, is written over it."""
_FIRST_FREE_FD = 500
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Job:
    """`targets`: which numbers the descriptors that come with it shall have."""

    arguments: list[str]
    environment: dict[str, str]
    directory: str
    targets: list[int]


class WarmProcess:
    """What forks, seen from the process that asks it to."""

    def __init__(self) -> None:
        self.owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", COLD: "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), _ARGUMENT_ROOM],
                pass_fds=(theirs.fileno(),),
                env=environment,
                stdin=subprocess.DEVNULL,
            )

    def fork(self, job: Job, descriptors: list[int]) -> int:
        """Its process id. Raises OSError where there is nothing left to fork it."""
        with self._lock:
            _adopt(True)
            try:
                _send(self._socket, job, descriptors)
                answer = self._socket.recv(MAX_BYTES)
            finally:
                _adopt(False)
        if not answer:
            raise ConnectionResetError("what forks tests' processes has ended")
        return int(answer)


class Spare:
    """A child of this process that waits to become the first one that it starts."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self._socket, self._pid = control, pid

    def fork(self, job: Job, descriptors: list[int]) -> int:
        """Its process id, which stands already. Raises OSError where it has ended."""
        with self._socket:
            _send(self._socket, job, descriptors)
        return self._pid


def _send(control: socket.socket, job: Job, descriptors: list[int]) -> None:
    socket.send_fds(control, [json.dumps(asdict(job)).encode()], descriptors)


def _adopt(does: bool) -> None:
    """Whether orphans among this process's descendants become its children."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(does), 0, 0, 0)


_lock = threading.Lock()
_warm: list[WarmProcess] = []


def warm_process() -> WarmProcess:
    """This process's own, started when it is first needed."""
    with _lock:
        if not _warm or _warm[0].owner_pid != os.getpid():
            _warm[:] = [WarmProcess()]
        return _warm[0]


class WarmPopen(subprocess.Popen[Any]):
    """`subprocess.Popen`, but for `python -m toppings...`."""

    def _find_warm(self) -> WarmProcess | Spare | None:
        return warm_process()

    def _execute_child(
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any,
        startupinfo: Any, creationflags: Any, shell: Any, *pipes_and_more: Any,
    ) -> None:  # fmt: skip
        environment = dict(os.environ if env is None else env)
        pipes, more = pipes_and_more[:6], pipes_and_more[7:]
        is_plain = executable is None and preexec_fn is None and not shell and _is_default(more)
        warm = self._find_warm() if is_plain and _is_warm(args, environment) else None
        if warm is None:
            super()._execute_child(  # type: ignore[misc]
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env,
                startupinfo, creationflags, shell, *pipes_and_more,
            )  # fmt: skip
            return
        theirs = (pipes[0], pipes[3], pipes[5])
        standard = [fd if fd != -1 else number for number, fd in enumerate(theirs)]
        job = Job(
            [str(argument) for argument in args[1:]],
            environment,
            str(cwd or os.getcwd()),
            [0, 1, 2, *pass_fds],
        )
        self.pid = warm.fork(job, [*standard, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


class SparePopen(WarmPopen):
    """In a server: warm once."""

    spares: ClassVar[list[Spare]] = []

    def _find_warm(self) -> Spare | None:
        return self.spares.pop() if self.spares else None


def _is_default(more: tuple[Any, ...]) -> bool:
    """gid, gids, uid, umask, start_new_session, process_group."""
    return all(value in (None, False, -1) for value in more)


def _is_warm(args: Any, environment: dict[str, str]) -> bool:
    """Asyncio gives a tuple of arguments."""
    is_python = (
        isinstance(args, list | tuple) and len(args) > 2 and args[0] == sys.executable
    )  # asyncio: tuple
    if not is_python or COLD in environment:
        return False
    if any(environment.get(name) != os.environ.get(name) for name in READ_AT_IMPORT):
        return False
    if args[1] == "-c":
        return WARM in environment
    return args[2] in MODULES if args[1] == "-m" else args[1] in [str(ROOT / name) for name in SCRIPTS]


def install() -> None:
    """Where Linux can."""
    if sys.platform == "linux" and COLD not in os.environ:
        subprocess.Popen = WarmPopen  # type: ignore[misc]


# --- in the process that forks ---


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    room = _argument_room()
    for name in IMPORTED:
        with suppress(ImportError):
            importlib.import_module(name)
    from toppings.ops import import_kernels

    import_kernels()
    del os.environ["OPENBLAS_NUM_THREADS"], os.environ[COLD]
    gc.collect()
    gc.freeze()
    job = _serve(control)
    if job is not None:
        job = _leave_spares(job, _num_spares(job))
    if job is not None:
        _write_arguments(room, job)
        _run(job)


def _serve(control: socket.socket) -> Job | None:
    """None where those who ask have gone; a job in the process that was forked to do it."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, MAX_BYTES, 200)
        if not data:
            return None
        job = Job(**json.loads(data))
        pid = _fork_orphan()
        if pid == 0:
            control.close()
            _place(descriptors, job.targets)
            return job
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(str(pid).encode())


def _num_spares(job: Job) -> int:
    if job.arguments[0] == "-c":
        return int(job.environment[WARM])
    return int(job.arguments[:3] == SERVER or job.arguments[:2] == ["-m", "peers.with_toppings"])


def _leave_spares(job: Job, num: int) -> Job | None:
    """The job; in a child that waits, the one that it gets, None where its parent has ended without it."""
    for _ in range(num):
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            mine.close()
            SparePopen.spares.clear()
            return _wait_for_job(theirs)
        theirs.close()
        SparePopen.spares.append(Spare(mine, pid))
        subprocess.Popen = SparePopen  # type: ignore[misc]
    return job


def _wait_for_job(control: socket.socket) -> Job | None:
    with control:
        data, descriptors, _, _ = socket.recv_fds(control, MAX_BYTES, 200)
    if not data:
        return None
    job = Job(**json.loads(data))
    _place(descriptors, job.targets)
    return job


def _fork_orphan() -> int:
    """Its process id; 0 in it, once it has its new parent."""
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:
        between = os.getpid()
        pid = os.fork()
        if pid:
            os.write(writing, str(pid).encode())
            os._exit(0)
        while os.getppid() == between:
            time.sleep(0.0005)
        return 0
    os.waitpid(between, 0)
    pid = int(os.read(reading, 32))
    os.close(reading)
    os.close(writing)
    return pid


def _place(descriptors: list[int], targets: list[int]) -> None:
    """And nothing else is open."""
    import fcntl

    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _FIRST_FREE_FD) for descriptor in descriptors]
    os.closerange(0, _FIRST_FREE_FD)
    for descriptor, target in zip(moved, targets):
        os.dup2(descriptor, target)
    os.closerange(_FIRST_FREE_FD, _FIRST_FREE_FD + 2 * len(moved) + 1)


def _argument_room() -> tuple[int, int]:
    """Where this process's arguments lie (proc_pid_stat(5): arg_start, arg_end)."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[45]), int(fields[46])


def _write_arguments(room: tuple[int, int], job: Job) -> None:
    start, end = room
    line = "\0".join([sys.executable, *job.arguments]).encode()[: end - start - 1]
    ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


def _run(job: Job) -> None:
    """As `python -m`, `python -c` and `python SCRIPT` do."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(job.environment)
    os.environ.pop(WARM, None)
    os.chdir(job.directory)
    kind, *arguments = job.arguments
    is_script = kind not in ("-m", "-c")
    place = str(Path(kind).parent) if is_script else job.directory
    paths = [path for path in job.environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [place, *(path for path in paths if path not in sys.path[1:]), *sys.path[1:]]
    if is_script:
        sys.argv = [kind, *arguments]
        runpy.run_path(kind, run_name="__main__")
    elif kind == "-c":
        sys.argv = ["-c", *arguments[1:]]
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(arguments[0], "<string>", "exec"), vars(module))
    else:
        sys.argv = arguments
        sys.modules.pop(arguments[0], None)
        with warnings.catch_warnings():
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
