"""Runs a test function on N gloo ranks, each a process of its own."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec

P = ParamSpec("P")

_TIMEOUT_SECONDS = 120

# Ranks are forked from a server that has imported the slow packages once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torchrec_freq", "torchrec.distributed.model_parallel", "pytest"])


def on_ranks(ranks: int, hosts: int = 1) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorates a test: every rank runs it; ``hosts`` makes TorchRec see that many machines."""

    def decorate(test: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(test)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            assert not args, "pytest passes arguments by name"
            run_on_ranks(ranks, test, kwargs, hosts=hosts)

        return run

    return decorate


def run_on_ranks(
    ranks: int, test: Callable[..., None], kwargs: dict[str, Any], hosts: int = 1
) -> None:
    """Runs a module-level function on ``ranks`` processes; fails with the first rank's trace."""
    with tempfile.TemporaryDirectory() as folder:
        errors = _context.Queue()
        processes = [
            _context.Process(
                target=_run_rank,
                args=(rank, ranks, hosts, folder, test.__module__, test.__name__, kwargs, errors),
                daemon=True,
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        try:
            while any(process.is_alive() for process in processes):
                for process in processes:
                    process.join(0.02)
                if not errors.empty():
                    raise AssertionError(errors.get())
                if time.monotonic() > deadline:
                    raise AssertionError(f"the ranks did not end within {_TIMEOUT_SECONDS} s")
            # A rank that died without a trace was killed by a signal.
            codes = [process.exitcode for process in processes]
            if not errors.empty():
                raise AssertionError(errors.get())
            assert codes == [0] * ranks, f"exit codes of the ranks: {codes}"
        finally:
            for process in processes:
                process.kill()


def _run_rank(
    rank: int,
    ranks: int,
    hosts: int,
    folder: str,
    module: str,
    name: str,
    kwargs: dict[str, Any],
    errors: Any,
) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks // hosts)
    os.environ["LOCAL_RANK"] = str(rank % (ranks // hosts))
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
        )
        test = getattr(importlib.import_module(module), name)
        getattr(test, "__wrapped__", test)(**kwargs)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"rank {rank} of {ranks}:\n{traceback.format_exc()}")
        errors.close()
        errors.join_thread()
        raise SystemExit(1) from None
