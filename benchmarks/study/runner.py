"""Runs what the experiments need and the results file lacks, several runs at a time."""

import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common.ranks import start_ranks
from benchmarks.study.config import Experiment, Run
from benchmarks.study.data import find
from benchmarks.study.sweep import Result, Results, Sweep
from benchmarks.study.train import train


def run_all(
    experiments: Sequence[Experiment], results: Results, folder: Path, workers: int
) -> None:
    """Completes the experiments.

    Args:
        folder: of the data sets; experiments whose data set is not there are left out.
        workers: processes, each with one rank.
    """
    absent = [e.data for e in experiments if find(e.data, folder) is None]
    if absent:
        print(f"Left out: {', '.join(sorted(set(absent)))}, which {folder} does not hold.")
    chosen = [experiment for experiment in experiments if experiment.data not in absent]
    running: dict[Future[Result], Run] = {}
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool,
        tqdm(desc="runs", unit="run") as bar,
    ):
        while True:
            # Not more than the workers can take: what is needed after them may change.
            for run in missing(chosen, results):
                if len(running) == workers:
                    break
                if run not in running.values():
                    running[pool.submit(work, run, folder)] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                results.add(run, future.result())
                bar.set_postfix_str(f"{run.model} on {run.data}, {run.arm.label}, lr {run.lr:g}")
                bar.update()


def missing(experiments: Iterable[Experiment], results: Results) -> Iterator[Run]:
    """The runs that are needed next. More may be when those are done."""
    for experiment in experiments:
        for arm in experiment.arms:
            yield from Sweep(experiment, arm).missing(results)


def work(run: Run, folder: Path) -> Result:
    with start_ranks():
        return train(run, folder)


def _start_worker() -> None:
    """A process that ends with the one that started it, also where that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_WORLD_SIZE="1")
