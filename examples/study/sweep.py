"""The search for an arm's lr: the same log grid for all, walked until the best lies well inside."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from examples.study.config import Arm, Experiment, Run
from examples.study.results import Result, Results

TOLERANCE = 0.002  # AUC below the best that still counts as good
LOWEST, HIGHEST = -10, 8  # exponents at which a search gives up: lr 1e-5 and 1e4
STEPS_OF_10X = 2  # grid steps in a decade


def lr_at(exponent: int) -> float:
    """Half decades: ..., 0.03, 0.1, 0.3, 1, 3, ...; exponent 0 is 1."""
    decade, half = divmod(exponent, 2)
    return float(f"{3 if half else 1}e{decade}")


def next_exponents(scores: Mapping[int, float], start: int) -> list[int]:
    """The grid points to try next; none when the search is over.

    It is over when the grid reaches from where the score falls short of the best by more than
    `TOLERANCE` up to ten times the best lr.

    Args:
        scores: of the grid points tried so far, without a gap; higher is better.
        start: where to begin.
    """
    if not scores:
        return [start]
    best = max(scores, key=scores.__getitem__)
    lowest, highest = min(scores), max(scores)
    wanted = []
    if lowest > LOWEST and scores[lowest] >= scores[best] - TOLERANCE:
        wanted.append(lowest - 1)
    if highest < min(best + STEPS_OF_10X, HIGHEST):
        wanted.append(highest + 1)
    return wanted


def first_epoch(result: Result) -> dict[str, Any] | None:
    """The point of a run's curve after one epoch; None where it diverged before."""
    return next((point for point in result["curve"] if point["epoch"] == 1), None)


def best_epoch(result: Result) -> dict[str, Any] | None:
    """The point after the epoch that is best on the validation split."""
    ends = [point for point in result["curve"] if "test" in point]
    return max(ends, key=lambda point: float(point["valid"]["auc"]), default=None)


WHEN = {"1 epoch": first_epoch, "best epoch": best_epoch}
"""The points of a curve that are compared, each at its own best lr."""


def mean_auc(results: list[Result], when: str, split: str = "valid") -> float:
    """Mean over the seeds; minus infinity where a run diverged."""
    points = [WHEN[when](result) for result in results]
    values = [float(point[split]["auc"]) if point else -math.inf for point in points]
    return statistics.fmean(values)


@dataclass(frozen=True)
class Sweep:
    """The runs of one arm at one batch size."""

    experiment: Experiment
    arm: Arm
    batch_size: int

    def runs(self, exponent: int) -> list[Run]:
        """At one lr, a run a seed."""
        e = self.experiment
        return [
            Run(e.data, e.model, self.arm, lr_at(exponent), self.batch_size, e.epochs, seed)
            for seed in range(e.seeds)
        ]

    def tried(self, results: Results) -> dict[int, list[Result]]:
        """The results at each grid point that is complete and joined to the start."""
        found: dict[int, list[Result]] = {}
        for direction in (1, -1):
            exponent = self.arm.start
            while LOWEST <= exponent <= HIGHEST:
                known = [results.get(run) for run in self.runs(exponent)]
                complete = [result for result in known if result is not None]
                if len(complete) < len(known):
                    break
                found[exponent] = complete
                exponent += direction
        return dict(sorted(found.items()))

    def missing(self, results: Results) -> list[Run]:
        """The runs that the search needs next; none when it is over."""
        tried = self.tried(results)
        wanted = {
            exponent
            for when in WHEN
            for exponent in next_exponents(
                {exponent: mean_auc(found, when) for exponent, found in tried.items()},
                self.arm.start,
            )
        }
        runs = [run for exponent in sorted(wanted) for run in self.runs(exponent)]
        return [run for run in runs if results.get(run) is None]


def sweeps(experiment: Experiment) -> list[Sweep]:
    return [
        Sweep(experiment, arm, batch_size)
        for batch_size in experiment.batch_sizes
        for arm in experiment.arms
    ]
