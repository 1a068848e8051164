"""``FrequencySGD.step()`` on tables that are not sharded."""

from __future__ import annotations

import copy
import io
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
    "full": {"min_count": 1},
    "paper": {"coherence": 0.0, "min_count": 1, "normalize": None},
    "batches": {"count": "batches", "coherence": 0.0, "min_count": 1, "normalize": None},
    "half-life": {"half_life": 2, "min_count": 2},
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
    whole.outputs_are_lookups = True
    reference = ReferenceModel({"a": whole}, LR)
    for _ in range(6):
        features = make_batch(rng, [spec], 5)
        kjt = to_kjt(features)
        optimizer.zero_grad()
        sample_loss({"f0": table(kjt.values(), kjt.offsets().long())}).mean().backward()
        optimizer.step()
        reference.step(features, lambda outputs: sample_loss(outputs).mean())
        torch.testing.assert_close(
            table.weight.detach().double(), reference.tables["a"].weight, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("sparse", [False, True])
def test_dense_presence_equals_sparse(sparse: bool) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(6, 4, sparse=sparse)
    nn.init.constant_(table.weight, 0.5)
    optimizer = FrequencySGD(
        table.parameters(), lr=0.1, count="batches", coherence=0, min_count=1, normalize=None
    )
    for ids in ([0, 0, 3], [3, 4], [0]):
        optimizer.zero_grad()
        table(torch.tensor(ids)).sum().backward()
        optimizer.step()
    by_hand = 0.5 - 0.1 * torch.tensor([2 + 2**-0.5, 0, 0, 1 + 2**-0.5, 1, 0])
    torch.testing.assert_close(table.weight.detach(), by_hand.unsqueeze(1).expand(6, 4))


def test_gradients_that_hide_what_the_rule_needs() -> None:
    table = nn.Embedding(6, 4)
    table(torch.tensor([1, 1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse=True"):
        FrequencySGD(table.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="normalize=None"):
        FrequencySGD(table.parameters(), lr=0.1, count="batches").step()
    table = nn.Embedding.from_pretrained(before.clone(), freeze=False, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    table.weight.grad = table.weight.grad.coalesce()
    FrequencySGD(table.parameters(), lr=0.0, normalize=None).step()  # one row: nothing to lose
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
        coherence=0,
        min_count=1,
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


@pytest.mark.parametrize("route", ["state_dict", "file", "distributed"])
def test_state_round_trip(route: str) -> None:
    """Interrupted training goes on as if it had not been; counts beyond float32 stay exact."""

    def make() -> tuple[nn.EmbeddingBag, FrequencySGD]:
        torch.manual_seed(0)
        table = nn.EmbeddingBag(6, 4, mode="sum", sparse=True)
        return table, FrequencySGD(table.parameters(), lr=0.1, half_life=3)

    def train(table: nn.EmbeddingBag, optimizer: FrequencySGD, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            ids = torch.tensor([[step % 6, 1], [2, 2]])
            table(ids).square().mean().backward()
            optimizer.step()

    whole, through = make()
    train(whole, through, range(3))
    through.state[whole.weight]["row_counter"][5] = 2**24 + 1
    train(whole, through, range(3, 5))
    saved = copy.deepcopy(through.state_dict())
    weight = whole.weight.detach().clone()
    train(whole, through, range(5, 9))

    other, resumed = make()
    with torch.no_grad():
        other.weight.copy_(weight)
    if route == "file":
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file)
    if route == "distributed":
        stopped, before = make()
        before.load_state_dict(saved)
        state = get_optimizer_state_dict(stopped, before)
        set_optimizer_state_dict(other, resumed, optim_state_dict=copy.deepcopy(state))
    else:
        resumed.load_state_dict(saved)
    train(other, resumed, range(5, 9))
    assert torch.equal(other.weight, whole.weight)
    for key, value in through.state[whole.weight].items():
        assert torch.equal(value, resumed.state[other.weight][key])
        assert value.dtype == resumed.state[other.weight][key].dtype


def test_state_of_another_optimizer_is_refused() -> None:
    table = nn.Embedding(3, 2, sparse=True)
    adagrad = torch.optim.Adagrad(table.parameters())
    optimizer = FrequencySGD(table.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="row_counter"):
        optimizer.load_state_dict(adagrad.state_dict())


def test_options_of_a_group_are_checked() -> None:
    table = nn.Embedding(3, 2)
    group = {"params": table.parameters(), "coherence": -1}
    with pytest.raises(ValueError, match="coherence"):
        FrequencySGD([group], lr=0.1)
