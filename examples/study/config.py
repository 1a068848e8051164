"""What the study consists of: the arms, and the experiments of its quick and its full form."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Arm:
    """An optimizer of the embedding tables.

    Attributes:
        optimizer: key of `train.OPTIMIZERS`.
        options: its keyword arguments besides lr.
        warmup: whether lr rises from zero over the first tenth of an epoch.
        start: grid point at which the search for lr begins, see `sweep.lr_at`.
    """

    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    warmup: bool = False
    start: int = -2

    @property
    def label(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return self.optimizer + f" ({options})" * bool(options) + " + warm-up" * self.warmup


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
        return asdict(self) | {"arm": self.arm.label}


@dataclass(frozen=True)
class Experiment:
    """Arms compared on one data set and model, each at every batch size, lr by validation.

    Attributes:
        seeds: runs at each lr: of the initial weights and the order of the data.
    """

    data: str
    model: str
    arms: tuple[Arm, ...]
    batch_sizes: tuple[int, ...] = (256,)
    epochs: int = 3
    seeds: int = 3

    @property
    def name(self) -> str:
        return f"{self.model} on {self.data}"


RAW: Mapping[str, Any] = {"coherence": 0, "min_count": 1, "normalize": None}
FREQUENCY = Arm("FrequencySGD")
PAPER = Arm("FrequencySGD", RAW, start=3)
FROZEN = Arm("FrequencySGD", {"count": "frozen", **RAW}, start=3)
BATCHES = Arm("FrequencySGD", {"count": "batches", **RAW}, start=1)
SGD = Arm("SGD", start=0)
WARM_SGD = Arm("SGD", warmup=True, start=0)
ADAGRAD = Arm("Adagrad", start=-3)
ROWWISE = Arm("RowWiseAdagrad", start=-3)
ADAM = Arm("Adam", start=-5)


MAIN = (FREQUENCY, ROWWISE, ADAGRAD, SGD)
# FBGEMM has Adam on CUDA only.
_ALL = (*MAIN, WARM_SGD, PAPER, FROZEN, BATCHES, *((ADAM,) if torch.cuda.is_available() else ()))
_RULES = tuple(
    Arm("FrequencySGD", option)
    for option in ({"min_count": 1}, {"coherence": 0}, {"coherence": 0.2})
)
_DRIFT = (FREQUENCY, Arm("FrequencySGD", {"half_life": 50}), ROWWISE)

QUICK = (
    Experiment("ml-100k", "FM", MAIN, (256, 1024, 4096)),
    Experiment("zipf", "DLRM", MAIN, epochs=2),
)
FULL = (
    *QUICK,
    Experiment("ml-100k", "FM", _ALL),
    Experiment("popularity-drift", "DLRM", _DRIFT, (512,), epochs=1),
    Experiment("full-drift", "DLRM", _DRIFT, (512,), epochs=1),
    Experiment("ml-100k", "FM", _RULES, (256, 4096)),
    Experiment("zipf-rare-clicks", "DLRM", MAIN, (1024,), epochs=1),
    Experiment("ml-100k", "DLRM", MAIN),
    Experiment("ml-100k", "DeepFM", MAIN),
    Experiment("zipf", "DLRM", _RULES, epochs=2),
    Experiment("ml-1m", "FM", MAIN, (1024,)),
    Experiment("criteo", "DLRM", MAIN, (4096,), epochs=1),
)
EXPERIMENTS = {"quick": QUICK, "full": FULL}
