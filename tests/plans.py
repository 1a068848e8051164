"""Plans made by hand, of every kind of sharding, and tables that use all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models import TABLES, TableSpec
from torchrec.distributed.sharding_plan import (
    column_wise,
    data_parallel,
    grid_shard,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingType

# TorchRec's hand-made plans choose the dense kernel where only the sharder names an optimizer.
FUSED = "fused"

TWO_RANKS = ["table_wise", "row_wise", "column_wise", "column_wise on one rank", "data_parallel"]
FOUR_RANKS = ["table_row_wise", "table_column_wise", "grid_shard"]

# One wide enough for grid shards.
WIDE_TABLES = [*TABLES[:2], TableSpec("c", 30, 256, ["f3"])]
EIGHT_TABLES = [
    TableSpec(f"t{i}", rows, columns, [f"x{i}"])
    for i, (rows, columns) in enumerate(
        [(12, 16), (4, 16), (9, 32), (20, 16), (5, 16), (17, 32), (2, 16), (8, 256)]
    )
]


def table_column_wise(ranks: list[int]) -> Any:
    """TorchRec has no generator of its own: column shards, all on one host."""

    def generate(*arguments: Any) -> Any:
        sharding = column_wise(ranks, compute_kernel=FUSED)(*arguments)
        sharding.sharding_type = ShardingType.TABLE_COLUMN_WISE.value
        return sharding

    return generate


def unequal_columns(*arguments: Any) -> Any:
    """Three quarters of the columns on one rank, one on the other."""
    sharding = column_wise([0, 1])(*arguments)
    rows, columns = arguments[0].shape
    left, right = sharding.sharding_spec.shards
    left.shard_sizes = [rows, columns * 3 // 4]
    right.shard_sizes, right.shard_offsets = [rows, columns // 4], [0, columns * 3 // 4]
    return sharding


def make_plan(kind: str, tables: list[TableSpec], ranks: int) -> dict[str, Any]:
    """A plan for TorchRec's ``construct_module_sharding_plan``."""
    generators: dict[str, Callable[[int], Any]] = {
        "table_wise": lambda i: table_wise(rank=i % ranks, compute_kernel=FUSED),
        "row_wise": lambda i: row_wise(compute_kernel=FUSED),
        "column_wise": lambda i: column_wise([r % ranks for r in range(2)], compute_kernel=FUSED),
        "column_wise on one rank": lambda i: column_wise([i % ranks] * 2, compute_kernel=FUSED),
        "data_parallel": lambda i: data_parallel(),
        # On the hosts of 2 ranks each that four ranks stand for.
        "table_row_wise": lambda i: table_row_wise(host_index=i % 2),
        "table_column_wise": lambda i: table_column_wise([2 * (i % 2), 2 * (i % 2) + 1]),
        # TorchRec cuts grid shards 128 columns wide.
        "grid_shard": lambda i: (
            grid_shard(host_indexes=[0, 1])
            if tables[i].columns > 128
            else table_wise(rank=i % ranks, compute_kernel=FUSED)
        ),
        "four columns": lambda i: column_wise([r % ranks for r in range(4)]),
        "unequal columns": lambda i: unequal_columns,
    }
    mixed = TWO_RANKS + (FOUR_RANKS if ranks == 4 else [])
    return {
        t.name: generators[mixed[i % len(mixed)] if kind == "mixed" else kind](i)
        for i, t in enumerate(tables)
    }
