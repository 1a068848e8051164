"""Reading and loading counts under every plan, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import TABLES, Pair, full_weights
from plans import make_plan
from ranks import on_ranks
from reference import seed

import torchrec_freq
from torchrec_freq import COUNT_CEILING, load_row_counts, row_counts


def random_counts(scale: int = 50) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {t.name: torch.randint(0, scale, (t.rows,), generator=generator) for t in TABLES}


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "mixed"])
@on_ranks(2)
def test_loaded_counts_are_read_and_used(kind: str) -> None:
    pair = Pair(TABLES, make_plan(kind, TABLES, 2), {"own_weight": 2})
    counts = random_counts()
    load_row_counts(pair.model, counts)
    for name, table in pair.reference.tables.items():
        seed(table, counts[name])
    pair.check()
    for _ in range(3):
        pair.step()
    pair.check()
    # The squares so far stay, and are shared out by the new counts; or they come with them.
    load_row_counts(pair.model, {"c": counts["c"].float()})
    seed(pair.reference.tables["c"], counts["c"])
    load_row_counts(pair.model, {"a": counts["a"]}, {"a": 2.5})
    seed(pair.reference.tables["a"], counts["a"], 2.5)
    for _ in range(3):
        pair.step()
    pair.check()


@on_ranks(2)
def test_known_frequencies() -> None:
    pair = Pair(TABLES, make_plan("mixed", TABLES, 2), {"count": "frozen"})
    with pytest.raises(RuntimeError, match="load_row_counts"):
        pair.step()
    counts = random_counts()
    pair = Pair(TABLES, make_plan("mixed", TABLES, 2), {"count": "frozen"})
    load_row_counts(pair.model, counts)
    for name, table in pair.reference.tables.items():
        seed(table, counts[name])
    for _ in range(4):
        pair.step()
    pair.check()
    assert all(torch.equal(row_counts(pair.model)[name], counts[name]) for name in counts)


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
