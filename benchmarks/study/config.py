"""What the study consists of: tasks, arms, the settings of its forms, and the rules of its choices.

The rules and targets were written before the runs that they judge.

`prior_count`: of 3, 5, 10, 20 and 30 those pass that are nowhere more than 0.003 AUC behind
row-wise Adagrad on the choosing settings. 10 stays unless one that passes has a mean difference
there that is more than 0.001 higher. `admit` 2 or 3 becomes the default if it gains at least 0.0005
over 1 in the mean of the choosing settings, and loses more than 0.001 in none; the same rule says
whether a `half_life` is recommended. MovieLens and the flights choose; the retailer's baskets and
the planted clicks, which share no data with them, judge.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

STREAM, AFTER = "predict-then-train", "after the stream"
FIRST_EPOCH, SECOND_EPOCH = "epoch 1", "epoch 2"


@dataclass(frozen=True)
class Variant:
    """An optimizer of the tables and its options besides lr; see `tables.Tables`."""

    optimizer: str
    options: tuple[tuple[str, Any], ...] = ()

    @functools.cached_property
    def label(self) -> str:
        texts = [f"{name}={value}" for name, value in self.options]
        return self.optimizer + f" ({', '.join(texts)})" * bool(texts)


@dataclass(frozen=True)
class Arm:
    """What is compared: a variant, or several, of which the search takes the best.

    Attributes:
        start: grid point at which the search for lr begins, see `search.lr_at`.
        stressed: whether it is also tried at a third of, and at 3 and 10 times, the best lr.
    """

    label: str
    variants: tuple[Variant, ...]
    start: int = -5
    stressed: bool = False


def arm(label: str, optimizer: str, start: int = -5, stressed: bool = False, **grid: Any) -> Arm:
    """An arm with a variant for each value of the one option in ``grid``, or without options."""
    variants = tuple(
        Variant(optimizer, ((name, value),)) for name, values in grid.items() for value in values
    )
    return Arm(label, variants or (Variant(optimizer),), start, stressed)


EPS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)  # and FBGEMM's own, 1e-8
PRIOR_COUNTS, ADMITS, HALF_LIVES = (3, 5, 10, 20, 30), (1, 2, 3), (50, 200)
CONSTANTS = (3, 10, 30)
DECAYS = (1e-6, 1e-5, 1e-4)

OURS = arm("FrequencySGD", "FrequencySGD", stressed=True)
ROWWISE = arm("row-wise Adagrad", "RowWiseAdagrad", stressed=True)
_TUNED = arm("", "RowWiseAdagrad", eps=EPS).variants
TUNED = Arm("row-wise Adagrad, eps tuned", (*ROWWISE.variants, *_TUNED))
CONSTANT = arm("row-wise Adagrad + a constant", "ConstantStart", constant=CONSTANTS)
FREQUENCY = arm("frequency alone", "FrequencySGD", prior_count=[math.inf])
BASELINES = (
    arm("Adagrad", "Adagrad"),
    arm("SGD", "SGD", start=4),
    arm("Adam", "Adam", start=-10),
    arm("FBGEMM COUNTER_SGD", "CounterSGD", start=0),
    arm("FBGEMM AdagradW", "AdagradW", weight_decay=DECAYS),
    arm("FBGEMM counter-based decay", "CounterDecay", weight_decay=DECAYS),
)
PRIORS = {n: arm(f"prior_count={n}", OURS.label, prior_count=[n]) for n in PRIOR_COUNTS if n != 10}
ADMISSIONS = {n: arm(f"admit={n}", OURS.label, admit=[n]) for n in ADMITS if n != 1}
HALVINGS = {n: arm(f"half_life={n}", OURS.label, half_life=[n]) for n in HALF_LIVES}
OPTIONS = (*PRIORS.values(), *ADMISSIONS.values(), *HALVINGS.values())

MAIN = (OURS, ROWWISE, TUNED)
ABLATIONS = (CONSTANT, FREQUENCY)


@dataclass(frozen=True)
class Task:
    """A data set and a label.

    Attributes:
        about: for RESULTS.md.
        samples: of the stream; None: all but the last fifth.
        shuffled: random splits and two epochs; else one pass in the order of time.
    """

    name: str
    about: str
    samples: int | None = None
    shuffled: bool = False


_RETAIL = "a retailer's receipts, a sample a line"
_RATINGS = "MovieLens-100K, a rating of 4 or 5"
TASKS = {
    task.name: task
    for task in (
        Task("coupons", f"{_RETAIL}: a coupon was used, 1.5 %", 200_000),
        Task("discounts", f"{_RETAIL}: a discount was given, 50 %", 200_000),
        Task("flights", "flights from New York: 15 minutes late or more, 24 %"),
        Task("ratings in time", f"{_RATINGS}, in the order of time"),
        Task("ratings shuffled", f"{_RATINGS}, random splits, two epochs", shuffled=True),
        Task("planted clicks", "synthetic clicks, 4 %, of planted embeddings", 120_000),
    )
}


@dataclass(frozen=True)
class Setting:
    """Arms side by side on a task, with a model and a batch size.

    Attributes:
        samples: of the stream, where it is not the task's number.
        seeds: of the initial weights and of random orders, the same for all arms. The first one
            chooses options and lr.
        stressed: whether stressed arms are tried at other lr than the best.
    """

    task: str
    model: str
    batch_size: int
    arms: tuple[Arm, ...] = MAIN
    samples: int | None = None
    seeds: int = 3
    shuffled: bool = False
    stressed: bool = True

    @functools.cached_property
    def name(self) -> str:
        size = f", {self.samples:,} samples" if self.samples else ""
        return f"{self.task}, {self.model}, batch {self.batch_size}{size}"

    @property
    def measures(self) -> tuple[str, str]:
        return (FIRST_EPOCH, SECOND_EPOCH) if self.shuffled else (STREAM, AFTER)


_SETTINGS = """\
coupons, DLRM, 1024
coupons, FM, 1024
coupons, DLRM, 256
coupons, FM, 256
coupons, DLRM, 8192, 400000
discounts, DLRM, 1024
discounts, DLRM, 4096, 1200000
flights, DLRM, 1024
flights, FM, 1024
ratings in time, FM, 256
ratings in time, DLRM, 256
ratings shuffled, FM, 256
ratings shuffled, FM, 4096
ratings shuffled, DLRM, 256
planted clicks, DLRM, 512
"""
_QUICK = (0, 1, 5, 7, 9, 10, 11, 14)
_WITH_BASELINES = (0, 7, 11)


def _setting(number: int, line: str) -> Setting:
    task, model, size, *samples = line.split(", ")
    arms = list(MAIN if samples else (*MAIN, *ABLATIONS))
    arms += OPTIONS * (number in _QUICK) + BASELINES * (number in _WITH_BASELINES)
    first = int(samples[0]) if samples else None
    shuffled = TASKS[task].shuffled
    return Setting(
        task, model, int(size), tuple(arms), first, shuffled=shuffled, stressed=not samples
    )


FULL = tuple(_setting(number, line) for number, line in enumerate(_SETTINGS.splitlines()))
QUICK = tuple(replace(FULL[number], arms=MAIN, stressed=False) for number in _QUICK)
FORMS = {"quick": QUICK, "full": FULL}
CHOOSING = tuple(
    s.name for s in QUICK if s.task in ("flights", "ratings in time", "ratings shuffled")
)
JUDGING = tuple(s.name for s in QUICK if s.name not in CHOOSING)
