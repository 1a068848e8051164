"""Programs as a shell or torchrun starts them, but forked from a server that has imported torch."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ranks import context
from torch.distributed import TCPStore

_TIMEOUT_SECONDS = 120


class Program:
    """A started program.

    Attributes:
        processes: one, or one a rank.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[object],
        *,
        ranks: int | None = None,
        cwd: Path | None = None,
        before: Callable[[], object] | None = None,
        **environment: str,
    ) -> None:
        """Starts it.

        Args:
            name: of a module, or a file.
            ranks: as many processes as torchrun would start; None for one without a group.
            before: is called in each process before the program.
        """
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name, kind) for kind in ("out", "err"))
        self._out.touch()
        self._err.touch()
        # The CPU path, wherever the test runs.
        given = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
        if ranks is not None:
            # As torchrun does it, on a port that nobody else can take meanwhile.
            self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            given |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self._store.port)}
            given |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            given |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        paths = (str(self._out), str(self._err))
        self.processes: list[Any] = []
        for rank in map(str, range(ranks or 1)):
            own = {} if ranks is None else {"RANK": rank, "LOCAL_RANK": rank}
            job = (name, list(map(str, arguments)), str(cwd or Path.cwd()), given | own, paths)
            self.processes.append(context.Process(target=_run, args=(*job, before)))
            self.processes[-1].start()

    def wait(self, timeout: float = _TIMEOUT_SECONDS) -> list[int]:
        """The exit codes."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return self.kill()

    def wait_for_a_death(self) -> list[int]:
        """The exit codes, where all are killed when one has ended."""
        wait([process.sentinel for process in self.processes], _TIMEOUT_SECONDS)
        return self.kill()

    def kill(self) -> list[int]:
        """By SIGKILL, what still runs. The exit codes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def printed(self) -> str:
        return (self.out + self.err).replace("\r", "\n")


def run(
    name: str, *arguments: object, timeout: float = _TIMEOUT_SECONDS, **options: Any
) -> Program:
    """Runs a program to its end, which must be a good one."""
    program = Program(name, arguments, **options)
    codes = program.wait(timeout)
    assert set(codes) == {0}, f"{name} {arguments}: {codes}\n{program.printed[-5000:]}"
    return program


def _run(
    name: str,
    arguments: list[str],
    cwd: str,
    environment: Mapping[str, str],
    files: tuple[str, str],
    before: Callable[[], object] | None,
) -> None:
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if before is not None:
        before()
    sys.argv = [name, *arguments]
    # The module was imported with what it needs.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
