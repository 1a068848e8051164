"""Runs what the settings need and the results file lacks, several runs at a time."""

import multiprocessing
import os
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Final

import torch
from tqdm import tqdm

from benchmarks.study.config import ROWWISE, TASKS, Setting
from benchmarks.study.data import Data, check, find, prepare
from benchmarks.study.search import STRESS, Result, Results, Run, Sweep
from benchmarks.study.tables import CUDA, ONLY_CUDA
from benchmarks.study.train import train

TRIED: Final = 5  # lr by half decades, about: what the time left is told by before it is known


def run_all(settings: Sequence[Setting], results: Results, folder: Path, workers: int) -> None:
    """Completes the settings.

    Args:
        folder: of the data sets, or of the samples of a file.
        workers: processes.
    """
    work = [part for setting in settings for part in _parts(setting, folder, results)]
    running: dict[Future[Result], tuple[Run, _Part]] = {}
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool,
        tqdm(desc="samples", unit="", unit_scale=True, smoothing=0.02) as bar,
    ):
        while True:
            busy = {run for run, _ in running.values()}
            for part in work:
                for run in part.missing:
                    # Not more than the workers can take: what is needed after them may change.
                    if len(running) < workers and run not in busy:
                        busy.add(run)
                        running[pool.submit(train, run, folder)] = run, part
            bar.total = bar.n + sum(part.left() for part in work)
            if not running:
                bar.total = bar.n
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, part = running.pop(future)
                results.add(future.result())
                bar.set_postfix_str(f"{run.setting.name}, {run.variant.label}, lr {run.lr:g}")
                part.done += part.cost(run)
                bar.update(part.cost(run))
                for other in work:
                    if other.sweep.setting == run.setting:
                        other.update(results)


class _Part:
    """An arm's runs in a setting: what is missing, and how much of it, in samples to train on."""

    def __init__(self, sweep: Sweep, data: Data, results: Results) -> None:
        self.sweep = sweep
        self._whole = len(data.train) * (2 if sweep.setting.shuffled else 1)
        self._search = len(data.train) if sweep.setting.shuffled else data.first
        self.done = 0
        self.update(results)

    def update(self, results: Results) -> None:
        self.missing = self.sweep.missing(results)

    def cost(self, run: Run) -> int:
        return self._whole if run.whole else self._search

    def left(self) -> int:
        """About how many samples are left."""
        known = sum(map(self.cost, self.missing))
        if not self.missing or self.missing[0].whole:
            return known
        setting, arm = self.sweep.setting, self.sweep.arm
        judged = 1 + len(STRESS) * (setting.stressed and arm.stressed)
        search = (TRIED * len(arm.variants) + TRIED // 2) * self._search
        return max(known, search + judged * setting.seeds * self._whole - self.done)


def _parts(setting: Setting, folder: Path, results: Results) -> list[_Part]:
    if setting.task in TASKS:
        prepare(setting.task, folder)
    data = check(find(setting, folder), setting.name)
    return [
        _Part(Sweep(setting, arm, ROWWISE if arm != ROWWISE else None), data, results)
        for arm in setting.arms
        if CUDA or arm.variants[0].optimizer not in ONLY_CUDA
    ]


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
