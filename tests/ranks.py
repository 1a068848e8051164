"""Runs a test function on N gloo ranks: processes that live on from test to test."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from typing import Any, ParamSpec

P = ParamSpec("P")

_TIMEOUT_SECONDS = 120

# Ranks, and the programs that tests kill, are forked from a server that has imported them once.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["examples.criteo.__main__", "examples.demo", "pytest"])

_workers: list[_Worker] = []  # rank r of every test is the r-th of them


def on_ranks(
    ranks: int, hosts: int = 1, timeout: float = _TIMEOUT_SECONDS
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorates a test: every rank runs it; ``hosts`` makes TorchRec see that many machines."""

    def decorate(test: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(test)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            assert not args, "pytest passes arguments by name"
            run_on_ranks(ranks, test, kwargs, hosts=hosts, timeout=timeout)

        return run

    return decorate


def run_on_ranks(
    ranks: int,
    test: Callable[..., None],
    kwargs: dict[str, Any],
    hosts: int = 1,
    timeout: float = _TIMEOUT_SECONDS,
) -> None:
    """Runs a module-level function on ``ranks`` processes; fails with the first rank's trace.

    The processes serve the next test, too, unless this one fails.
    """
    while len(_workers) < ranks:
        _workers.append(_Worker(len(_workers)))
    ours = _workers[:ranks]
    try:
        with tempfile.TemporaryDirectory() as folder:
            for worker in ours:
                worker.send(ranks, hosts, folder, test.__module__, test.__name__, kwargs)
            _wait(ours, timeout)
    except BaseException:
        # Nobody knows what state they are in.
        _end_all()
        raise


@atexit.register
def _end_all() -> None:
    for worker in _workers:
        worker.process.kill()
        worker.process.join()
    _workers.clear()


def _wait(workers: list[_Worker], timeout: float) -> None:
    """Until all have done their test.

    Raises:
        AssertionError: one failed or died, or the time is over.
    """
    deadline = time.monotonic() + timeout
    waiting: dict[Any, _Worker] = {worker.connection: worker for worker in workers}
    error = None
    while waiting:
        ready: list[Any] = wait(list(waiting), deadline - time.monotonic())
        if not ready:
            raise AssertionError(error or f"the ranks did not end within {timeout:g} s")
        for connection in ready:
            worker = waiting.pop(connection)
            try:
                said = connection.recv()
            except EOFError:
                raise AssertionError(
                    f"rank {worker.rank} of {len(workers)}: {worker.end()}"
                ) from None
            if said is not None and error is None:
                # Where a rank is killed, the others fail, perhaps before its end is seen.
                error, deadline = said, min(deadline, time.monotonic() + 0.5)
    if error is not None:
        raise AssertionError(error)


class _Worker:
    """The process of a rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(rank, theirs))
        self.process.start()
        theirs.close()

    def end(self) -> str:
        """What ended it."""
        self.process.join()
        code = self.process.exitcode or 0
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def send(self, *job: Any) -> None:
        # Where test modules are found may have changed since the process was started.
        self.connection.send((sys.path, *job))


def _serve(rank: int, connection: Any) -> None:
    import torch

    torch.set_num_threads(1)
    # A collection after each test need not look at what is here now.
    gc.freeze()
    while True:
        try:
            sys.path[:], *job = connection.recv()
        except EOFError:  # the tests are over
            return
        try:
            run_rank(rank, *job)
        except BaseException:
            connection.send(f"rank {rank} of {job[0]}:\n{traceback.format_exc()}")
            return
        connection.send(None)


def run_rank(
    rank: int, ranks: int, hosts: int, folder: str, module: str, name: str, kwargs: dict[str, Any]
) -> None:
    """Runs a function of a module as a rank of a group that meets in a folder."""
    import torch.distributed as dist

    test = getattr(importlib.import_module(module), name)
    local = {"LOCAL_WORLD_SIZE": ranks // hosts, "LOCAL_RANK": rank % (ranks // hosts)}
    with _left_as_found():
        os.environ.update({key: str(value) for key, value in local.items()})
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
        )
        getattr(test, "__wrapped__", test)(**kwargs)
        dist.barrier()
        gc.collect()  # models hold groups
        dist.destroy_process_group()


@contextlib.contextmanager
def _left_as_found() -> Iterator[None]:
    """Takes back what a test sets for its whole process."""
    import numpy as np
    import torch
    from torchrec.distributed import collective_utils, comm

    environment, folder = dict(os.environ), os.getcwd()
    random = (torch.get_rng_state(), np.random.get_state())
    # TorchRec keeps the groups of hosts, and what it has agreed on with the first group.
    kept = [(vars(module), dict(vars(module))) for module in (collective_utils, comm)]
    with warnings.catch_warnings(), torch.enable_grad():
        yield
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_rng_state(random[0])
    np.random.set_state(random[1])
    torch.set_default_dtype(torch.float32)
    for now, before in kept:
        now.update(before)
