"""The settings of the update rule: one frozen record, and the only place that checks them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, MutableMapping
from typing import Any, Final, Literal, cast

CountMode = Literal["samples", "batches", "frozen"]
Normalize = Literal["table"]

COUNT_MODES: Final = ("samples", "batches", "frozen")
DEFAULT_COHERENCE: Final = 0.03
DEFAULT_MIN_COUNT: Final = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyConfig:
    """Settings of the update rule of :func:`torchrec_freq.rule.row_multiplier`.

    Args:
        count: what adds to a row's counter in a step. ``"samples"``: every occurrence of its id in
            the global batch adds 1 (an id twice in one bag adds 2). ``"batches"``: a row that
            occurs at all adds 1. ``"frozen"``: nothing; the counts are loaded.
        min_count: lower bound of the effective count, at least 1. It bounds the learning rate of
            rows that are seen for the first times at ``lr / (s_t * sqrt(min_count))``.
        half_life: steps after which all counts of a table are halved, for data that drift.
            None: never.
        coherence: share of a row's occurrences in one batch whose gradients agree, at least 0.
            0 gives the paper's rule, ``lr / sqrt(count)``.
        normalize: ``"table"`` divides the rate by the scale of the table's gradients;
            None uses the gradient as it is.

    Raises:
        ValueError: a value outside its domain; the message names it and what to give instead.
    """

    count: CountMode = "samples"
    min_count: float = DEFAULT_MIN_COUNT
    half_life: int | None = None
    coherence: float = DEFAULT_COHERENCE
    normalize: Normalize | None = "table"

    def __post_init__(self) -> None:
        if self.count not in COUNT_MODES:
            raise ValueError(
                f"Invalid count value: {self.count!r}. Must be one of {', '.join(COUNT_MODES)}."
            )
        _require_number("min_count", self.min_count, minimum=1)
        _require_number("coherence", self.coherence, minimum=0)
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


FIELDS: Final = tuple(field.name for field in dataclasses.fields(FrequencyConfig))


def make_config(options: Mapping[str, Any]) -> FrequencyConfig:
    """A config from keyword arguments.

    Raises:
        ValueError: a keyword that the rule does not have, or a wrong value.
    """
    unknown = [name for name in options if name not in FIELDS]
    if unknown:
        raise ValueError(
            f"FrequencySGD has no option {', '.join(map(repr, unknown))}. "
            f"Its options are lr, {', '.join(FIELDS)}."
        )
    return FrequencyConfig(**options)


def check_learning_rate(lr: object) -> float:
    """``lr`` as a float.

    Raises:
        ValueError: not a finite number, or below 0.
    """
    _require_number("lr", lr, minimum=0)
    return float(cast(float, lr))


def pop_config(params: MutableMapping[str, Any], base: FrequencyConfig) -> FrequencyConfig:
    """``base`` with the fields found in ``params``, which are taken out of it."""
    return dataclasses.replace(base, **{k: params.pop(k) for k in FIELDS if k in params})


def _require_number(name: str, value: object, *, minimum: float) -> None:
    # A bool is an int to Python; as a count or a rate it is always a mistake.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"Invalid {name} value: {value!r}. Must be a finite number >= {minimum}.")
    if value < minimum:
        raise ValueError(f"Invalid {name} value: {value}. Must be >= {minimum}.")
