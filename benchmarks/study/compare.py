"""Paired differences between arms, with intervals, and what the rules and targets say of them."""

import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from benchmarks.common.samples import Array
from benchmarks.study.config import OURS, ROWWISE, STREAM, Arm, Setting, Variant
from benchmarks.study.search import DIVERGED, Result, Results, Sweep

RESAMPLES: Final = 1000
LEVEL: Final = 0.95


class Difference(NamedTuple):
    """A mean of paired differences.

    Attributes:
        error: standard error over the seeds; NaN of one.
        low: with `high` the bootstrap interval over blocks of time; NaN where a run diverged.
    """

    mean: float
    error: float = math.nan
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        text = f"{self.mean:+.4f}" + f" ± {self.error:.4f}" * (not math.isnan(self.error))
        return text + f" [{self.low:+.4f}, {self.high:+.4f}]" * (not math.isnan(self.low))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Of figures that belong to the same seeds, in the same order."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else math.nan
    return Difference(statistics.fmean(differences), error)


def ratio(a: Array, b: Array) -> Array:
    """a / b, NaN where b is 0."""
    found: Array = np.divide(a, b, out=np.full(len(a), np.nan), where=b > 0)
    return found


class Blocks(NamedTuple):
    """What AUC is made of, by blocks of time; see `train.wins`."""

    won: Array  # float64 [blocks, blocks]
    ones: Array  # [blocks]
    zeros: Array

    def auc(self, weights: Array) -> Array:
        """[resamples] AUC where each block occurs so often; weights: [resamples, blocks]."""
        pairs = (weights @ self.ones) * (weights @ self.zeros)
        won = np.einsum("ra,ab,rb->r", weights, self.won, weights, optimize=True)
        return ratio(won, pairs)


def blocks(result: Result, measure: str) -> Blocks | None:
    """The judged blocks of a run; None where it diverged before."""
    found = result["measures"].get(measure)
    if found is None:
        return None
    start = found["first_block"]
    won = np.array(found["won"])[start:, start:] / 2
    return Blocks(won, *(np.array(found[name][start:]) for name in ("ones", "zeros")))


def bootstrap(pairs: Sequence[tuple[Blocks, Blocks]], resamples: int = RESAMPLES) -> Array:
    """[resamples] mean differences of AUC where blocks of time are drawn with replacement.

    Args:
        pairs: of each seed the two arms' blocks; all arms and seeds see the same draws.
    """
    count = len(pairs[0][0].ones)
    drawn = np.random.default_rng(0).integers(count, size=(resamples, count))
    weights = np.stack([np.bincount(row, minlength=count) for row in drawn]).astype(float)
    differences: Array = np.mean([a.auc(weights) - b.auc(weights) for a, b in pairs], axis=0)
    return differences


def difference(ours: Sequence[Result], theirs: Sequence[Result], measure: str) -> Difference:
    """AUC of one arm less that of another, of runs that belong to the same seeds."""
    found = paired([figure(r, measure) for r in ours], [figure(r, measure) for r in theirs])
    both = [(blocks(a, measure), blocks(b, measure)) for a, b in zip(ours, theirs, strict=True)]
    known = [(a, b) for a, b in both if a is not None and b is not None]
    if len(known) < len(both):
        return found
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(bootstrap(known), [tail, 1 - tail])
    return found._replace(low=float(low), high=float(high))


def figure(result: Result, measure: str, name: str = "auc") -> float:
    """A figure of a run; `DIVERGED` where it did not come so far."""
    found = result["measures"].get(measure)
    return DIVERGED if found is None else float(found[name])


def curve(result: Result) -> Array:
    """[blocks] AUC of the predictions of a stream so far, at the end of each block.

    Predictions of the first blocks, on which lr is chosen, are in it.
    """
    found = result["measures"][STREAM]
    won = np.cumsum(np.cumsum(np.array(found["won"]) / 2, axis=0), axis=1).diagonal()
    pairs = np.cumsum(found["ones"]) * np.cumsum(found["zeros"])
    return ratio(won, pairs)


def share_to_target(curve: Array, target: float) -> float | None:
    """Share of the samples after which a curve stays at or above a target; None: it does not.

    Args:
        curve: [parts] at the end of each of equal parts; between them it is a straight line.
    """
    below = np.flatnonzero(~(curve >= target))
    if not len(below):
        return 1 / len(curve)
    last = int(below[-1])
    if last + 1 == len(curve):
        return None
    here, there = curve[last], curve[last + 1]
    part = 1.0 if math.isnan(here) else (target - here) / (there - here)
    return float((last + 1 + part) / len(curve))


class Known:
    """What has been run of a form's settings.

    Attributes:
        all: name -> setting.
        settings: those in which row-wise Adagrad and another arm have been judged.
    """

    def __init__(self, results: Results, settings: Iterable[Setting]) -> None:
        self.results = results
        self.best = functools.cache(self._best)
        self.runs = functools.cache(self._runs)
        self.gain = functools.cache(self._gain)
        self.gain_at = functools.cache(self._gain_at)
        self.all = {setting.name: setting for setting in settings}
        self.settings = [s for s in self.all.values() if self.runs(s, ROWWISE) and self.others(s)]

    def others(self, setting: Setting) -> list[Arm]:
        return [arm for arm in setting.arms if arm != ROWWISE and self.runs(setting, arm)]

    def _best(self, setting: Setting, arm: Arm) -> tuple[Variant, int] | None:
        """The best variant and exponent of lr; None while they are searched for."""
        return Sweep(setting, arm).best(self.results)

    def _runs(self, setting: Setting, arm: Arm, exponent: int | None = None) -> list[Result]:
        """A result a seed, at the best lr or at another; none where that was not run."""
        best = self.best(setting, arm)
        if best is None:
            return []
        sweep = Sweep(setting, arm)
        return sweep.judged(self.results, best[0], best[1] if exponent is None else exponent)

    def _gain(
        self, setting: Setting, measure: str, ours: Arm = OURS, theirs: Arm = ROWWISE
    ) -> Difference | None:
        """AUC of an arm less that of another, each at its best; None where one was not run."""
        pair = self.runs(setting, ours), self.runs(setting, theirs)
        return difference(*pair, measure) if all(pair) else None

    def _gain_at(
        self, setting: Setting, measure: str, steps: int, *, same: bool
    ) -> Difference | None:
        """The same so many grid steps of lr above the best one of each.

        Args:
            same: above row-wise Adagrad's best lr, for both arms.
        """
        mine, other = self.best(setting, OURS), self.best(setting, ROWWISE)
        if mine is None or other is None:
            return None
        ours = self.runs(setting, OURS, (other if same else mine)[1] + steps)
        theirs = self.runs(setting, ROWWISE, other[1] + steps)
        return difference(ours, theirs, measure) if ours and theirs else None

    def share(self, setting: Setting, arm: Arm) -> float | None:
        """Share of the stream after which an arm's AUC so far stays above row-wise Adagrad's last.

        Of the mean over the seeds; None: never, or no stream, or a run diverged.
        """
        ours, theirs = self.runs(setting, arm), self.runs(setting, ROWWISE)
        if not ours or not all(STREAM in run["measures"] for run in (*ours, *theirs)):
            return None
        mine, other = (np.mean([curve(r) for r in runs], axis=0) for runs in (ours, theirs))
        return share_to_target(mine, float(other[-1]))
