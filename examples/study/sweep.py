"""The search for an arm's lr: the same log grid for all, walked until the best lies inside."""

from collections.abc import Mapping
from dataclasses import dataclass

from examples.study.config import MAIN, ROWWISE, Arm, Experiment, Run
from examples.study.results import Result, Results

LOWEST, HIGHEST = -20, 16  # exponents at which a search gives up: lr 1e-5 and 1e4
COARSE = 2  # grid steps of half a decade, in which a search begins
STRESS = (2, 4)  # grid steps above the best lr: about 3 and 10 times
DIVERGED = 0.5  # the AUC of a run whose loss is no number


def lr_at(exponent: int) -> float:
    """Quarter decades: ..., 0.1, 0.18, 0.32, 0.56, 1, ...; exponent 0 is 1."""
    return float(f"{10 ** (exponent / 4):.2g}")


def next_exponents(scores: Mapping[int, float], start: int) -> list[int]:
    """The grid points to try next; none when the search is over.

    It goes in half decades until the best of these has a worse one on either side, then in quarters
    until the best of all has.

    Args:
        scores: of the grid points tried so far; higher is better.
        start: where to begin.
    """
    if start not in scores:
        return [start]
    coarse = [exponent for exponent in scores if (exponent - start) % COARSE == 0]
    for best, step in ((max(coarse, key=scores.__getitem__), COARSE), (best_of(scores), 1)):
        beside = [e for e in (best - step, best + step) if LOWEST <= e <= HIGHEST]
        if missing := [exponent for exponent in beside if exponent not in scores]:
            return missing
    return []


def best_of(scores: Mapping[int, float]) -> int:
    return max(scores, key=scores.__getitem__)


@dataclass(frozen=True)
class Sweep:
    """The runs of one arm of an experiment.

    lr is searched for with the first seed, each measure's own; the other seeds run at the best lr
    of each measure and, for the two main arms, at those that stress them.
    """

    experiment: Experiment
    arm: Arm

    def run(self, exponent: int, seed: int) -> Run:
        e = self.experiment
        return Run(e.data, e.model, self.arm, lr_at(exponent), e.batch_size, e.epochs, seed)

    def tried(self, results: Results) -> dict[int, Result]:
        """Exponent -> the first seed's result, at all grid points that have one."""
        found = {e: results.get(self.run(e, seed=0)) for e in range(LOWEST, HIGHEST + 1)}
        return {exponent: result for exponent, result in found.items() if result is not None}

    def best(self, results: Results, measure: str) -> int | None:
        """The exponent of the best lr for a measure; None while the search is not over."""
        scores = _scores(self.tried(results), measure)
        return None if next_exponents(scores, self.arm.start) else best_of(scores)

    def seeds(self, results: Results, exponent: int) -> list[Result]:
        """The results of all seeds at an lr; none of them where one lacks."""
        found = [results.get(self.run(exponent, seed)) for seed in range(self.experiment.seeds)]
        known = [result for result in found if result is not None]
        return known if len(known) == len(found) else []

    def missing(self, results: Results) -> list[Run]:
        """The runs that are needed next; none when all is done."""
        tried, first = self.tried(results), self.experiment.measures[0]
        wanted = [
            (exponent, 0)
            for measure in self.experiment.measures
            for exponent in next_exponents(_scores(tried, measure), self.arm.start)
        ]
        if not wanted:
            best = {
                measure: best_of(_scores(tried, measure)) for measure in self.experiment.measures
            }
            confirmed = set(best.values())
            if self.experiment.stress:
                stress = {min(best[first] + steps, HIGHEST) for steps in STRESS}
                theirs = Sweep(self.experiment, ROWWISE).best(results, first)
                if theirs is not None and self.arm.optimizer == "FrequencySGD":
                    stress.add(theirs)
                wanted = [(exponent, 0) for exponent in stress]
                if self.arm in MAIN:
                    confirmed |= stress
            wanted += [(e, seed) for e in confirmed for seed in range(self.experiment.seeds)]
        runs = [self.run(exponent, seed) for exponent, seed in sorted(set(wanted))]
        return [run for run in runs if results.get(run) is None]


def figure(result: Result, measure: str, metric: str) -> float:
    """A figure of a run for a measure; `DIVERGED` where the run did not come so far."""
    return float(result["measures"].get(measure, {}).get(metric, DIVERGED))


def _scores(tried: Mapping[int, Result], measure: str) -> dict[int, float]:
    return {exponent: figure(result, measure, "by") for exponent, result in tried.items()}
