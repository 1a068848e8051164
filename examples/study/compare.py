"""What was found for each arm at its own best lr, and paired differences between arms."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from examples.study.config import EXPERIMENTS, FREQUENCY, ROWWISE, Experiment
from examples.study.results import Result, Results
from examples.study.sweep import Sweep, figure


class Difference(NamedTuple):
    """Mean of paired differences, and its standard error (NaN of one pair)."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + f" ± {self.error:.4f}" * (not math.isnan(self.error))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Of figures that belong to the same seeds, in the same order."""
    differences = [a - b for a, b in zip(ours, theirs, strict=False)]
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else math.nan
    return Difference(statistics.fmean(differences), error)


@dataclass(frozen=True)
class Found:
    """What is known of one arm in one setting.

    Attributes:
        best: measure -> exponent of the best lr, where the search is over and all seeds are there.
        results: exponent -> a result a seed; of the first seed alone where the others lack.
    """

    experiment: Experiment
    best: Mapping[str, int]
    results: Mapping[int, Sequence[Result]]

    def figures(self, measure: str, steps: int = 0, metric: str = "auc") -> list[float]:
        """A figure a seed, `steps` grid points above the best lr; empty where it was not run."""
        return self.at(self.best[measure] + steps, measure, metric)

    def at(self, exponent: int, measure: str, metric: str = "auc") -> list[float]:
        return [figure(result, measure, metric) for result in self.results.get(exponent, ())]


Arms = Mapping[str, Found]
"""Label of an arm -> what is known of it."""


def found(results: Results) -> dict[str, dict[str, Found]]:
    """What is known, by setting and arm. A setting without row-wise Adagrad is left out."""
    settings: dict[str, dict[str, Found]] = {}
    for experiment in (e for chosen in EXPERIMENTS.values() for e in chosen):
        for arm in experiment.arms:
            sweep = Sweep(experiment, arm)
            best = {}
            for measure in experiment.measures:
                exponent = sweep.best(results, measure)
                if exponent is not None and sweep.seeds(results, exponent):
                    best[measure] = exponent
            if len(best) == len(experiment.measures):
                known = {
                    exponent: sweep.seeds(results, exponent) or [first]
                    for exponent, first in sweep.tried(results).items()
                }
                arms = settings.setdefault(experiment.setting, {})
                arms[arm.label] = Found(experiment, best, known)
    return {name: arms for name, arms in settings.items() if ROWWISE.label in arms}


def gain(
    arms: Arms, measure: str, label: str = FREQUENCY.label, over: str = ROWWISE.label
) -> Difference:
    """AUC of one arm less that of another one, each at its own best lr."""
    return paired(arms[label].figures(measure), arms[over].figures(measure))


def at_their_lr(arms: Arms, measure: str) -> Difference | None:
    """FrequencySGD at row-wise Adagrad's best lr, less row-wise Adagrad there."""
    theirs = arms[ROWWISE.label]
    ours = arms[FREQUENCY.label].at(theirs.best[measure], measure)
    return paired(ours, theirs.figures(measure)) if ours else None


def at_times(arms: Arms, measure: str, steps: int) -> Difference | None:
    """FrequencySGD less row-wise Adagrad, each at the same multiple of its own best lr."""
    ours, theirs = (arms[arm.label].figures(measure, steps) for arm in (FREQUENCY, ROWWISE))
    return paired(ours, theirs) if ours and theirs else None
