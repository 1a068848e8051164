"""The settings of the update rule: one frozen record, and the only place that checks them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, MutableMapping
from typing import Any, Final, Literal, TypedDict, cast

CountMode = Literal["samples", "frozen"]
Normalize = Literal["table"]

_LEAST_EPS: Final = 1e-30
"""The least that float32 keeps apart from 0 when FBGEMM divides by it."""

_REMOVED: Final = {
    "own_weight": (
        "own_weight is not an option since version 0.3: a row's own squared gradients count in "
        "full. Leave it out; prior_count says for how many occurrences the table's mean square "
        "stands in for them."
    ),
}
"""Options of earlier versions, and what to do instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyConfig:
    """Settings of the update rule of :mod:`torchrec_freq.rule`.

    Args:
        prior_count: how many occurrences the table's mean square is worth beside a row's own sum of
            squares, at least 0. 0 is row-wise Adagrad; infinity goes by the frequency alone. For
            ``normalize="table"`` only.
        half_life: steps after which a table's counts and sums are halved, for data that drift.
            None: never.
        admit: a row moves from this occurrence on, at least 1. Until then it keeps its initial
            value.
        normalize: ``"table"`` finds the size of the rate from the gradients, as row-wise Adagrad
            does; None is the paper's rule, ``lr / sqrt(max(count, min_count))``.
        count: ``"samples"``: every occurrence of an id in the global batch adds 1 to its row's
            counter. ``"frozen"``: the counts are loaded and stay, for ``normalize=None`` only.
        min_count: lower bound of the count in the paper's rule, at least 1; for
            ``normalize=None`` only.
        eps: added to the root that lr is divided by, at least 1e-30.

    Raises:
        ValueError: a value outside its domain, or one that the rule would ignore; the message names
            it and what to give instead.
    """

    prior_count: float = 10
    half_life: int | None = None
    admit: int = 1
    normalize: Normalize | None = "table"
    count: CountMode = "samples"
    min_count: float = 1
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.normalize not in ("table", None):
            raise ValueError(
                f"Invalid normalize value: {self.normalize!r}. Must be 'table' or None."
            )
        if str(self.count) == "batches":
            raise ValueError(
                "Invalid count value: 'batches'. Every occurrence counts since version 0.3: use "
                "'samples'."
            )
        if self.count not in ("samples", "frozen"):
            raise ValueError(f"Invalid count value: {self.count!r}. Must be 'samples' or 'frozen'.")
        if self.prior_count != math.inf:
            require_number("prior_count", self.prior_count, minimum=0)
        require_whole("admit", self.admit, "occurrences")
        if self.half_life is not None:
            require_whole("half_life", self.half_life, "steps, or None for no ageing")
        require_number("min_count", self.min_count, minimum=1)
        require_number("eps", self.eps, minimum=_LEAST_EPS)
        if self.normalize == "table":
            papers = {"count": "samples", "min_count": 1}
            where = "It belongs to the paper's rule: use it with normalize=None, or leave it out."
        else:
            papers = {"prior_count": 10}
            where = "The paper's rule (normalize=None) has none: leave it out."
        for name, default in papers.items():
            if getattr(self, name) != default:
                raise ValueError(f"Invalid {name} value: {getattr(self, name)!r}. {where}")
        if self.count == "frozen" and self.half_life is not None:
            raise ValueError(
                f"Invalid half_life value: {self.half_life}. "
                "Frozen counts do not age: use half_life=None, or count='samples'."
            )


class Options(TypedDict, total=False):
    """The settings as keyword arguments; their defaults are those of :class:`FrequencyConfig`."""

    prior_count: float
    half_life: int | None
    admit: int
    normalize: Normalize | None
    count: CountMode
    min_count: float
    eps: float


FIELDS: Final = tuple(field.name for field in dataclasses.fields(FrequencyConfig))


def make_config(options: Mapping[str, Any]) -> FrequencyConfig:
    """A config from keyword arguments.

    Raises:
        ValueError: a wrong value, or an option that is unknown or was removed.
    """
    for name in options.keys() - set(FIELDS):
        advice = _REMOVED.get(name)
        raise ValueError(
            advice or f"FrequencySGD has no option {name!r}. Its options are {', '.join(FIELDS)}."
        )
    return FrequencyConfig(**options)


def pop_config(params: MutableMapping[str, Any], base: FrequencyConfig) -> FrequencyConfig:
    """``base`` with the fields found in ``params``, which are taken out of it."""
    names = [name for name in params if name in FIELDS or name in _REMOVED]
    given = {name: params.pop(name) for name in names}
    return make_config({**dataclasses.asdict(base), **given})


def check_learning_rate(lr: object) -> float:
    """``lr`` as a float.

    Raises:
        ValueError: not a finite number, or below 0.
    """
    require_number("lr", lr, minimum=0)
    return float(cast(float, lr))


def require_number(name: str, value: object, *, minimum: float) -> None:
    """Refuses what is not a finite number of at least ``minimum``.

    Raises:
        ValueError: names the option and the value.
    """
    # A bool is an int to Python; as a count or a rate it is always a mistake.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"Invalid {name} value: {value!r}. Must be a finite number >= {minimum}.")
    if value < minimum:
        raise ValueError(f"Invalid {name} value: {value}. Must be >= {minimum}.")


def require_whole(name: str, value: object, unit: str) -> None:
    """Refuses what is not a whole number of at least 1.

    Raises:
        ValueError: names the option and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Invalid {name} value: {value!r}. Must be a whole number >= 1 ({unit}).")
