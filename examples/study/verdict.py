"""The rules that settle the defaults, and the targets. They were written before the runs.

own_weight. The largest of 1, 2, 3, 5, 10 whose AUC is nowhere more than 0.001 below that of 1, on
the mean of the seeds: in predict-then-train on MovieLens-100K in the order of time (FM and DLRM,
batch 256 and 1024, all features and users and items alone), and after the first epoch of the
shuffled FM (batch 256, 1024, 4096). No other task has a say: what is measured on planted clicks, on
drifts, after the stream, in later epochs and with the other models judges the choice.

half_life. A number of steps that gains at least two standard errors in predict-then-train on both
drifts, and costs at most 0.0005 on the mean of the seeds where nothing drifts: after each epoch of
the shuffled FM and of DLRM on clicks-25, and in predict-then-train of FM and DLRM on MovieLens-100K
in the order of time (all at batch 256). Of several the one with the largest mean gain on the drifts;
of none, None stays the default.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from examples.study.compare import Arms, Difference, at_their_lr, at_times, gain
from examples.study.config import (
    AFTER,
    CHOOSING,
    FREQUENCY,
    HALF_LIVES,
    OWN_WEIGHTS,
    ROWWISE,
    STREAM,
    in_time,
    weighted,
)
from examples.study.sweep import STRESS

OWN_WEIGHT_MAY_COST = 0.001
HALF_LIFE_MAY_COST = 0.0005
HALF_LIFE_GAINS = 2  # standard errors
DRIFTS = ("DLRM, popularity-drift, batch 512", "DLRM, full-drift, batch 512")
STEADY = (
    "FM, ml-100k, batch 256",
    "DLRM, clicks-25, batch 256",
    "FM, ml-100k-time, batch 256",
    "DLRM, ml-100k-time, batch 256",
)

Settings = Mapping[str, Arms]
Case = tuple[str, str, Difference]
"""Setting, measure, and a difference there."""


def own_weight_cases(settings: Settings, own_weight: float) -> list[Case]:
    """What a candidate gains over own_weight 1 wherever it has to prove itself."""
    label, one = weighted(own_weight).label, weighted(1).label
    return [
        (e.setting, e.measures[0], gain(settings[e.setting], e.measures[0], label, one))
        for e in CHOOSING
        if {label, one} <= settings.get(e.setting, {}).keys()
    ]


def settle_own_weight(settings: Settings) -> float | None:
    """The rule's choice; None while a task that chooses is not complete."""
    chosen = None
    for own_weight in OWN_WEIGHTS:
        cases = own_weight_cases(settings, own_weight)
        if len(cases) < len(CHOOSING):
            return None
        if min(case[2].mean for case in cases) >= -OWN_WEIGHT_MAY_COST:
            chosen = own_weight
    return chosen


def half_life_cases(settings: Settings, names: tuple[str, ...], half_life: int) -> list[Case]:
    """What a half-life gains over none; of a stream's measures the first counts."""
    label = weighted(FREQUENCY.options["own_weight"], half_life=half_life).label
    return [
        (name, measure, gain(arms, measure, label, FREQUENCY.label))
        for name in names
        for arms in [settings.get(name, {})]
        if {label, FREQUENCY.label} <= arms.keys()
        for measure in arms[label].best
        if measure != AFTER
    ]


def settle_half_life(settings: Settings) -> tuple[bool, int | None]:
    """(Whether all tasks of the rule are complete, the rule's choice)."""
    gains: dict[int, float] = {}
    for steps in HALF_LIVES:
        drifting = half_life_cases(settings, DRIFTS, steps)
        steady = half_life_cases(settings, STEADY, steps)
        if {case[0] for case in drifting + steady} < {*DRIFTS, *STEADY}:
            return False, None
        helps = all(d.mean >= HALF_LIFE_GAINS * d.error for _, _, d in drifting)
        if helps and min(d.mean for _, _, d in steady) >= -HALF_LIFE_MAY_COST:
            gains[steps] = sum(d.mean for _, _, d in drifting)
    return True, max(gains, key=gains.__getitem__) if gains else None


@dataclass(frozen=True)
class Target:
    """FrequencySGD less row-wise Adagrad must be at least `least` in each of the cases.

    Attributes:
        data: of the settings that it is about.
        difference: None where it was not run.
    """

    text: str
    least: float
    data: Callable[[str], bool]
    measures: tuple[str, ...]
    difference: Callable[[Arms, str], Difference | None] = gain

    def cases(self, settings: Settings) -> list[Case]:
        return [
            (name, measure, difference)
            for name, arms in settings.items()
            if FREQUENCY.label in arms and self.data(arms[ROWWISE.label].experiment.data)
            for measure in self.measures
            if measure in arms[ROWWISE.label].best
            for difference in [self.difference(arms, measure)]
            if difference is not None
        ]


def _shuffled(data: str) -> bool:
    return not in_time(data)


def _any(data: str) -> bool:
    return True


TARGETS = (
    Target("first epoch, shuffled: at most 0.001 behind", -0.001, _shuffled, ("epoch 1",)),
    Target(
        "first epoch, shuffled, at row-wise Adagrad's best lr: at most 0.0015 behind",
        -0.0015,
        _shuffled,
        ("epoch 1",),
        at_their_lr,
    ),
    Target("MovieLens in the order of time: ahead", 0, lambda d: "-time" in d, (STREAM, AFTER)),
    Target("third epoch: ahead", 0, _any, ("epoch 3",)),
    Target("25 % clicks, first epoch: ahead by 0.003", 0.003, "clicks-25".__eq__, ("epoch 1",)),
    Target("25 % clicks, second epoch: ahead by 0.01", 0.01, "clicks-25".__eq__, ("epoch 2",)),
    Target("4 % clicks, first epoch: ahead by 0.006", 0.006, "clicks-4".__eq__, ("epoch 1",)),
    Target("4 % clicks, second epoch: ahead by 0.02", 0.02, "clicks-4".__eq__, ("epoch 2",)),
    Target("drifts: ahead by 0.01", 0.01, lambda d: "-drift" in d, (STREAM, AFTER)),
    Target(
        "at 3 times the best lr of each: at most 0.001 behind",
        -0.001,
        _any,
        ("epoch 1", STREAM),
        lambda arms, measure: at_times(arms, measure, STRESS[0]),
    ),
)
