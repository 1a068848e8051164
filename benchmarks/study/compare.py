"""What was found for each arm at its own best lr, and paired differences between arms."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.study.config import EXPERIMENTS, FREQUENCY, ROWWISE, Experiment
from benchmarks.study.sweep import Result, Results, Sweep, figure


class Difference(NamedTuple):
    """Mean of paired differences, and its standard error (NaN of one pair)."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + f" ± {self.error:.4f}" * (not math.isnan(self.error))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Of figures that belong to the same seeds, in the same order."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else math.nan
    return Difference(statistics.fmean(differences), error)


@dataclass(frozen=True)
class Found:
    """What is known of one arm in one setting.

    Attributes:
        best: measure -> exponent of the best lr.
        results: exponent -> a result a seed.
    """

    experiment: Experiment
    best: Mapping[str, int]
    results: Mapping[int, Sequence[Result]]

    def mean(self, measure: str, metric: str = "auc") -> float:
        """Over the seeds, at the best lr."""
        return statistics.fmean(self.at(self.best[measure], measure, metric))

    def at(self, exponent: int, measure: str, metric: str = "auc") -> list[float]:
        """A figure a seed at some lr; empty where it was not run."""
        return [figure(result, measure, metric) for result in self.results.get(exponent, ())]


Arms = Mapping[str, Found]
"""Label of an arm -> what is known of it."""
Settings = Mapping[str, Arms]


def found(results: Results) -> dict[str, dict[str, Found]]:
    """What is known, by setting and arm. A setting without row-wise Adagrad is left out."""
    settings: dict[str, dict[str, Found]] = {}
    for experiment in (e for chosen in EXPERIMENTS.values() for e in chosen):
        for arm in experiment.arms:
            sweep = Sweep(experiment, arm)
            best = {measure: sweep.best(results, measure) for measure in experiment.measures}
            done = {measure: e for measure, e in best.items() if e is not None}
            if len(done) == len(best):
                arms = settings.setdefault(experiment.setting, {})
                arms[arm.label] = Found(experiment, done, sweep.tried(results))
    return {name: arms for name, arms in settings.items() if ROWWISE.label in arms}


def gain(
    arms: Arms,
    measure: str,
    label: str = FREQUENCY.label,
    over: str = ROWWISE.label,
    *,
    times: int = 0,
    at_their_lr: bool = False,
) -> Difference | None:
    """AUC of one arm less that of another one; None where an arm was not run there.

    Args:
        times: grid steps of lr above the best one of each.
        at_their_lr: the first arm at the best lr of the other one instead of its own.
    """
    if not {label, over} <= arms.keys():
        return None
    theirs = arms[over].best[measure] + times
    ours = theirs if at_their_lr else arms[label].best[measure] + times
    pair = arms[label].at(ours, measure), arms[over].at(theirs, measure)
    return paired(*pair) if all(pair) else None
