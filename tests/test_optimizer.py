"""``FrequencySGD.step()`` on tables that are not sharded."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from typing import Any

import pytest
import torch
from models import TableSpec, make_batch, sample_loss, to_kjt
from reference import ReferenceModel, ReferenceTable
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from torchrec_freq import FrequencySGD

LR = 0.03
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "row-wise Adagrad": {"prior_count": 0},
    "frequency alone": {"prior_count": math.inf},
    "half-life, admit": {"half_life": 20, "admit": 4, "prior_count": 1},
    "paper": {"normalize": None, "min_count": 3},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
def test_sparse_gradient(rule: str, mean: bool) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    spec = TableSpec("a", 12, 8, ["f0"])
    table = nn.EmbeddingBag(
        12, 8, mode="mean" if mean else "sum", sparse=True, include_last_offset=True
    )
    nn.init.uniform_(table.weight, -0.2, 0.2)
    optimizer = FrequencySGD(table.parameters(), lr=LR, **RULES[rule])
    whole = ReferenceTable(table.weight, ["f0"], "mean" if mean else "sum", **RULES[rule])
    reference = ReferenceModel({"a": whole}, LR)
    for _ in range(80):  # so that some are not sampled
        features = make_batch(rng, [spec], 5)
        kjt = to_kjt(features)
        optimizer.zero_grad()
        sample_loss({"f0": table(kjt.values(), kjt.offsets().long())}).mean().backward()
        optimizer.step()
        reference.step(features, lambda outputs: sample_loss(outputs).mean())
    torch.testing.assert_close(table.weight.detach().double(), whole.weight, rtol=0, atol=1e-6)
    state = optimizer.state[table.weight]
    assert state["row_counter"].tolist() == whole.count_tensor().tolist()
    totals = [3.0, whole.squares, whole.total, whole.steps]
    assert state["table_totals"].tolist() == pytest.approx(totals, rel=1e-5)
    assert int(state["row_counter_age"]) == whole.age
    sums = [float(whole.sums.get(row, torch.zeros(1))[0]) for row in range(12)]
    assert state["momentum1"].tolist() == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
def test_frozen_counts(sparse: bool) -> None:
    """Of a dense gradient too, which does not say how often a row occurred."""
    table = nn.Embedding(6, 4, sparse=sparse)
    optimizer = FrequencySGD(table.parameters(), lr=0.1, normalize=None, count="frozen")
    table(torch.tensor([0, 0, 3])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="frozen"):
        optimizer.step()
    assert torch.equal(table.weight, before)
    frozen = torch.tensor([4, 1, 0, 0, 0, 9], dtype=torch.int32)
    optimizer.state[table.weight]["row_counter"].copy_(frozen)
    optimizer.step()
    moved = (before - table.weight.detach())[:, 0]
    torch.testing.assert_close(moved, torch.tensor([0.1, 0, 0, 0.1, 0, 0]), rtol=1e-5, atol=1e-7)
    assert torch.equal(optimizer.state[table.weight]["row_counter"], frozen)


def test_gradients_that_hide_what_the_rule_needs() -> None:
    table = nn.Embedding(6, 4)
    table(torch.tensor([1, 1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse=True"):
        FrequencySGD(table.parameters(), lr=0.1).step()
    table = nn.Embedding.from_pretrained(before.clone(), freeze=False, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    table.weight.grad = table.weight.grad.coalesce()
    FrequencySGD(table.parameters(), lr=0.0).step()  # one row: as one lookup makes it
    table(torch.tensor([1, 2, 2])).sum().backward()
    table.weight.grad = table.weight.grad.coalesce()
    with pytest.raises(RuntimeError, match="coalesce"):
        FrequencySGD(table.parameters(), lr=0.1).step()
    assert torch.equal(table.weight.detach(), before)


def test_groups_and_closure() -> None:
    slow, fast = (nn.Embedding(3, 2, sparse=True) for _ in range(2))
    for table in (slow, fast):
        nn.init.zeros_(table.weight)
    optimizer = FrequencySGD(
        [{"params": slow.parameters(), "lr": 0.1}, {"params": fast.parameters()}],
        lr=1.0,
        normalize=None,
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = slow(torch.tensor([1])).sum() + fast(torch.tensor([1])).sum()
        value.backward()
        return float(value.detach())

    assert optimizer.step(closure) == 0.0
    assert slow.weight[1].tolist() == pytest.approx([-0.1, -0.1])
    assert fast.weight[1].tolist() == [-1.0, -1.0]


def make(**options: Any) -> tuple[nn.Embedding, FrequencySGD]:
    torch.manual_seed(0)
    table = nn.Embedding(10, 4, sparse=True)
    return table, FrequencySGD(table.parameters(), lr=0.1, **options)


def train(table: nn.Embedding, optimizer: FrequencySGD, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        table(torch.tensor([step % 6, 1, 2, 2])).square().sum().backward()
        optimizer.step()


def moved_by(route: str, table: nn.Embedding, optimizer: FrequencySGD) -> Any:
    """The table and its optimizer, or others with their state."""
    if route == "deepcopy":
        return copy.deepcopy((table, optimizer))
    if route == "pickle":
        return pickle.loads(pickle.dumps((table, optimizer)))
    other, resumed = make(half_life=3)
    other.load_state_dict(table.state_dict())
    if route == "distributed":
        state = copy.deepcopy(get_optimizer_state_dict(table, optimizer))
        set_optimizer_state_dict(other, resumed, optim_state_dict=state)
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file))
    return other, resumed


@pytest.mark.parametrize("route", ["file", "distributed", "deepcopy", "pickle"])
def test_state_round_trip(route: str) -> None:
    """Interrupted training goes on as if it had not been; counts beyond float32 stay exact."""
    whole, through = make(half_life=3)
    train(whole, through, range(3))
    through.state[whole.weight]["row_counter"][5] = 2**24 + 1
    other, resumed = moved_by(route, whole, through)
    train(whole, through, range(3, 9))
    train(other, resumed, range(3, 9))
    assert torch.equal(other.weight, whole.weight)
    for key, value in through.state[whole.weight].items():
        assert torch.equal(value, resumed.state[other.weight][key])
        assert value.dtype == resumed.state[other.weight][key].dtype


BROKEN: dict[str, tuple[str, Any, str]] = {
    "NaN": ("row_counter", torch.full((10,), torch.nan), "whole"),
    "negative": ("row_counter", torch.full((10,), -1), "-1"),
    "too large": ("row_counter", torch.full((10,), 2**40), str(2**40)),
    "one row": ("row_counter", torch.ones(1, dtype=torch.int32), "10 rows"),
    "totals": ("table_totals", torch.tensor([2.0, -1.0, 1.0, 1.0]), "at least 0"),
    "format": ("table_totals", torch.tensor([4.0, 1.0, 1.0, 1.0]), "format 3"),
    "age": ("row_counter_age", torch.tensor([-1]), "at least 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_state_is_refused(case: str) -> None:
    key, value, message = BROKEN[case]
    table, optimizer = make()
    train(table, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(state)
    state["state"][0][key] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    for name, kept in optimizer.state_dict()["state"][0].items():
        assert torch.equal(kept, before["state"][0][name])
    adagrad = torch.optim.Adagrad(table.parameters())
    with pytest.raises(ValueError, match="neither row_counter nor momentum1"):
        optimizer.load_state_dict(adagrad.state_dict())


OTHERS: dict[str, dict[str, Any]] = {
    "version 0.2": {
        "row_counter": torch.tensor([0, 6, 1] + [0] * 7, dtype=torch.int32),
        "table_totals": torch.tensor([2.0, 3.5, 7.0, 7.0], dtype=torch.float64),
        "row_counter_age": torch.tensor([2]),
    },
    "row-wise Adagrad": {"momentum1": torch.tensor([0.0, 3.0, 0.5] + [0.0] * 7)},
}


@pytest.mark.parametrize("whose", OTHERS)
def test_states_of_others_load(whose: str) -> None:
    """The rates that they had go on, and the table predicts about each row's own sum."""
    table, optimizer = make()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: OTHERS[whose]}})
    state = optimizer.state[table.weight]
    assert state["momentum1"].tolist() == [0.0, 3.0, 0.5] + [0.0] * 7  # of 0.2: G c / C
    counts = state["row_counter"].tolist()
    if whose == "version 0.2":
        assert counts == OTHERS[whose]["row_counter"].tolist()
        assert state["table_totals"].tolist() == [3.0, 3.5, 7.0, 2.0]
    _, squares, total, _ = state["table_totals"].tolist()
    predicted = [squares / total * count for count in counts]
    assert predicted == pytest.approx(state["momentum1"].tolist(), rel=2e-3)
    before = table.weight.detach().clone()
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    moved = (before - table.weight.detach())[1, 0]
    assert float(moved) == pytest.approx(0.1 / math.sqrt(3.0 + 1.0), rel=0.05)


def test_a_masked_lookup_counts() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = FrequencySGD(table.parameters(), lr=0.1)
    output = table(torch.tensor([1, 1, 2]))
    (output * torch.tensor([[1.0], [0.0], [0.0]])).sum().backward()
    optimizer.step()
    state = optimizer.state[table.weight]
    assert state["row_counter"].tolist() == [0, 2, 1, 0]
    assert state["table_totals"].tolist() == [3.0, 1.0, 3.0, 1.0]
