"""The targets, and the rules that settle the defaults; both were written before the runs."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from benchmarks.study.compare import Difference, Known, samples_to_target
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
    """A difference that must be at least, or a share that must be at most, so much."""

    text: str
    met: bool
    worst: str
    where: str


def cases(
    known: Known,
    tasks: str | Sequence[str] = "",
    measures: Iterable[str] = (),
    ours: Arm = OURS,
    theirs: Arm = ROWWISE,
) -> list[Case]:
    """What an arm gains in the settings whose names begin so.

    Args:
        measures: none: both of a setting.
    """
    found = []
    for setting in known.settings:
        for measure in measures or setting.measures:
            if setting.name.startswith(tasks if isinstance(tasks, str) else tuple(tasks)):
                gain = known.gain(setting, measure, ours, theirs)
                if gain is not None and measure in setting.measures:
                    found.append(Case(f"{setting.name}: {measure}", gain))
    return found


def cases_at(known: Known, steps: int, *, same: bool) -> list[Case]:
    """What is gained in each setting's first measure at another lr, see `Known.gain_at`."""
    found = []
    for setting in known.settings:
        gain = known.gain_at(setting, setting.measures[0], steps, same=same)
        if gain is not None:
            found.append(Case(f"{setting.name}: {setting.measures[0]}", gain))
    return found


def targets(known: Known) -> list[Target]:
    """Each target of which there is a case, with the worst one."""
    beside_tuned = cases(known, theirs=TUNED)
    at_theirs = [case for steps in (-2, 0, 2, 4) for case in cases_at(known, steps, same=True)]
    beyond = [case for steps in (2, 4) for case in cases_at(known, steps, same=True)]
    wanted = (
        (
            "coupons, DLRM, batch 256 and 1024: ahead by 0.007",
            0.007,
            cases(known, ("coupons, DLRM, batch 256", "coupons, DLRM, batch 1024")),
        ),
        ("coupons, FM: ahead by 0.009", 0.009, cases(known, "coupons, FM")),
        ("coupons, batch 8192: ahead by 0.003", 0.003, cases(known, "coupons, DLRM, batch 8192")),
        ("discounts: ahead by 0.0015", 0.0015, cases(known, "discounts")),
        ("flights: ahead by 0.002", 0.002, cases(known, "flights")),
        ("ratings shuffled: at most 0.0005 behind", -0.0005, cases(known, "ratings shuffled")),
        (
            "ratings shuffled, second epoch: ahead",
            0.0,
            cases(known, "ratings shuffled", [SECOND_EPOCH]),
        ),
        (
            "ratings in time, predict-then-train: not behind",
            0.0,
            cases(known, "ratings in time", [STREAM]),
        ),
        (
            "ratings in time, after: at most 0.003 behind",
            -0.003,
            cases(known, "ratings in time", [AFTER]),
        ),
        ("planted clicks: ahead by 0.008", 0.008, cases(known, "planted")),
        ("everywhere: at most 0.003 behind", -0.003, cases(known)),
        ("the same at row-wise Adagrad's best lr", -0.003, cases_at(known, 0, same=True)),
        ("at a third of, 1, 3 and 10 times that lr: at most 0.001 behind", -0.001, at_theirs),
        ("at 3 and 10 times that lr: ahead", 0.0, beyond),
        ("beside row-wise Adagrad with eps tuned: at most 0.003 behind", -0.003, beside_tuned),
    )
    found = []
    for text, least, those in wanted:
        if those:
            worst = min(those, key=lambda case: case.found.mean)
            found.append(Target(text, worst.found.mean >= least, str(worst.found), worst.where))
    if beside_tuned:
        mean = statistics.fmean(case.found.mean for case in beside_tuned)
        text = "beside row-wise Adagrad with eps tuned: mean difference at least 0"
        found.append(Target(text, mean >= 0, f"{mean:+.4f}", "mean of all"))
    shares = coupon_shares(known)
    if shares:
        where, share = max(shares.items(), key=lambda item: item[1])
        text = "coupons, samples to row-wise Adagrad's last AUC: at most 88 %"
        found.append(Target(text, share <= 0.88, f"{share:.0%}", where))
    return found


def coupon_shares(known: Known) -> dict[str, float]:
    """Share of the samples in each setting of the coupons; more than 1 where never."""
    found = {}
    for setting in known.settings:
        if setting.task == "coupons" and (ours := known.runs(setting, OURS)):
            share = samples_to_target(ours, known.runs(setting, ROWWISE))
            found[setting.name] = float("inf") if share is None else share
    return found


def over(known: Known, arm: Arm, tasks: Sequence[str], base: Arm) -> list[Difference]:
    return [case.found for case in cases(known, tasks, ours=arm, theirs=base)]


def complete(known: Known, arms: Iterable[Arm]) -> bool:
    """Whether the rules can speak: the arms have been judged on all choosing settings."""
    settings = [known.all.get(name) for name in CHOOSING]
    return all(s is not None and known.runs(s, arm) for s in settings for arm in arms)


def settle_prior_count(known: Known) -> int | None:
    """The rule's choice; None while not all candidates have been judged."""
    arms = {10: OURS, **PRIORS}
    if not complete(known, (ROWWISE, *arms.values())):
        return None
    gains = {n: [d.mean for d in over(known, arm, CHOOSING, ROWWISE)] for n, arm in arms.items()}
    means = {n: statistics.fmean(found) for n, found in gains.items()}
    passed = [n for n, found in gains.items() if min(found) >= -PRIOR_BEHIND]
    better = [n for n in passed if means[n] > means[10] + PRIOR_AHEAD]
    return max(better, key=means.__getitem__) if better else 10


def settle_options(known: Known, candidates: dict[int, Arm]) -> list[int] | None:
    """The values that the rule allows; None while not all have been judged."""
    if not complete(known, (OURS, *candidates.values())):
        return None
    found = {n: [d.mean for d in over(known, arm, CHOOSING, OURS)] for n, arm in candidates.items()}
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
