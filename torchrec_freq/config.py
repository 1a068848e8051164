"""The settings of the update rule: one frozen record, and the only place that checks them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, MutableMapping
from typing import Any, Final, Literal, cast

CountMode = Literal["samples", "batches", "frozen"]
Normalize = Literal["table"]

COUNT_MODES: Final = ("samples", "batches", "frozen")
DEFAULT_OWN_WEIGHT: Final = 1.0
DEFAULT_EPS: Final = 1e-8
_LEAST_EPS: Final = 1e-30
"""The least that float32 keeps apart from 0 when FBGEMM divides by it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyConfig:
    """Settings of the update rule of :mod:`torchrec_freq.rule`.

    Args:
        count: what adds to a row's counter in a step. ``"samples"``: every occurrence of its id in
            the global batch adds 1 (an id twice in one bag adds 2). ``"batches"``: a row that
            occurs at all adds 1. ``"frozen"``: nothing; the counts are loaded.
        half_life: steps after which the counts of a table and the sums that go with them are
            halved, for data that drift. None: never.
        own_weight: weight of the row's own squared gradient of the step beside what the past
            predicts, greater than 0. No row moves further in a step than
            ``lr * sqrt(2 / own_weight)`` (root mean square over its columns). Of
            ``normalize="table"`` alone.
        normalize: ``"table"`` finds the size of the rate from the table's gradients, as row-wise
            Adagrad does; None is the paper's rule, ``lr / sqrt(max(count, min_count))``.
        min_count: lower bound of the count in the paper's rule, at least 1; of
            ``normalize=None`` alone.
        eps: added to the root that lr is divided by, at least 1e-30.

    Raises:
        ValueError: a value outside its domain, or one that the rule would ignore; the message names
            it and what to give instead.
    """

    count: CountMode = "samples"
    half_life: int | None = None
    own_weight: float = DEFAULT_OWN_WEIGHT
    normalize: Normalize | None = "table"
    min_count: float = 1
    eps: float = DEFAULT_EPS

    def __post_init__(self) -> None:
        if self.count not in COUNT_MODES:
            raise ValueError(
                f"Invalid count value: {self.count!r}. Must be one of {', '.join(COUNT_MODES)}."
            )
        require_number("min_count", self.min_count, minimum=1)
        require_number("eps", self.eps, minimum=_LEAST_EPS)
        require_number("own_weight", self.own_weight, minimum=0)
        if self.own_weight == 0:
            raise ValueError("Invalid own_weight value: 0. Must be > 0.")
        if self.half_life is not None:
            if isinstance(self.half_life, bool) or not isinstance(self.half_life, int):
                raise ValueError(
                    f"Invalid half_life value: {self.half_life!r}. "
                    "Must be a whole number of steps, or None for no ageing."
                )
            if self.half_life < 1:
                raise ValueError(
                    f"Invalid half_life value: {self.half_life}. "
                    "Must be at least 1 step, or None for no ageing."
                )
            if self.count == "frozen":
                raise ValueError(
                    f"Invalid half_life value: {self.half_life}. "
                    "Frozen counts do not age: use half_life=None, or count='samples'."
                )
        if self.normalize not in ("table", None):
            raise ValueError(
                f"Invalid normalize value: {self.normalize!r}. Must be 'table' or None."
            )
        if self.normalize == "table" and self.min_count != 1:
            raise ValueError(
                f"Invalid min_count value: {self.min_count}. It belongs to the paper's rule: "
                "use it with normalize=None, or leave it out."
            )
        if self.normalize is None and self.own_weight != DEFAULT_OWN_WEIGHT:
            raise ValueError(
                f"Invalid own_weight value: {self.own_weight}. The paper's rule (normalize=None) "
                "has none: use it with normalize='table', or leave it out."
            )


FIELDS: Final = tuple(field.name for field in dataclasses.fields(FrequencyConfig))


def refuse_coherence(coherence: object) -> None:
    """Says what became of an option that version 0.1 had.

    Raises:
        ValueError: it is given.
    """
    if coherence is not None:
        raise ValueError(
            f"coherence={coherence!r}: FrequencySGD has had no coherence since version 0.2, in "
            "which the row's own squared gradient takes its place (own_weight). Leave it out."
        )


def check_learning_rate(lr: object) -> float:
    """``lr`` as a float.

    Raises:
        ValueError: not a finite number, or below 0.
    """
    require_number("lr", lr, minimum=0)
    return float(cast(float, lr))


def config_of(options: Mapping[str, Any]) -> FrequencyConfig:
    """The config in a parameter group, which holds other entries too."""
    refuse_coherence(options.get("coherence"))
    return FrequencyConfig(**{name: options[name] for name in FIELDS})


def pop_config(params: MutableMapping[str, Any], base: FrequencyConfig) -> FrequencyConfig:
    """``base`` with the fields found in ``params``, which are taken out of it."""
    refuse_coherence(params.pop("coherence", None))
    return dataclasses.replace(base, **{k: params.pop(k) for k in FIELDS if k in params})


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
