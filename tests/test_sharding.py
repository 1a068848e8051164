"""Every sharding plan trains like one process that sees the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
from models import TABLES, Pair, TableSpec
from ranks import on_ranks, run_on_ranks
from torchrec.distributed.sharding_plan import column_wise, row_wise, table_wise

# TorchRec's hand-made plans choose the dense kernel where only the sharder names an optimizer.
FUSED = "fused"

RULES: dict[str, dict[str, Any]] = {
    "full": {},
    "paper": {"coherence": 0.0, "normalize": None},
    "coherence": {"coherence": 0.5, "normalize": None},
    "scale": {"coherence": 0.0, "min_count": 3},
    "batches": {"count": "batches"},
    "half-life": {"half_life": 3},
}


def make_plan(kind: str, tables: list[TableSpec], ranks: int) -> dict[str, Any]:
    """A plan for TorchRec's ``construct_module_sharding_plan``."""
    generators = {
        "table_wise": lambda i: table_wise(rank=i % ranks, compute_kernel=FUSED),
        "row_wise": lambda i: row_wise(compute_kernel=FUSED),
        "column_wise": lambda i: column_wise([r % ranks for r in range(2)], compute_kernel=FUSED),
    }
    kinds = list(generators)
    return {
        t.name: generators[kinds[i % len(kinds)] if kind == "mixed" else kind](i)
        for i, t in enumerate(tables)
    }


def train(
    kind: str,
    ranks: int,
    rule: str = "full",
    weighted: bool = False,
    mean: bool = False,
    by_sharder: bool = False,
) -> None:
    tables = [TableSpec(t.name, t.rows, t.columns, t.features, mean) for t in TABLES]
    pair = Pair(
        tables,
        make_plan(kind, tables, ranks),
        RULES[rule],
        weighted=weighted,
        by_sharder=by_sharder,
    )
    pair.check()
    for step in range(7):
        # In step 2 one feature has no id anywhere, in step 4 neither feature of a whole table.
        loss, expected = pair.step(skip={2: "f1", 4: "f0"}.get(step))
        assert abs(loss - expected) < 1e-6
        pair.check()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
@on_ranks(2)
def test_rule_under_every_plan(kind: str, rule: str) -> None:
    train(kind, 2, rule)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_pooling_and_weights(ranks: int, kind: str, mean: bool, weighted: bool) -> None:
    if kind == "row_wise" and mean and weighted:
        pytest.skip("TorchRec's row-wise shards divide by the sum of the weights, others by length")
    arguments = {"kind": kind, "ranks": ranks, "mean": mean, "weighted": weighted}
    run_on_ranks(ranks, train, arguments)


@on_ranks(2)
def test_mixed_plan() -> None:
    train("mixed", 2)


@on_ranks(2)
def test_opt_in_by_sharder() -> None:
    train("mixed", 2, by_sharder=True)
