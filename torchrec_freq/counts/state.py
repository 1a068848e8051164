"""The state of a table in plan-independent form: what a count can be, keys, names, its check."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

COUNT_CEILING: Final = 2**30
"""Largest count, at which a counter stays. The rest of int32 is headroom for one batch."""

ROW_COUNTER: Final = "row_counter"
"""int32 [rows] of the whole table, under every sharding plan."""

MOMENTUM: Final = "momentum1"
"""float32: row-wise Adagrad's sums of squares, in the form that TorchRec gives them. Column shards
have sums of their own, which lie one behind the other."""

TABLE_TOTALS: Final = "table_totals"
"""float64 [4]: ``STATE_FORMAT``, the sum of squares, the sum of occurrences, and the steps that the
sums stand for."""

ROW_COUNTER_AGE: Final = "row_counter_age"
"""int64 [1]: steps since counts and sums were last halved."""

STATE_FORMAT: Final = 3
OLD_FORMAT: Final = 2
"""That of version 0.2: no ``momentum1``; a row's sum is its share of the table's, by its count."""
TOTALS: Final = 4

# Of a sharded collection: what the user called the optimizer, the collection's path, the table.
_SHARDED: Final = re.compile(
    r"(?:(?:.*\.)?state\.)?(?:(?P<path>.+)\.)?embedding(?:_bag)?s\.(?P<table>.+)\.weight\.(?P=table)",
    re.DOTALL,
)


@dataclass(frozen=True)
class TableState:
    """What a whole table has learned about its rows, on the CPU, whatever its plan.

    Attributes:
        counts: int32 [rows] occurrences of each.
        sums: float32 [rows, shards] sum of squares of each, for each column shard; [rows, 1] where
            the columns are not split.
        totals: float64 [4], see ``TABLE_TOTALS``.
        age: steps since counts and sums were last halved.
        widths: columns of each shard; () where the columns are not split.
    """

    counts: Tensor
    sums: Tensor
    totals: Tensor
    age: int = 0
    widths: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.counts)

    def take(self, rows: Tensor) -> TableState:
        """The state for a table of other rows, or of these in another order.

        A row that is kept keeps its count and its sums, and so its rate. The totals go with the
        table: they say what an occurrence of any row is worth, so no row's rate depends on which
        others were kept.

        Args:
            rows: int64 [new rows]: the old row of each new one, or -1 for a new id, which starts
                with count and sums 0.

        Raises:
            ValueError: not whole numbers, a row that is not there, or one taken twice.
        """
        check_rows(rows, self.rows)
        known_R = rows >= 0
        counts_R = self.counts.new_zeros(len(rows))
        sums_R = self.sums.new_zeros(len(rows), self.sums.shape[1])
        counts_R[known_R] = self.counts[rows[known_R]]
        sums_R[known_R] = self.sums[rows[known_R]]
        return replace(self, counts=counts_R, sums=sums_R)

    def resize(self, rows: int) -> TableState:
        """The state with the first ``rows`` rows, or with new ones behind the old.

        Args:
            rows: of the new table, at least 1.

        Raises:
            ValueError: less than 1 row.
        """
        if rows < 1:
            raise ValueError(f"A table has at least 1 row; got {rows}.")
        first_R = torch.arange(rows)
        return self.take(first_R.where(first_R < self.rows, -1))

    @staticmethod
    def merge(states: Sequence[TableState]) -> TableState:
        """The state of one table that holds the rows of several, one table behind the other.

        Their totals add up: an occurrence is worth the mean over all tables. Where the tables are
        split into other columns, the merged one is as if it were not split.

        Raises:
            ValueError: no table.
        """
        if not states:
            raise ValueError("No table to merge: give at least one state.")
        if len({state.widths for state in states}) > 1:
            states = [replace(s, sums=s.row_sums().unsqueeze(1), widths=()) for s in states]
        totals = torch.stack([state.totals for state in states])
        # Tables of one model were trained in the same steps.
        format, steps = totals[0, :1], totals[:, 3].max().reshape(1)
        return TableState(
            torch.cat([state.counts for state in states]),
            torch.cat([state.sums for state in states]),
            torch.cat([format, totals[:, 1:3].sum(0), steps]),
            max(state.age for state in states),
            states[0].widths,
        )

    def row_sums(self) -> Tensor:
        """float32 [rows]: the sums of the whole rows, which are means over the columns."""
        if len(self.widths) < 2:
            return self.sums[:, 0]
        shares = torch.tensor(self.widths, dtype=torch.float32) / sum(self.widths)
        return self.sums @ shares


def check_rows(rows: Tensor, end: int) -> None:
    """Refuses what cannot say of each row of a table which row of another one it is.

    Args:
        rows: [rows] numbers of rows of the other table, each at most once; -1 for none.
        end: rows of the other table.

    Raises:
        ValueError: another shape or type, a row that is not there, or one that comes twice; the
            message names the place and the value.
    """
    if rows.dim() != 1 or rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise ValueError(
            f"rows must be whole numbers of shape [rows]; got {rows.dtype}, {list(rows.shape)}."
        )
    wrong = ((rows < -1) | (rows >= end)).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(
            f"rows[{place}] is {int(rows[place])}, out of range: must be 0 to {end - 1}, or -1 for "
            "none."
        )
    known = rows[rows >= 0].long()
    seen = torch.zeros(end, dtype=torch.bool)
    seen[known] = True
    if int(seen.sum()) < len(known):
        values, uses = known.unique(return_counts=True)
        twice = int(values[uses > 1][0])
        first, second = (rows == twice).nonzero().flatten()[:2].tolist()
        raise ValueError(f"rows[{first}] and rows[{second}] are both {twice}; one must be -1.")


def totals_of(squares: float, count: float, steps: float = 0) -> Tensor:
    """float64 [4]: the totals of a table, see ``TABLE_TOTALS``."""
    return torch.tensor([STATE_FORMAT, squares, count, steps], dtype=torch.float64)


def check_form(table: str, what: str, values_R: Tensor) -> None:
    """Refuses what cannot be a number a row, for the checks of counts and of sums.

    Raises:
        ValueError: another shape or type; the message names the table.
    """
    if values_R.dim() != 1:
        raise ValueError(
            f"Table {table!r}: {what} must have the shape [num_embeddings], a number a row; got "
            f"{list(values_R.shape)}."
        )
    if values_R.is_complex() or values_R.dtype == torch.bool:
        raise ValueError(f"Table {table!r}: {what} cannot be {values_R.dtype}.")


def check_counts(table: str, counts_R: Tensor) -> None:
    """Refuses what cannot be the counts of a table.

    Args:
        counts_R: [rows] of any dtype, on any device.

    Raises:
        ValueError: not whole numbers from 0 to ``COUNT_CEILING``; the message names the table.
    """
    check_form(table, "counts", counts_R)
    if counts_R.is_floating_point() and not bool((counts_R.frac() == 0).all()):
        raise ValueError(f"Table {table!r}: counts must be whole numbers, without NaN or infinity.")
    least, most = (int(value) for value in counts_R.aminmax()) if counts_R.numel() else (0, 0)
    if least < 0 or most > COUNT_CEILING:
        raise ValueError(
            f"Table {table!r}: counts must lie in 0 to {COUNT_CEILING}; got {least} to {most}."
        )


def are_totals(totals: Tensor) -> bool:
    """Whether numbers can be a table's totals: finite, and at least 0."""
    return bool((totals.isfinite() & (totals >= 0)).all())


def table_names(stems: Sequence[str]) -> list[str]:
    """A table's name, with the path of its collection where two have one of that name.

    Args:
        stems: keys of the tables' states, as ``"ebc.embedding_bags.item.weight.item"``.
    """
    forms = []
    for stem in stems:
        match = _SHARDED.fullmatch(stem)
        path, table = (match["path"], match["table"]) if match else (None, stem)
        forms.append((table, f"{path}.{table}" if path else table, stem))
    uses = [Counter(level) for level in zip(*forms, strict=True)]
    return [next(f for f, use in zip(form, uses, strict=True) if use[f] == 1) for form in forms]


def check_state(table: str, states: Mapping[str, Any], rows: int) -> None:
    """Refuses what cannot be a table's state: ours, version 0.2's, or row-wise Adagrad's.

    Args:
        states: by key without the table's name.
        rows: of the table.

    Raises:
        ValueError: what is missing or wrong, and what to do.
    """
    advice = (
        "Load the model's weights without it, then either seed the counts, "
        "torchrec_freq.load_row_counts(model, counts), or start from zero by doing nothing."
    )
    if ROW_COUNTER not in states:
        if MOMENTUM in states:
            return
        raise ValueError(
            f"The optimizer state of {table!r} has neither {ROW_COUNTER} nor {MOMENTUM}: it is "
            f"neither FrequencySGD's nor row-wise Adagrad's. {advice}"
        )
    if TABLE_TOTALS not in states or ROW_COUNTER_AGE not in states:
        raise ValueError(
            f"The optimizer state of {table!r} is of torchrec_freq 0.1 (no {TABLE_TOTALS}), which "
            f"this version does not read. {advice}"
        )
    counts, totals = states[ROW_COUNTER], states[TABLE_TOTALS]
    numbers, age = f"{TABLE_TOTALS} are {totals.tolist()}", int(states[ROW_COUNTER_AGE])
    wrong = None
    if tuple(totals.shape) != (TOTALS,) or float(totals[0]) not in (OLD_FORMAT, STATE_FORMAT):
        wrong = f"{numbers}, not of format {STATE_FORMAT}: damaged, or of a later version (upgrade)"
    elif not are_totals(totals):
        wrong = f"{numbers}; they must be finite and at least 0"
    elif age < 0:
        wrong = f"{ROW_COUNTER_AGE} is {age}; it must be at least 0"
    if wrong:
        raise ValueError(f"The optimizer state of {table!r} cannot be used: {wrong}. {advice}")
    if tuple(counts.shape) != (rows,):
        raise ValueError(
            f"Table {table!r} has {rows} rows; got row counters of shape {list(counts.shape)}."
        )
    for part in [s.tensor for s in counts.shards] if hasattr(counts, "shards") else [counts]:
        check_counts(table, part)
