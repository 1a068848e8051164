"""Counts in plan-independent form: read them off a sharded model, and put them back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from torchrec_freq.config import require_number
from torchrec_freq.counts.state import check_counts
from torchrec_freq.sharded.install import frequency_modules
from torchrec_freq.sharded.tables import FrequencyTables, Table


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
    return {
        name: handle.read(table.name).counts
        for name, (handle, table) in named_tables(model).items()
    }


def load_row_counts(
    model: nn.Module,
    counts: Mapping[str, Tensor],
    squares: Mapping[str, float] | None = None,
) -> None:
    """Sets the counts of some or all tables, under any sharding plan.

    The counts say how the table's squares are shared out, from the next step on; how many
    occurrences they stand for does not matter. All ranks must call it with the same counts. Nothing
    is changed where anything is wrong.

    Args:
        counts: table name -> [num_embeddings] whole numbers from 0 to
            ``torchrec_freq.COUNT_CEILING``, of any dtype.
        squares: table name -> sum over the past of the mean squares of its rows' gradients, at
            least 0, for some or all of the tables; a table that is not named keeps its own. They
            are taken for those of at least one occurrence of each row with a count, so the limit
            of what an occurrence adds (``torchrec_freq.rule.SQUARE_LIMIT``) is not too small.

    Raises:
        ValueError: an unknown table, a wrong length, a count that is negative, not whole or too
            large, or wrong squares; the message names the table.
    """
    squares = squares or {}
    tables = named_tables(model)
    for name in [*counts, *squares]:
        if name not in tables:
            raise ValueError(
                f"No table {name!r} trains with FrequencySGD. Tables: {', '.join(tables)}."
            )
    for name, counts_R in counts.items():
        rows = tables[name][1].rows
        if tuple(counts_R.shape) != (rows,):
            raise ValueError(
                f"Table {name!r} has {rows} rows; got counts of shape {list(counts_R.shape)}."
            )
        check_counts(name, counts_R)
    for name, value in squares.items():
        require_number(f"squares of {name!r}", value, minimum=0)
        if name not in counts:
            raise ValueError(f"Table {name!r} has squares but no counts: give both.")
    for name, counts_R in counts.items():
        handle, table = tables[name]
        handle.load_counts(table.name, counts_R, squares.get(name))


def named_tables(model: nn.Module) -> dict[str, tuple[FrequencyTables, Table]]:
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
