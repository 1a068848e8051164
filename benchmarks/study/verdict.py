"""The rules that settle the defaults, and the targets.

The rule of own_weight and the targets were set before any run. Prototype runs then shaped the tasks
(the streams have no feature of the time of a rating, the factorization machine starts from small
weights), and what fails a rule was not tried on the rest of its tasks. From the rule of half_life
some tasks, and half-lives of 25 and 100 steps, were dropped for time when runs had begun.

own_weight: the largest of 1, 2, 3, 5, 10 whose mean AUC over the seeds is nowhere more than 0.001
below that of 1 in predict-then-train on MovieLens-100K in the order of time (FM and DLRM, batch 256
and 1024, all features, and users and items alone) and after the first epoch of the shuffled FM
(batch 256, 1024, 4096). Nothing else has a say: planted clicks, drifts, samples after the stream,
later epochs and the other shuffled models judge the choice.

half_life: a number of steps that gains at least two standard errors in predict-then-train on both
drifts, and whose mean AUC is nowhere more than 0.0005 below that of none where nothing drifts:
after each epoch of the shuffled FM, and in predict-then-train of the FM on MovieLens-100K in the
order of time, both at batch 256. Of several, the one that gains most on the drifts; if there is
none, no half-life is recommended.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from benchmarks.study.compare import Arms, Difference, Settings, gain
from benchmarks.study.config import FREQUENCY, HALF_LIVES, OWN_WEIGHT, OWN_WEIGHTS, weighted
from benchmarks.study.sweep import STRESS

OWN_WEIGHT_MAY_COST = 0.001
HALF_LIFE_MAY_COST = 0.0005
HALF_LIFE_GAINS = 2  # standard errors
# Expressions that cases are chosen by, each with the number of cases that make it complete.
CHOOSE_OWN_WEIGHT = "ml-100k-time.*predict|^FM, ml-100k, .*epoch 1", 11
DRIFTING = "-drift.*predict", 2
STEADY = "^FM, ml-100k, batch 256|^FM, ml-100k-time, batch 256, predict", 4

Cases = Mapping[str, Difference]
"""Setting and measure -> a difference there."""


def cases(
    settings: Settings, chosen: str, difference: Callable[[Arms, str], Difference | None]
) -> Cases:
    """The differences of all settings and measures that the regular expression finds."""
    found = {
        f"{name}, {measure}": difference(arms, measure)
        for name, arms in settings.items()
        for measure in next(iter(arms.values())).best
        if re.search(chosen, f"{name}, {measure}")
    }
    return {name: value for name, value in found.items() if value is not None}


def own_weight_cases(settings: Settings) -> dict[int, Cases]:
    """What each candidate gains over own_weight 1 where the rule looks."""
    arms = {weight: weighted(weight).label for weight in OWN_WEIGHTS}
    return {
        weight: cases(settings, CHOOSE_OWN_WEIGHT[0], partial(gain, label=arm, over=arms[1]))
        for weight, arm in arms.items()
    }


def settle_own_weight(settings: Settings) -> int | None:
    """The rule's choice; None while a candidate has neither failed nor passed everywhere."""
    passed = {
        weight: len(found)
        for weight, found in own_weight_cases(settings).items()
        if all(case.mean >= -OWN_WEIGHT_MAY_COST for case in found.values())
    }
    return max(passed) if set(passed.values()) == {CHOOSE_OWN_WEIGHT[1]} else None


def half_life_cases(settings: Settings, chosen: str) -> dict[int, Cases]:
    """What each half-life gains over none."""
    arms = {steps: weighted(OWN_WEIGHT, half_life=steps).label for steps in HALF_LIVES}
    return {
        steps: cases(settings, chosen, partial(gain, label=arm, over=FREQUENCY.label))
        for steps, arm in arms.items()
    }


def settle_half_life(settings: Settings) -> str:
    """The rule's choice, in words."""
    gains = {}
    drifting, steady = (half_life_cases(settings, rule[0]) for rule in (DRIFTING, STEADY))
    for steps in HALF_LIVES:
        drifts, others = drifting[steps].values(), steady[steps].values()
        if len(drifts) < DRIFTING[1]:
            return "nothing yet"
        if all(case.mean >= HALF_LIFE_GAINS * case.error for case in drifts):
            if len(others) < STEADY[1]:
                return "nothing yet"
            if min(case.mean for case in others) >= -HALF_LIFE_MAY_COST:
                gains[steps] = sum(case.mean for case in drifts)
    return f"{max(gains, key=lambda steps: gains[steps])} steps" if gains else "none"


@dataclass(frozen=True)
class Target:
    """A difference that must be at least `least` in each case that `chosen` finds."""

    text: str
    least: float
    chosen: str
    difference: Callable[[Arms, str], Difference | None] = gain


_at_their_lr = partial(gain, at_their_lr=True)
_at_3_times = partial(gain, times=STRESS[0])
TARGETS = (
    Target("first epoch: at most 0.001 behind", -0.001, "epoch 1"),
    Target("the same at row-wise Adagrad's lr: 0.0015", -0.0015, "epoch 1", _at_their_lr),
    Target("MovieLens in the order of time: ahead", 0, "-time"),
    Target("third epoch: ahead", 0, "epoch 3"),
    Target("25 % clicks, first epoch: ahead by 0.003", 0.003, "clicks-25.*epoch 1"),
    Target("25 % clicks, second epoch: ahead by 0.01", 0.01, "clicks-25.*epoch 2"),
    Target("4 % clicks, first epoch: ahead by 0.006", 0.006, "clicks-4.*epoch 1"),
    Target("4 % clicks, second epoch: ahead by 0.02", 0.02, "clicks-4.*epoch 2"),
    Target("drifts: ahead by 0.01", 0.01, "-drift"),
    Target("at 3 times lr: at most 0.001 behind", -0.001, "epoch 1|predict", _at_3_times),
)
