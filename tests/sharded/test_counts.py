"""Reading and loading counts under every plan, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from models import TABLES, Pair, full_weights
from plans import make_plan
from ranks import on_ranks
from reference import ReferenceTable

import torchrec_freq
from torchrec_freq import COUNT_CEILING, load_row_counts, row_counts, table_states


def random_counts(scale: int = 50) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {t.name: torch.randint(0, scale, (t.rows,), generator=generator) for t in TABLES}


def load(table: ReferenceTable, counts_R: torch.Tensor, squares: float | None = None) -> None:
    """Rows keep their mean square, where they have one; or ``squares`` are shared out by count."""
    counts = dict(enumerate(counts_R.tolist()))
    if squares is not None:
        table.squares, table.total, table.steps, table.sums = squares, sum(counts.values()), 0.0, {}
    rho = table.squares / table.total if table.total else 0.0
    for row, count in counts.items():
        mean = torch.full_like(table.weight[row], rho)
        if row in table.sums:
            mean = table.sums[row] / table.counts[row]
        table.sums[row] = count * mean
    table.counts = Counter(counts)


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "mixed"])
@on_ranks(2)
def test_loaded_counts_are_read_and_used(kind: str) -> None:
    pair = Pair(TABLES, make_plan(kind, TABLES, 2), {"prior_count": 2})
    counts = random_counts()
    for squares in ({}, {"a": 2.5}):
        load_row_counts(pair.model, counts, squares)
        for name, table in pair.reference.tables.items():
            load(table, counts[name], squares.get(name))
        pair.check()
        for _ in range(3):
            pair.step()
        pair.check()
    before = row_counts(pair.model)
    load_row_counts(pair.model, {"c": counts["c"].float()})
    load(pair.reference.tables["c"], counts["c"])
    pair.check()
    assert all(torch.equal(before[name], row_counts(pair.model)[name]) for name in "ab")


@on_ranks(2)
def test_what_was_read_stays() -> None:
    pair = Pair(TABLES, make_plan("row_wise", TABLES, 2))
    pair.step()
    states = table_states(pair.model)
    pair.step()
    for name, now in table_states(pair.model).items():
        assert states[name].age == states[name].totals[3] == 1 and now.totals[3] == 2
        assert not torch.equal(states[name].counts, now.counts)
        assert not torch.equal(states[name].sums, now.sums)


@on_ranks(2)
def test_known_frequencies() -> None:
    options = {"count": "frozen", "normalize": None}
    # Under other plans ranks stop at different lookups, and cannot go on together.
    pair = Pair(TABLES, make_plan("row_wise", TABLES, 2), options)
    with pytest.raises(RuntimeError, match="load_row_counts"):
        pair.step()
    counts = random_counts()
    pair = Pair(TABLES, make_plan("mixed", TABLES, 2), options)
    load_row_counts(pair.model, counts)
    for name, table in pair.reference.tables.items():
        table.counts = Counter(dict(enumerate(counts[name].tolist())))
    for _ in range(4):
        pair.step()
    pair.check()


WRONG: dict[str, tuple[dict[str, Any], dict[str, float] | None, str]] = {
    "unknown table": ({"z": torch.zeros(3)}, None, "'z'.*a, b, c"),
    "too short": ({"a": torch.zeros(3)}, None, r"'a' has 12 rows.*\[3\]"),
    "two dimensions": ({"a": torch.zeros(12, 1)}, None, r"'a'.*\[12, 1\]"),
    "negative": ({"a": torch.full((12,), -1)}, None, "'a'.*-1"),
    "not whole": ({"a": torch.full((12,), 0.5)}, None, "'a'.*whole"),
    "NaN": ({"a": torch.full((12,), torch.nan)}, None, "'a'.*NaN"),
    "infinite": ({"a": torch.full((12,), torch.inf)}, None, "'a'"),
    "too large": ({"a": torch.full((12,), COUNT_CEILING + 1)}, None, f"'a'.*{COUNT_CEILING + 1}"),
    "bool": ({"a": torch.zeros(12, dtype=torch.bool)}, None, "'a'.*bool"),
    "squares of no table": ({}, {"z": 1.0}, "'z'"),
    "squares without counts": ({}, {"a": 1.0}, "'a' has squares but no counts"),
    "negative squares": ({}, {"b": -1.0}, "'b'.*-1"),
    "infinite squares": ({}, {"b": torch.inf}, "'b'.*inf"),
}


@pytest.mark.parametrize("case", WRONG)
@on_ranks(2)
def test_wrong_counts_change_nothing(case: str) -> None:
    wrong, squares, message = WRONG[case]
    pair = Pair(TABLES, make_plan("mixed", TABLES, 2))
    good = {"b": torch.ones(7)}
    with pytest.raises(ValueError, match=message):
        load_row_counts(pair.model, {**good, **wrong}, squares)
    assert all(not counts.any() for counts in row_counts(pair.model).values())
    pair.step()
    pair.check()


@on_ranks(2)
def test_learning_rate_of_the_fused_optimizer() -> None:
    pair = Pair(TABLES, make_plan("mixed", TABLES, 2))
    pair.step()
    for group in pair.model.fused_optimizer.param_groups:
        group["lr"] = 0.004
    # TorchRec hands a changed rate to the kernels in the fused optimizer's step.
    pair.model.fused_optimizer.step()
    pair.reference.lr = 0.004
    for _ in range(3):
        pair.step()
    pair.check()
    for group in pair.model.fused_optimizer.param_groups:
        group["lr"] = 0.0
    pair.model.fused_optimizer.step()
    before = full_weights(pair.model)
    pair.step()
    for name, weight in full_weights(pair.model).items():
        assert torch.equal(weight, before[name])


def test_model_without_frequency_sgd() -> None:
    with pytest.raises(ValueError, match="No table"):
        torchrec_freq.row_counts(torch.nn.Linear(2, 2))
