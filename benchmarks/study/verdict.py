"""The targets, and the rules that settle the defaults; both were written before the runs."""

import math
import statistics
from collections.abc import Iterable
from typing import Final, NamedTuple

from benchmarks.study.compare import Difference, Known
from benchmarks.study.config import (
    ADMISSIONS,
    AFTER,
    CHOOSING,
    HALVINGS,
    OURS,
    PRIORS,
    ROWWISE,
    SECOND_EPOCH,
    STREAM,
    TUNED,
    Arm,
)

PRIOR_BEHIND: Final = 0.003  # a prior_count may be so far behind row-wise Adagrad
PRIOR_AHEAD: Final = 0.001  # another than 10 must be ahead of it by more than this
OPTION_GAINS, OPTION_COSTS = 0.0005, 0.001  # what admit and half_life must gain, and may cost


class Case(NamedTuple):
    where: str
    found: Difference


class Target(NamedTuple):
    """What FrequencySGD must be ahead by, at least, in each case.

    Attributes:
        tasks: beginnings of the settings' names.
        measures: none: both of a setting.
        steps: grid steps above row-wise Adagrad's best lr, both arms there; none: each at its best.
    """

    text: str
    least: float
    tasks: tuple[str, ...] = ("",)
    measures: tuple[str, ...] = ()
    theirs: Arm = ROWWISE
    steps: tuple[int, ...] = ()

    def cases(self, known: Known) -> list[Case]:
        if not self.steps:
            return cases(known, self.tasks, self.measures, theirs=self.theirs)
        return [
            Case(f"{setting.name}: {setting.measures[0]}", gain)
            for setting in known.settings
            for steps in self.steps
            if (gain := known.gain_at(setting, setting.measures[0], steps, same=True)) is not None
        ]


_COUPONS = ("coupons, DLRM, batch 256", "coupons, DLRM, batch 1024")
TARGETS = (
    Target("coupons, DLRM, batch 256 and 1024: ahead by 0.007", 0.007, _COUPONS),
    Target("coupons, FM: ahead by 0.009", 0.009, ("coupons, FM",)),
    Target("coupons, batch 8192: ahead by 0.003", 0.003, ("coupons, DLRM, batch 8192",)),
    Target("discounts: ahead by 0.0015", 0.0015, ("discounts",)),
    Target("flights: ahead by 0.002", 0.002, ("flights",)),
    Target("ratings shuffled: at most 0.0005 behind", -0.0005, ("ratings shuffled",)),
    Target("the same, second epoch: ahead", 0.0, ("ratings shuffled",), (SECOND_EPOCH,)),
    Target("ratings in time, in the stream: not behind", 0.0, ("ratings in time",), (STREAM,)),
    Target("the same, after: at most 0.003 behind", -0.003, ("ratings in time",), (AFTER,)),
    Target("planted clicks: ahead by 0.008", 0.008, ("planted",)),
    Target("everywhere: at most 0.003 behind", -0.003),
    Target("the same at row-wise Adagrad's best lr", -0.003, steps=(0,)),
    Target("at 1/3, 1, 3 and 10 times that: at most 0.001 behind", -0.001, steps=(-2, 0, 2, 4)),
    Target("at 3 and 10 times that: ahead", 0.0, steps=(2, 4)),
    Target("beside eps tuned: at most 0.003 behind", -0.003, theirs=TUNED),
)


def cases(
    known: Known,
    tasks: tuple[str, ...],
    measures: tuple[str, ...] = (),
    ours: Arm = OURS,
    theirs: Arm = ROWWISE,
) -> list[Case]:
    """What an arm gains in the settings whose names begin so; see `Target`."""
    return [
        Case(f"{setting.name}: {measure}", gain)
        for setting in known.settings
        if setting.name.startswith(tasks)
        for measure in measures or setting.measures
        if (gain := known.gain(setting, measure, ours, theirs)) is not None
    ]


def targets(known: Known) -> list[tuple[str, str, str, str]]:
    """Of each target of which there is a case: text, where it is missed, the worst case, where."""
    found = []
    for target in TARGETS:
        if those := target.cases(known):
            worst = min(those, key=lambda case: case.found.mean)
            missed = sum(case.found.mean < target.least for case in those)
            found.append((target.text, _met(missed, len(those)), str(worst.found), worst.where))
    if tuned := cases(known, ("",), theirs=TUNED):
        mean = statistics.fmean(case.found.mean for case in tuned)
        text = "beside eps tuned: mean at least 0"
        found.append((text, _met(int(mean < 0), 1), f"{mean:+.4f}", f"mean of {len(tuned)}"))
    shares = {
        setting.name: known.share(setting, OURS)
        for setting in known.settings
        if setting.task == "coupons"
    }
    if shares:
        worst_share, where = max((share or math.inf, name) for name, share in shares.items())
        text = "coupons: at most 88 % of the samples to row-wise Adagrad's last AUC"
        missed = sum((share or math.inf) > 0.88 for share in shares.values())
        found.append((text, _met(missed, len(shares)), f"{worst_share:.0%}", where))
    return found


def _met(missed: int, cases: int) -> str:
    return f"**no**, missed in {missed} of {cases}" if missed else f"yes, in all {cases}"


def over(known: Known, arm: Arm, base: Arm) -> list[float]:
    """What an arm gains over another on the choosing settings."""
    return [case.found.mean for case in cases(known, CHOOSING, ours=arm, theirs=base)]


def complete(known: Known, arms: Iterable[Arm]) -> bool:
    """Whether the rules can speak: the arms have been judged on all choosing settings."""
    settings = [known.all.get(name) for name in CHOOSING]
    return all(s is not None and known.runs(s, arm) for s in settings for arm in arms)


def settle_prior_count(known: Known) -> int | None:
    """The rule's choice; None while not all candidates have been judged."""
    arms = {10: OURS, **PRIORS}
    if not complete(known, (ROWWISE, *arms.values())):
        return None
    gains = {n: over(known, arm, ROWWISE) for n, arm in arms.items()}
    means = {n: statistics.fmean(found) for n, found in gains.items()}
    passed = [n for n, found in gains.items() if min(found) >= -PRIOR_BEHIND]
    better = [n for n in passed if means[n] > means[10] + PRIOR_AHEAD]
    return max(better, key=means.__getitem__) if better else 10


def settle_options(known: Known, candidates: dict[int, Arm]) -> list[int] | None:
    """The values that the rule allows; None while not all have been judged."""
    if not complete(known, (OURS, *candidates.values())):
        return None
    found = {n: over(known, arm, OURS) for n, arm in candidates.items()}
    return [
        n
        for n, gains in found.items()
        if statistics.fmean(gains) >= OPTION_GAINS and min(gains) >= -OPTION_COSTS
    ]


def choices(known: Known) -> list[str]:
    """What the rules choose, in words."""
    prior = settle_prior_count(known)
    lines = [f"- `prior_count`: {prior or 'nothing yet'} (the default is 10)"]
    for name, arms, none in (("admit", ADMISSIONS, "1"), ("half_life", HALVINGS, "None")):
        allowed = settle_options(known, arms)
        text = "nothing yet" if allowed is None else ", ".join(map(str, allowed)) or none
        lines.append(f"- `{name}`: {text} (the default is {none})")
    return lines
