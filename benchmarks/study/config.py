"""What the study consists of: the arms, and the experiments of its quick and its full form."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.common.planted import TASKS
from torchrec_freq.config import FrequencyConfig

STREAM, AFTER = "predict-then-train", "after the stream"


@dataclass(frozen=True)
class Arm:
    """An optimizer of the embedding tables.

    Attributes:
        optimizer: key of `train.ARMS`.
        options: its keyword arguments besides lr.
        start: grid point at which the search for lr begins, see `sweep.lr_at`.
    """

    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    start: int = -4

    @functools.cached_property
    def label(self) -> str:
        texts = {name: str(value).removesuffix(".0") for name, value in self.options.items()}
        options = ", ".join(f"{name}={text}" for name, text in texts.items())
        return self.optimizer + f" ({options})" * bool(options)


@dataclass(frozen=True)
class Run:
    """One training run; its result is one line of the results file."""

    data: str
    model: str
    arm: Arm
    lr: float
    batch_size: int
    epochs: int
    seed: int

    def key(self) -> dict[str, Any]:
        """What identifies the run, as JSON."""
        return vars(self) | {"arm": self.arm.label}


@dataclass(frozen=True)
class Experiment:
    """Arms compared on one data set and model at one batch size, each at its own best lr.

    Attributes:
        seeds: of the initial weights and of the order of data that are shuffled; the same for all
            arms, so that their figures are paired.
        stressed: whether each is also tried at 3 and 10 times its best lr, and FrequencySGD at
            the best lr of row-wise Adagrad.
    """

    data: str
    model: str
    batch_size: int
    arms: tuple[Arm, ...]
    epochs: int = 3
    seeds: int = 3
    stressed: bool = False

    @property
    def setting(self) -> str:
        return f"{self.model}, {self.data}, batch {self.batch_size}"

    @property
    def measures(self) -> tuple[str, ...]:
        """What its arms are compared by; the first one's best lr is what stress starts from."""
        if in_time(self.data):
            return (STREAM, AFTER)
        return tuple(f"epoch {number}" for number in range(1, self.epochs + 1))


def in_time(data: str) -> bool:
    """Whether samples are in the order of time: one pass, predicted before they are trained on."""
    return TASKS[data].drifts if data in TASKS else "-time" in data


def weighted(own_weight: float, **options: Any) -> Arm:
    return Arm("FrequencySGD", {"own_weight": own_weight, **options})


OWN_WEIGHTS = (1, 2, 3, 5, 10)
HALF_LIVES = (50, 200)
OWN_WEIGHT = FrequencyConfig().own_weight
FREQUENCY = weighted(OWN_WEIGHT)
ROWWISE = Arm("RowWiseAdagrad", start=-5)
CLIPPED = Arm("ClippedRowWiseAdagrad", {"own_weight": 5})  # with 1 it is row-wise Adagrad
ADAGRAD = Arm("Adagrad", start=-5)
SGD = Arm("SGD", start=4)
VARIANTS = (
    weighted(OWN_WEIGHT, count="frozen"),
    weighted(OWN_WEIGHT, count="batches"),
    Arm("FrequencySGD", {"normalize": None}, start=6),
    Arm("FrequencySGD", {"normalize": None, "count": "frozen"}, start=6),
)

MAIN = (FREQUENCY, ROWWISE)
ON_CUDA = (Arm("Adam", start=-10),) if torch.cuda.is_available() else ()  # FBGEMM's is nowhere else
CANDIDATES = tuple(map(weighted, OWN_WEIGHTS))
SPREAD = tuple(map(weighted, (1, 5, 10, 30)))
AGEING = tuple(weighted(OWN_WEIGHT, half_life=steps) for steps in HALF_LIVES)

_FM_TIME, _DLRM_TIME, *_IDS = _STREAMS = [
    Experiment(f"ml-100k-time{features}", model, 256, MAIN, epochs=1, seeds=5)
    for features in ("", "-ids")
    for model in ("FM", "DLRM")
]
_FM, _FM_1024, _FM_4096 = (Experiment("ml-100k", "FM", size, MAIN) for size in (256, 1024, 4096))
_DLRM, _DEEP_FM = (Experiment("ml-100k", model, 256, MAIN) for model in ("DLRM", "DeepFM"))
_CLICKS_25 = Experiment("clicks-25", "DLRM", 256, MAIN)
_CLICKS_4 = Experiment("clicks-4", "DLRM", 1024, MAIN)
_LARGE = Experiment("clicks-3-large", "DLRM", 4096, MAIN, epochs=2)
_DRIFTS = [
    Experiment(f"{what}-drift", "DLRM", 512, MAIN, epochs=1) for what in ("popularity", "full")
]
_WHERE_PRESENT = (
    Experiment("ml-1m-time", "FM", 1024, MAIN, epochs=1),
    Experiment("ml-1m-time", "DLRM", 1024, MAIN, epochs=1),
    Experiment("ml-1m", "FM", 1024, MAIN),
    Experiment("criteo", "DLRM", 4096, MAIN, epochs=1),
)
# These settle own_weight, by the rule in `verdict`; all else judges. What fails where an FM has
# users and items alone, which is quick to train, is not tried on the others.
_CHOOSING = (
    *_STREAMS,
    *(replace(stream, batch_size=1024) for stream in _STREAMS),
    *(_FM, _FM_1024, _FM_4096),
)


def _with(arms: tuple[Arm, ...], *experiments: Experiment) -> list[Experiment]:
    return [replace(experiment, arms=arms, stressed=True) for experiment in experiments]


# These are in the README's picture.
QUICK = (*_STREAMS, _FM, _FM_4096, _CLICKS_25, _CLICKS_4, *_DRIFTS)
FULL = (
    *QUICK,
    *_with(MAIN, *QUICK, *_CHOOSING, _DLRM, _DEEP_FM),
    *(replace(e, arms=CANDIDATES) for e in _CHOOSING if e.model == "FM" and "-ids" in e.data),
    *(replace(drift, arms=AGEING) for drift in _DRIFTS),
    *_with(SPREAD, _DRIFTS[1], _CLICKS_4),
    *_with((CLIPPED,), _DRIFTS[1], _CLICKS_4, _FM),
    *_with((ADAGRAD, SGD, *ON_CUDA), _FM),
    *_with(VARIANTS, _FM),
    *(replace(e, arms=(weighted(5), *AGEING)) for e in (_FM, _FM_TIME)),
    *_with((*MAIN, weighted(5)), _LARGE, *_WHERE_PRESENT),
)
EXPERIMENTS = {"quick": QUICK, "full": FULL}
