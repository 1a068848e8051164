"""The results file, and the search for lr: one log grid, walked until the best lies inside."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.study.config import FREQUENCY, ROWWISE, Arm, Experiment, Run

LOWEST, HIGHEST = -20, 16  # exponents at which a search gives up: lr 1e-5 and 1e4
COARSE = 2  # grid steps of half a decade, in which a search begins
STRESS = (2, 4)  # grid steps above the best lr: about 3 and 10 times
DIVERGED = 0.5  # the AUC of a run whose loss is no number


Result = dict[str, Any]
KEY = tuple(field.name for field in fields(Run))


class Results:
    """What is known so far. A run that has its line is not run again.

    Args:
        path: the file; made with the first result. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results: dict[tuple[Any, ...], Result] = {}
        if path.exists():
            *whole, rest = path.read_text().split("\n")
            for line in whole:
                result = json.loads(line)
                self._results[tuple(result[name] for name in KEY)] = result
            if rest:
                path.write_text("".join(line + "\n" for line in whole))

    def get(self, run: Run) -> Result | None:
        return self._results.get(tuple(run.key().values()))

    def add(self, run: Run, result: Result) -> None:
        self._results[tuple(run.key().values())] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")


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
    coarse = {e: score for e, score in scores.items() if (e - start) % COARSE == 0}
    for best, step in ((best_of(coarse), COARSE), (best_of(scores), 1)):
        beside = [e for e in (best - step, best + step) if LOWEST <= e <= HIGHEST]
        if missing := [exponent for exponent in beside if exponent not in scores]:
            return missing
    return []


def best_of(scores: Mapping[int, float]) -> int:
    return max(scores, key=scores.__getitem__)


@dataclass(frozen=True)
class Sweep:
    """The runs of one arm of an experiment: lr is searched for each measure, by all seeds' mean."""

    experiment: Experiment
    arm: Arm

    def run(self, exponent: int, seed: int = 0) -> Run:
        e = self.experiment
        return Run(e.data, e.model, self.arm, lr_at(exponent), e.batch_size, e.epochs, seed)

    def runs(self, exponent: int) -> list[Run]:
        """At one lr, a run a seed."""
        return [self.run(exponent, seed) for seed in range(self.experiment.seeds)]

    def tried(self, results: Results) -> dict[int, list[Result]]:
        """Exponent -> a result a seed, at all grid points where all seeds have one."""
        found = {}
        for exponent in range(LOWEST, HIGHEST + 1):
            if results.get(self.run(exponent)) is not None:
                known = [results.get(run) for run in self.runs(exponent)]
                if None not in known:
                    found[exponent] = [result for result in known if result is not None]
        return found

    def best(self, results: Results, measure: str) -> int | None:
        """The exponent of the best lr for a measure; None while the search is not over."""
        scores = mean_scores(self.tried(results), measure)
        return None if next_exponents(scores, self.arm.start) else best_of(scores)

    def missing(self, results: Results) -> list[Run]:
        """The runs that are needed next; none when all is done."""
        tried = self.tried(results)
        scores = [mean_scores(tried, measure) for measure in self.experiment.measures]
        wanted = {e for found in scores for e in next_exponents(found, self.arm.start)}
        if not wanted and self.experiment.stressed:
            wanted = {min(best_of(scores[0]) + steps, HIGHEST) for steps in STRESS}
            first = self.experiment.measures[0]
            theirs = Sweep(self.experiment, ROWWISE).best(results, first)
            if theirs is not None and self.arm.optimizer == FREQUENCY.optimizer:
                wanted.add(theirs)
        runs = [run for exponent in sorted(wanted) for run in self.runs(exponent)]
        return [run for run in runs if results.get(run) is None]


def figure(result: Result, measure: str, metric: str) -> float:
    """A figure of a run for a measure; `DIVERGED` where the run did not come so far."""
    return float(result["measures"].get(measure, {}).get(metric, DIVERGED))


def mean_scores(tried: Mapping[int, list[Result]], measure: str) -> dict[int, float]:
    """Exponent -> the mean of what lr is chosen by."""
    return {
        exponent: statistics.fmean(figure(result, measure, "by") for result in results)
        for exponent, results in tried.items()
    }
