"""A model taken over from row-wise Adagrad, and given back: sums of squares under any plan."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchrec.distributed.types import ShardedTensor

from torchrec_freq.counts.adagrad import check_lookups, check_sums, counts_of_sums, sums_of_counts
from torchrec_freq.counts.state import TableState, table_names, totals_of
from torchrec_freq.sharded.counts import named_tables
from torchrec_freq.sharded.tables import FrequencyTables, Table

MOMENTUM: Final = "momentum1"
"""TorchRec's name for row-wise Adagrad's sums in the state of a fused optimizer."""

_TABLE: Final = re.compile(r"(?:.*\.)?embedding(?:_bag)?s\..+\.weight", re.DOTALL)


def load_adagrad_sums(
    model: nn.Module,
    sums: Mapping[str, Tensor],
    lookups: Mapping[str, float] | None = None,
) -> None:
    r"""Sets counts and squares of some or all tables so that rows have row-wise Adagrad's rates.

    A row's part from the past, :math:`P_i / 2` of the rule, becomes its sum :math:`A_i`:

    .. math::
        c_i = \mathrm{round}(A_i / u), \qquad G = 2 u \textstyle\sum_i c_i

    so training goes on with the rates that it had; the row's own square of a step weighs
    ``own_weight / 2`` instead of 1. The rounding moves the past's part of a row of count ``c`` by
    at most ``1 / (2 c)`` of itself, and its rate by half of that.

    ``lookups`` sets the unit :math:`u`: the counts are then as large as if they had been counted.
    Give it where it is known; it may be rough. Without it the largest count of a table is 2^29,
    which rounds least: by less than 1e-5 in rows that had at least 1e-4 of the largest sum. But
    then the shares of the rows change hardly any more, and rows that are seen for the first time
    take large steps for as long as their counts are small beside the others'.

    The limit of what an occurrence adds to the squares (``torchrec_freq.rule.SQUARE_LIMIT``)
    needs the occurrences that the squares stand for: ``lookups``, or else one for each row with a
    count, which lets more pass at first, never less.

    All ranks must call it with the same sums, under any plan. Nothing is changed where anything is
    wrong.

    Args:
        sums: table name, as :func:`torchrec_freq.row_counts` gives it -> [num_embeddings] sums of
            the mean squares of the rows' gradients, finite and at least 0: row-wise Adagrad's
            ``momentum1``. Of column shards, the mean over the shards by their numbers of columns.
        lookups: table name -> the table's occurrences so far in all batches, at least 1; of some
            or all of the tables.

    Raises:
        ValueError: an unknown table, a wrong length, sums that are negative or not finite, wrong
            lookups, or a table with ``normalize=None``, whose rates do not come from squares; the
            message names the table.
    """
    lookups = lookups or {}
    tables = _scaled_tables(model, [*sums, *lookups])
    for name, sums_R in sums.items():
        _check(name, sums_R, tables[name][1].rows)
    for name, number in lookups.items():
        check_lookups(name, number)
        if name not in sums:
            raise ValueError(f"Table {name!r} has lookups but no sums: give both.")
    for name, sums_R in sums.items():
        handle, table = tables[name]
        counts_R, squares = counts_of_sums(sums_R.detach().cpu(), lookups.get(name))
        seen = int(counts_R.count_nonzero())
        totals = totals_of(squares, float(counts_R.sum()), seen, lookups.get(name))
        handle.load(table.name, TableState(counts_R, totals, age=0))


def adagrad_sums(model: nn.Module) -> dict[str, Tensor]:
    r"""Row-wise Adagrad's sums with which it would go on at the rates that the rows have now.

    They are the past's part of the rule, :math:`A_i = P_i / 2 = G c_i / (2 C)`. All ranks must call
    it; the result is the same on each.

    Returns:
        table name, as :func:`torchrec_freq.row_counts` gives it -> float32 CPU tensor
        [num_embeddings], for :func:`load_momentum`.

    Raises:
        ValueError: no table of the model trains with FrequencySGD, or one does with
            ``normalize=None``, whose rates do not come from squares.
    """
    sums = {}
    for name, (handle, table) in _scaled_tables(model, named_tables(model)).items():
        state = handle.read(table.name)
        sums[name] = sums_of_counts(state.counts, state.totals)
    return sums


def load_momentum(model: nn.Module, sums: Mapping[str, Tensor]) -> None:
    """Puts sums of squares into the ``momentum1`` of tables that train with row-wise Adagrad.

    All ranks must call it with the same sums, under any plan. Column shards of a table, which each
    have a sum of their own for a row, get the same one. Nothing is changed where anything is wrong;
    a table without such a state is noticed by the ranks that hold it.

    Args:
        model: TorchRec's ``DistributedModelParallel``, or another module that has
            ``fused_optimizer`` and, beside it, the weights of the tables in its state.
        sums: table name -> [num_embeddings], finite and at least 0, of :func:`adagrad_sums`, for
            some or all of the tables. Tables of the same name in two modules are told apart by the
            module's path, as in ``"user_arch.ebc.item"``.

    Raises:
        ValueError: an unknown table, one that trains with another optimizer, a wrong length, or
            sums that are negative or not finite; the message names the table.
    """
    parts = _momentum_parts(model)
    for name, sums_R in sums.items():
        if name not in parts:
            raise ValueError(f"The model has no table {name!r}. Tables: {_list(parts)}.")
        table = parts[name]
        _check(name, sums_R, table.rows)
        if table.momentum is None:
            raise ValueError(
                f"Table {name!r} does not train with row-wise Adagrad: its fused optimizer has no "
                f"{MOMENTUM} [num_embeddings]. Use RowWiseAdagrad in apply_optimizer_in_backward, "
                "and a plan without data_parallel, which TorchRec does not train with it."
            )
    with torch.no_grad():
        for name, sums_R in sums.items():
            table = parts[name]
            for offset, part_R in table.momentum or []:
                first = offset % table.rows  # the columns' sums lie behind each other
                part_R.copy_(sums_R[first : first + len(part_R)])


@dataclass(frozen=True)
class _Momentum:
    """Sums of a table on this rank.

    Attributes:
        rows: of the whole table.
        momentum: first element and memory of each part; None where the optimizer has none.
    """

    rows: int
    momentum: list[tuple[int, Tensor]] | None


def _momentum_parts(model: nn.Module) -> dict[str, _Momentum]:
    """By table, the same tables on every rank."""
    optimizer = getattr(model, "fused_optimizer", None)
    if optimizer is None:
        raise ValueError(
            f"A {type(model).__name__} has no fused_optimizer: give the DistributedModelParallel."
        )
    states = optimizer.state_dict()["state"]
    weights = {k: v for k, v in model.state_dict().items() if _TABLE.fullmatch(k)}
    tables = {key: key.split(".")[-2] for key in weights}
    names = table_names([f"{key}.{table}" for key, table in tables.items()])
    parts = {}
    for name, (key, table) in zip(names, tables.items(), strict=True):
        rows = _size(weights[key])[0]
        if isinstance(weights[key], (ShardedTensor, DTensor)) and not _local_parts(weights[key]):
            parts[name] = _Momentum(rows, [])
            continue
        state = states.get(key, {}).get(f"{table}.{MOMENTUM}")
        row_wise = state is not None and len(_size(state)) == 1
        parts[name] = _Momentum(rows, _local_parts(state) if row_wise else None)
    return parts


def _size(value: Any) -> torch.Size:
    """Of a whole tensor, without TorchRec's warning about its type."""
    size: torch.Size = value.metadata().size if isinstance(value, ShardedTensor) else value.shape
    return size


def _local_parts(value: Any) -> list[tuple[int, Tensor]]:
    """First row, or element, of each part on this rank, and its memory."""
    if isinstance(value, DTensor):
        local: Any = value.to_local()
        return [
            (offset[0], part)
            # Where there is no shard it may name an offset all the same.
            for offset, part in zip(local.local_offsets(), local.local_shards(), strict=False)
        ]
    return [(shard.metadata.shard_offsets[0], shard.tensor) for shard in value.local_shards()]


def _scaled_tables(
    model: nn.Module, names: Iterable[str]
) -> dict[str, tuple[FrequencyTables, Table]]:
    """The model's tables, of which those named are known and have their rates from squares."""
    tables = named_tables(model)
    for name in names:
        if name not in tables:
            raise ValueError(
                f"No table {name!r} trains with FrequencySGD. Tables: {_list(tables)}."
            )
        if tables[name][1].config.normalize is None:
            raise ValueError(
                f"Table {name!r} trains with normalize=None: its rates do not come from squared "
                "gradients, so row-wise Adagrad's sums say nothing to it. Use normalize='table'."
            )
    return tables


def _check(name: str, sums_R: Tensor, rows: int) -> None:
    check_sums(name, sums_R)
    if len(sums_R) != rows:
        raise ValueError(f"Table {name!r} has {rows} rows; got sums of shape {list(sums_R.shape)}.")


def _list(names: Mapping[str, object]) -> str:
    return ", ".join(names)
