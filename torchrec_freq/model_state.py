"""State of whole tables, read off a sharded model and put back, whatever its plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_freq.config import require_number
from torchrec_freq.counts.conversion import check_lookups, check_sums, with_counts_of_sums
from torchrec_freq.counts.state import (
    COUNT_CEILING,
    TableState,
    are_totals,
    check_counts,
    totals_of,
)
from torchrec_freq.sharded.install import frequency_modules
from torchrec_freq.sharded.tables import FrequencyTables, LocalShard, Table

_Named = dict[str, tuple[FrequencyTables, Table]]


def row_counts(model: nn.Module) -> dict[str, Tensor]:
    """Counts of every table that trains with FrequencySGD, the same on every rank.

    All ranks must call it.

    Returns:
        table name -> int64 CPU tensor [num_embeddings]: occurrences of each row so far, halved by
        ``half_life``, at most ``torchrec_freq.COUNT_CEILING``. Tables of the same name in two
        modules are told apart by the module's path, as in ``"user_arch.ebc.item"``.

    Raises:
        ValueError: no table of the model trains with FrequencySGD.
    """
    states = table_states(model)
    return {n: s.counts.clamp(max=COUNT_CEILING).to(torch.int64) for n, s in states.items()}


def load_row_counts(
    model: nn.Module,
    counts: Mapping[str, Tensor],
    squares: Mapping[str, float] | None = None,
) -> None:
    r"""Sets the counts of some or all tables, under any sharding plan.

    A row whose count is changed keeps the mean square of its occurrences, :math:`A_i / c_i`; one
    that had no count gets the table's. All other rows, and the table's own mean square, stay as
    they are. All ranks must call it with the same counts. Nothing is changed where anything is
    wrong.

    Args:
        counts: table name -> [num_embeddings] whole numbers from 0 to
            ``torchrec_freq.COUNT_CEILING``, of any dtype.
        squares: table name -> sum over the past of the mean squares of its rows' gradients, at
            least 0, for some or all of the tables: each row then gets its share of it, by its
            count.

    Raises:
        ValueError: an unknown table, a wrong length, a count that is negative, not whole or too
            large, or wrong squares; the message names the table.
    """
    squares = squares or {}
    tables = _known(model, [*counts, *squares])
    for name, counts_R in counts.items():
        _require_rows(tables, name, "counts", counts_R)
        check_counts(name, counts_R)
    for name, value in squares.items():
        require_number(f"squares of {name!r}", value, minimum=0)
        if name not in counts:
            raise ValueError(f"Table {name!r} has squares but no counts: give both.")
    for name, counts_R in counts.items():
        handle, table = tables[name]
        if name in squares:
            total = float(counts_R.sum(dtype=torch.float64))
            handle.table_totals(table.name).copy_(totals_of(squares[name], total))
        _, square, count, _ = handle.table_totals(table.name).tolist()
        for shard in handle.shards_of(table.name):
            after_R = shard.part_of(counts_R).to(shard.counts.device, torch.int32)
            _set_counts(shard, after_R, square / count if count else 0.0, keep=name not in squares)


def table_states(model: nn.Module) -> dict[str, TableState]:
    """All that every table has learned about its rows, the same on every rank, on the CPU.

    All ranks must call it.

    Returns:
        table name, as :func:`row_counts` gives it -> its state.

    Raises:
        ValueError: no table of the model trains with FrequencySGD.
    """
    return {name: handle.read(table.name) for name, (handle, table) in named_tables(model).items()}


def load_table_states(model: nn.Module, states: Mapping[str, TableState]) -> None:
    """Sets the state of some or all tables, under any sharding plan.

    Sums of column shards of the same widths are taken as they are; of other widths each shard gets
    their mean over the columns. All ranks must call it with the same states. Nothing is changed
    where anything is wrong.

    Args:
        states: table name -> state, of :func:`table_states`, of a checkpoint
            (:func:`torchrec_freq.read_table_states`), or of another vocabulary. Counts that are all
            0 beside sums that are not, as in a checkpoint of row-wise Adagrad, are derived from the
            sums.

    Raises:
        ValueError: an unknown table, a wrong length, or numbers that cannot be its state; the
            message names the table.
    """
    tables = _known(model, states)
    for name, state in states.items():
        _require_rows(tables, name, "counts", state.counts)
        check_counts(name, state.counts)
        shards = max(1, len(state.widths))
        if tuple(state.sums.shape) != (tables[name][1].rows, shards):
            raise ValueError(
                f"Table {name!r} has {tables[name][1].rows} rows; got sums of shape "
                f"{list(state.sums.shape)} for {shards} column shards."
            )
        if not are_totals(state.totals) or state.age < 0:
            raise ValueError(
                f"Table {name!r}: totals {state.totals.tolist()} and age {state.age} must be "
                "finite and at least 0."
            )
    for name, state in states.items():
        handle, table = tables[name]
        if not state.counts.any() and state.sums.any():
            state = with_counts_of_sums(state)
        handle.load(table.name, state)


def evict_rows(
    model: nn.Module,
    rows: Mapping[str, Tensor],
    reset: Callable[[Tensor], object] | None = None,
) -> None:
    """Makes rows those of new ids: count and sum 0, initial weights. All others stay as they are.

    All ranks must call it with the same rows. Nothing is changed where anything is wrong.

    Args:
        rows: table name -> int64 [evicted] rows, each once.
        reset: makes weights, in place, of a tensor [evicted, columns]; None: the table's own
            ``init_fn``. It is called on one rank.

    Raises:
        ValueError: an unknown table, or a row that is not in it or named twice; the message names
            the table.
    """
    tables = _known(model, rows)
    for name, rows_E in rows.items():
        _, table = tables[name]
        if rows_E.dim() != 1 or rows_E.is_floating_point() or rows_E.dtype == torch.bool:
            raise ValueError(
                f"Table {name!r}: rows must be whole numbers [evicted]; got {rows_E.dtype} of "
                f"shape {list(rows_E.shape)}."
            )
        wrong_E = rows_E[(rows_E < 0) | (rows_E >= table.rows)]
        if len(wrong_E):
            raise ValueError(f"Table {name!r} has {table.rows} rows; got row {int(wrong_E[0])}.")
        if len(rows_E.unique()) < len(rows_E):
            raise ValueError(f"Table {name!r}: a row is named twice. Name each row once.")
    for name, rows_E in rows.items():
        handle, table = tables[name]
        _evict(handle, table, rows_E.to("cpu", torch.int64), reset or table.reset)


@torch.no_grad()
def _set_counts(shard: LocalShard, after_R: Tensor, rho: float, *, keep: bool) -> None:
    """Sets counts, and sums that go with them: the rows' own mean squares, or the table's."""
    before_R, sums_R = shard.counts, after_R * rho
    if keep:
        scaled_R = (shard.sums * (after_R / before_R)).where(before_R > 0, sums_R)
        sums_R = shard.sums.where(after_R == before_R, scaled_R)
    shard.sums.copy_(sums_R)
    shard.counts.copy_(after_R)


@torch.no_grad()
def _evict(
    handle: FrequencyTables, table: Table, rows: Tensor, reset: Callable[[Tensor], object]
) -> None:
    # One rank makes the weights, so that replicas of a row get the same.
    weights_ED = handle.from_first(torch.empty(len(rows), table.columns), reset)
    for shard in handle.shards_of(table.name):
        mine = (rows >= shard.row_offset) & (rows < shard.row_offset + shard.counts.numel())
        local = (rows[mine] - shard.row_offset).to(shard.counts.device)
        shard.counts.index_fill_(0, local, 0)
        shard.sums.index_fill_(0, local, 0.0)
        columns = slice(shard.column_offset, shard.column_offset + shard.columns)
        tbe: Any = shard.tbe
        if shard.cached:
            tbe.flush()
        weights_RD = shard.weights()
        weights_RD[local] = weights_ED[mine][:, columns].to(weights_RD)
        if shard.cached:
            tbe.reset_cache_states()


def adagrad_sums(model: nn.Module) -> dict[str, Tensor]:
    r"""The rows' sums of squares :math:`A_i`, which are row-wise Adagrad's ``momentum1``.

    All ranks must call it; the result is the same on each.

    Returns:
        table name, as :func:`row_counts` gives it -> float32 CPU tensor [num_embeddings]; of column
        shards the mean over the columns.

    Raises:
        ValueError: no table of the model trains with FrequencySGD, or one does with
            ``normalize=None``, whose rates do not come from squares.
    """
    tables = named_tables(model)
    for name in tables:
        _require_sums(tables, name)
    return {name: state.row_sums() for name, state in table_states(model).items()}


def load_adagrad_sums(
    model: nn.Module,
    sums: Mapping[str, Tensor],
    lookups: Mapping[str, float] | None = None,
) -> None:
    r"""Sets the sums of squares of some or all tables, and derives the counts from them.

    Rows keep the rates that row-wise Adagrad gave them. Their counts are in proportion to their
    sums. All ranks must call it with the same sums. Nothing is changed where anything is wrong.

    Args:
        sums: table name -> [num_embeddings], finite and at least 0: row-wise Adagrad's
            ``momentum1``.
        lookups: table name -> the table's occurrences so far in all batches, at least 1, of some or
            all of the tables: the counts then sum up to them. Elsewhere rows with a sum have
            ``torchrec_freq.counts.conversion.KNOWN_COUNT`` on average.

    Raises:
        ValueError: an unknown table, a wrong length, sums that are negative or not finite, wrong
            lookups, or a table with ``normalize=None``; the message names the table.
    """
    lookups = lookups or {}
    tables = _known(model, [*sums, *lookups])
    for name, sums_R in sums.items():
        _require_sums(tables, name)
        check_sums(name, sums_R)
        _require_rows(tables, name, "sums", sums_R)
    for name, number in lookups.items():
        check_lookups(name, number)
        if name not in sums:
            raise ValueError(f"Table {name!r} has lookups but no sums: give both.")
    for name, sums_R in sums.items():
        handle, table = tables[name]
        state = handle.read(table.name)
        given = sums_R.detach().to("cpu", torch.float32).unsqueeze(1)
        state = with_counts_of_sums(replace(state, sums=given, widths=()), lookups.get(name))
        handle.load(table.name, state)


def named_tables(model: nn.Module) -> _Named:
    """Tables by name, or by path and name where two modules have one of that name.

    Raises:
        ValueError: no table of the model trains with FrequencySGD.
    """
    found = [
        (path, handle, table)
        for path, handle in frequency_modules(model)
        for table in handle.tables.values()
    ]
    if not found:
        raise ValueError(
            "No table of this model trains with FrequencySGD: name it in "
            "apply_optimizer_in_backward, or in the sharder's fused_params, before sharding."
        )
    uses = Counter(table.name for _, _, table in found)
    return {
        table.name if uses[table.name] == 1 else f"{path}.{table.name}": (handle, table)
        for path, handle, table in found
    }


def _known(model: nn.Module, names: Mapping[str, object] | list[str]) -> _Named:
    tables = named_tables(model)
    for name in names:
        if name not in tables:
            raise ValueError(
                f"No table {name!r} trains with FrequencySGD. Tables: {', '.join(tables)}."
            )
    return tables


def _require_rows(tables: _Named, name: str, what: str, values_R: Tensor) -> None:
    rows = tables[name][1].rows
    if tuple(values_R.shape) != (rows,):
        raise ValueError(
            f"Table {name!r} has {rows} rows; got {what} of shape {list(values_R.shape)}."
        )


def _require_sums(tables: _Named, name: str) -> None:
    if tables[name][1].config.normalize is None:
        raise ValueError(
            f"Table {name!r} trains with normalize=None: its rates do not come from squared "
            "gradients, so it has no sums. Use normalize='table'."
        )
