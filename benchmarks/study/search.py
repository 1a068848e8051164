"""The results file, and the search for lr: one log grid, walked until the best lies inside."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.study.config import Arm, Setting, Variant

LOWEST, HIGHEST = -20, 16  # exponents at which a search gives up: lr 1e-5 and 1e4
COARSE: Final = 2  # grid steps of half a decade, in which a search begins
STRESS: Final = {"a third of": -2, "3 times": 2, "10 times": 4}  # the best lr: grid steps
DIVERGED: Final = 0.5  # the AUC of a run whose loss is no number

Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run; its result is one line of the results file.

    Attributes:
        whole: else only what chooses lr is trained on: the first fifth, or one epoch.
    """

    setting: Setting
    variant: Variant
    lr: float
    seed: int
    whole: bool

    @property
    def model(self) -> str:
        return self.setting.model

    def key(self) -> Result:
        """What identifies the run, as JSON."""
        return {
            "setting": self.setting.name,
            "variant": self.variant.label,
            "lr": self.lr,
            "seed": self.seed,
            "whole": self.whole,
        }


class Results:
    """What is known so far. A run that has its line is not run again.

    Args:
        path: the file; made with the first result. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[tuple[Any, ...], Result] = {}
        if path.exists():
            *lines, rest = path.read_text(encoding="utf-8").split("\n")
            for line in lines:
                result = json.loads(line)
                self._known[_key(result)] = result
            if rest:
                path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def get(self, run: Run) -> Result | None:
        return self._known.get(_key(run.key()))

    def add(self, result: Result) -> None:
        self._known[_key(result)] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def _key(result: Result) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("setting", "variant", "lr", "seed", "whole"))


def lr_at(exponent: int) -> float:
    """Quarter decades: ..., 0.1, 0.18, 0.32, 0.56, 1, ...; exponent 0 is 1."""
    return float(f"{10 ** (exponent / 4):.2g}")


def next_exponents(scores: Mapping[int, float], start: int, *, fine: bool = True) -> list[int]:
    """The grid points to try next; none when the search is over.

    It goes in half decades until the best of these has a worse one on either side, then in quarters
    until the best of all has.

    Args:
        scores: of the grid points tried so far; higher is better.
        start: where to begin.
        fine: whether quarters are wanted.
    """
    if start not in scores:
        return [start]
    coarse = {e: score for e, score in scores.items() if (e - start) % COARSE == 0}
    steps = ((best_of(coarse), COARSE), (best_of(scores), 1))
    for best, step in steps if fine else steps[:1]:
        beside = [e for e in (best - step, best + step) if LOWEST <= e <= HIGHEST]
        if missing := [exponent for exponent in beside if exponent not in scores]:
            return missing
    return []


def best_of(scores: Mapping[int, float]) -> int:
    return max(scores, key=scores.__getitem__)


@dataclass(frozen=True)
class Sweep:
    """The runs of an arm in a setting: first those that choose its options and lr, then whole ones.

    Args:
        reference: at whose best lr the arm is tried, too, and at the same multiples of it.
    """

    setting: Setting
    arm: Arm
    reference: Arm | None = None

    def _runs(self, variant: Variant, exponent: int, whole: bool) -> list[Run]:
        seeds = range(self.setting.seeds if whole else 1)
        return [Run(self.setting, variant, lr_at(exponent), seed, whole) for seed in seeds]

    def scores(self, results: Results, variant: Variant) -> dict[int, float]:
        """Exponent -> what lr is chosen by, where it has been run."""
        found = {}
        for exponent in range(LOWEST, HIGHEST + 1):
            (run,) = self._runs(variant, exponent, whole=False)
            if (result := results.get(run)) is not None:
                found[exponent] = DIVERGED if result["by"] is None else result["by"]
        return found

    def _search(self, results: Results) -> tuple[list[Run], tuple[Variant, int] | None]:
        """The runs that the search needs next, or else the best variant and its lr's exponent."""
        start = self.arm.start
        scores = {variant: self.scores(results, variant) for variant in self.arm.variants}
        wanted = {
            variant: next_exponents(found, start, fine=False) for variant, found in scores.items()
        }
        if not any(wanted.values()):  # quarters of a decade for the best variant alone
            best = max(scores, key=lambda variant: max(scores[variant].values()))
            wanted = {best: next_exponents(scores[best], start)}
            if not wanted[best]:
                return [], (best, best_of(scores[best]))
        runs = [
            run
            for variant, exponents in wanted.items()
            for exponent in exponents
            for run in self._runs(variant, exponent, whole=False)
        ]
        return runs, None

    def best(self, results: Results) -> tuple[Variant, int] | None:
        """The best variant and the exponent of its lr; None while the search is not over."""
        return self._search(results)[1]

    def judged(self, results: Results, variant: Variant, exponent: int) -> list[Result]:
        """A result a seed of whole runs; none where they have not been run."""
        runs = self._runs(variant, exponent, whole=True)
        known = [result for run in runs if (result := results.get(run)) is not None]
        return known if len(known) == len(runs) else []

    def missing(self, results: Results) -> list[Run]:
        """The runs that are needed next; none when all is done."""
        runs, best = self._search(results)
        if best is not None:
            variant, exponent = best
            exponents = {exponent}
            if self.arm.stressed and self.setting.stressed:
                exponents |= {exponent + steps for steps in STRESS.values()}
                if self.reference and (theirs := Sweep(self.setting, self.reference).best(results)):
                    exponents |= {theirs[1] + steps for steps in (0, *STRESS.values())}
            for chosen in sorted(exponents):
                runs += self._runs(variant, chosen, whole=True)
        return [run for run in runs if results.get(run) is None]
