"""What a trainer does with state: roll back, take over, hand back, change some rows, ask alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import (
    LR,
    TABLES,
    Pair,
    full_weights,
    make_batch,
    make_collection,
    restore,
    sample_loss,
    set_weights,
    shard,
    state_of,
    to_kjt,
)
from plans import FOUR_RANKS, WIDE_TABLES, make_plan
from ranks import on_ranks, run_on_ranks
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_freq import (
    FrequencySGD,
    TableState,
    adagrad_sums,
    evict_rows,
    load_adagrad_sums,
    load_row_counts,
    load_table_states,
    row_counts,
    table_states,
)

PLANS = ["table_wise", "row_wise", "column_wise", "data_parallel"]
ROWWISE_PLANS = ["table_wise", "row_wise", "column_wise"]  # TorchRec's has no data-parallel tables


def build(optimizer: Any, kind: str, tables: Any = TABLES, **options: Any) -> Any:
    """A sharded model; the same weights for every optimizer."""
    torch.manual_seed(0)
    collection = make_collection(tables)
    apply_optimizer_in_backward(optimizer, collection.parameters(), {"lr": LR, **options})
    weights = {t.name: collection.embedding_bags[t.name].weight.detach().clone() for t in tables}
    plan = make_plan(kind, tables, dist.get_world_size())
    return shard(collection, plan, EmbeddingBagCollectionSharder(), weights)


def train(model: Any, steps: range, tables: Any = TABLES, scale: float = 1.0) -> None:
    """The same batches for the same steps, whatever came before."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for step in steps:
        features = make_batch(random.Random(step), tables, 4 * ranks)
        local = to_kjt(features, slice(4 * rank, 4 * rank + 4))
        (scale * sample_loss(model(local).to_dict()).mean()).backward()


@torch.no_grad()
def held_out_loss(model: Any, tables: Any = TABLES) -> float:
    features = make_batch(random.Random(-1), tables, 256)
    loss = sample_loss(model(to_kjt(features)).to_dict()).mean()
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()


def same_weights(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# A state dict that was made once serves every later save and load.


def roll_back(kind: str, folder: Path) -> None:
    model = build(FrequencySGD, kind, half_life=4)
    state = state_of(model)
    train(model, range(5))
    dcp.save(state, checkpoint_id=folder)
    train(model, range(5, 8))
    wanted = full_weights(model)
    train(model, range(8, 11), scale=50.0)
    assert not same_weights(wanted, full_weights(model))
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    model.fused_optimizer.load_state_dict(state["optimizer"])
    train(model, range(5, 8))
    assert same_weights(wanted, full_weights(model))
    if dist.get_rank() == 0:
        torch.save(wanted, folder / "wanted.pt")


def resume(kind: str, folder: Path) -> None:
    model = build(FrequencySGD, kind, half_life=4)
    restore(model, folder)
    train(model, range(5, 8))
    assert same_weights(torch.load(folder / "wanted.pt"), full_weights(model))


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_rollback_with_an_old_state_dict(ranks: int, kind: str, tmp_path: Path) -> None:
    run_on_ranks(ranks, roll_back, {"kind": kind, "folder": tmp_path})
    run_on_ranks(ranks, resume, {"kind": kind, "folder": tmp_path})


@on_ranks(2)
def test_loading_in_place_is_enough() -> None:
    """Row-wise Adagrad's state needs no load_state_dict after dcp.load; nor does ours."""
    model = build(FrequencySGD, "row_wise")
    state = model.fused_optimizer.state_dict()
    train(model, range(3))
    before = table_states(model)
    copies = {
        key: {k: v.clone() for k, v in t.items() if k.endswith("totals")}
        for key, t in state["state"].items()
    }
    train(model, range(3, 5))
    for key, tensors in copies.items():
        for name, saved in tensors.items():
            state["state"][key][name].copy_(saved)
    for name, now in table_states(model).items():
        assert torch.equal(now.totals, before[name].totals)
    ((_, handle),) = [
        (p, m._frequency_tables)
        for p, m in model.named_modules()
        if "_frequency_tables" in m.__dict__
    ]
    values = handle.totals.values
    torch.testing.assert_close(handle.totals.rho(), (values[:, 1] / values[:, 2]).float())


@on_ranks(2)
def test_one_rank_alone_may_ask() -> None:
    model = build(FrequencySGD, "row_wise")
    train(model, range(3))
    if dist.get_rank() == 0:
        state = model.fused_optimizer.state_dict()["state"]
        totals = {k: v for t in state.values() for k, v in t.items() if "totals" in k}
        assert len(totals) == len(TABLES)
        assert all(int(values[3]) == 3 for values in totals.values())
    train(model, range(3, 5))
    for name, state in table_states(model).items():
        assert int(state.counts.sum()) == int(state.totals[2]), name


# Row-wise Adagrad's checkpoints load, and ours into it.


def adopt(kind: str, there: bool, folder: Path) -> None:
    """Trains, switches the optimizer through a checkpoint, and compares with not switching."""
    first, second = (RowWiseAdagrad, FrequencySGD) if there else (FrequencySGD, RowWiseAdagrad)
    stays, switches = build(first, kind), build(second, kind)
    train(stays, range(40))
    dcp.save(state_of(stays), checkpoint_id=folder)
    restore(switches, folder)
    assert same_weights(full_weights(stays), full_weights(switches))
    for model in (stays, switches):
        train(model, range(40, 50))
    assert held_out_loss(switches) == pytest.approx(held_out_loss(stays), abs=5e-4)
    if there:
        counts, sums = row_counts(switches), adagrad_sums(switches)
        for name, counts_R in counts.items():
            assert bool(((counts_R > 0) == (sums[name] > 0)).all())


@pytest.mark.parametrize("there", [True, False], ids=["from Adagrad", "to Adagrad"])
@pytest.mark.parametrize("kind", ROWWISE_PLANS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_row_wise_adagrads_checkpoints(ranks: int, kind: str, there: bool, tmp_path: Path) -> None:
    run_on_ranks(ranks, adopt, {"kind": kind, "there": there, "folder": tmp_path})


@on_ranks(2)
def test_of_prior_count_0_a_taken_over_run_goes_on_exactly(tmp_path: Path) -> None:
    stays = build(RowWiseAdagrad, "column_wise")
    switches = build(FrequencySGD, "column_wise", prior_count=0)
    train(stays, range(5))
    dcp.save(state_of(stays), checkpoint_id=tmp_path)
    restore(switches, tmp_path)
    for model in (stays, switches):
        train(model, range(5, 9))
    assert same_weights(full_weights(stays), full_weights(switches))


@on_ranks(2)
def test_a_state_of_version_0_2(tmp_path: Path) -> None:
    """Counts and totals alone: each row's sum is its share."""
    pair = build(FrequencySGD, "row_wise")
    train(pair, range(3))
    old = pair.fused_optimizer.state_dict()
    for states in old["state"].values():
        for key in list(states):
            if key.endswith("momentum1"):
                del states[key]
            elif key.endswith("table_totals"):
                states[key] = torch.tensor([2.0, 30.0, 60.0, 50.0], dtype=torch.float64)
    dcp.save({"optimizer": old}, checkpoint_id=tmp_path)
    for by_dcp in (True, False):
        model = build(FrequencySGD, "row_wise")
        state = {"optimizer": model.fused_optimizer.state_dict()} if by_dcp else {"optimizer": old}
        if by_dcp:
            dcp.load(state, checkpoint_id=tmp_path)
        model.fused_optimizer.load_state_dict(state["optimizer"])
        for name, table in table_states(model).items():
            assert table.totals.tolist() == [3.0, 30.0, 60.0, 3.0]
            assert torch.equal(table.counts, table_states(pair)[name].counts)
            torch.testing.assert_close(table.row_sums(), table.counts * 0.5)


@on_ranks(2)
def test_sums_by_hand() -> None:
    """With lookups the counts sum up to them; without, rows keep Adagrad's rates."""
    model = build(FrequencySGD, "mixed")
    sums = {t.name: torch.linspace(0, 3, t.rows) for t in TABLES}
    load_adagrad_sums(model, sums, {"a": 5000})
    for name, sums_R in adagrad_sums(model).items():
        torch.testing.assert_close(sums_R, sums[name])
    counts = row_counts(model)
    torch.testing.assert_close(counts["a"].sum(), torch.tensor(5000), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        counts["c"][1:].double().mean(), torch.tensor(1000.0).double(), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        counts["a"] / counts["a"].sum(), sums["a"] / sums["a"].sum(), rtol=0, atol=1e-4
    )
    for wrong, message in (
        ({"x": sums["a"]}, "'x'"),
        ({"a": sums["b"]}, "12 rows"),
        ({"a": -sums["a"]}, "at least 0"),
        ({"a": sums["a"] * torch.nan}, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adagrad_sums(model, wrong)


# What is done to some rows changes no other row.


@pytest.mark.parametrize("how", ["counts", "evicted"])
@pytest.mark.parametrize("kind", PLANS)
@on_ranks(2)
def test_other_rows_go_on_as_if_nothing_had_happened(kind: str, how: str) -> None:
    touched, untouched = build(FrequencySGD, kind), build(FrequencySGD, kind)
    for model in (touched, untouched):
        train(model, range(6))
    counts = row_counts(touched)
    frequent = {name: counts_R.argsort(descending=True)[:2] for name, counts_R in counts.items()}
    assert sum(int(counts[n][rows].sum()) for n, rows in frequent.items()) > 0.3 * sum(
        int(c.sum()) for c in counts.values()
    )
    if how == "counts":
        zeroed = {n: c.index_fill(0, frequent[n], 0) for n, c in counts.items()}
        load_row_counts(touched, zeroed)
    else:
        evict_rows(touched, frequent, reset=torch.nn.init.zeros_)
        for name, whole in full_weights(touched).items():
            assert not whole[frequent[name]].any()
        # The loss must stay what it was for the others' gradients to be.
        weights = full_weights(untouched)
        configs = make_collection(TABLES).embedding_bag_configs()
        torch.manual_seed(7)
        evict_rows(touched, {config.name: frequent[config.name] for config in configs})
        fresh = full_weights(touched)
        torch.manual_seed(7)
        for config in configs:
            wanted = torch.zeros(2, config.embedding_dim)
            if dist.get_rank() == 0:
                assert config.init_fn is not None
                config.init_fn(wanted)
                assert torch.equal(fresh[config.name][frequent[config.name]], wanted)
        set_weights(touched, weights)
    for name, state in table_states(touched).items():
        assert not state.counts[frequent[name]].any() and not state.sums[frequent[name]].any()
    for model in (touched, untouched):
        train(model, range(6, 7))
    a, b = full_weights(touched), full_weights(untouched)
    for name, rows in frequent.items():
        others = torch.ones(len(a[name]), dtype=torch.bool).index_fill(0, rows, False)
        assert torch.equal(a[name][others], b[name][others])
        assert not torch.equal(a[name][rows], b[name][rows])


@on_ranks(2)
def test_wrong_rows_are_refused() -> None:
    model = build(FrequencySGD, "row_wise")
    train(model, range(2))
    before = row_counts(model)
    for rows, message in (
        ({"x": torch.tensor([1])}, "'x'"),
        ({"a": torch.tensor([12])}, "12 rows; got row 12"),
        ({"b": torch.tensor([1]), "a": torch.tensor([-1])}, "row -1"),
        ({"a": torch.tensor([1, 1])}, "twice"),
        ({"a": torch.tensor([1.0])}, "whole"),
    ):
        with pytest.raises(ValueError, match=message):
            evict_rows(model, rows)
    assert same_weights(before, row_counts(model))


# Whole tables.


def move(kind: str, other: str, folder: Path) -> None:
    tables = WIDE_TABLES
    source, target = build(FrequencySGD, kind, tables), build(FrequencySGD, other, tables)
    train(source, range(6), tables)
    states = table_states(source)
    set_weights(target, full_weights(source))
    load_table_states(target, states)
    for name, state in table_states(target).items():
        assert torch.equal(state.counts, states[name].counts)
        torch.testing.assert_close(state.row_sums(), states[name].row_sums())
        assert torch.equal(state.totals, states[name].totals) and state.age == 6
    if kind == other:
        for model in (source, target):
            train(model, range(6, 9), tables)
        assert same_weights(full_weights(source), full_weights(target))


@pytest.mark.parametrize("kind", [*PLANS, "mixed"])
@on_ranks(2)
def test_table_states_under_every_plan(kind: str) -> None:
    move(kind, kind, Path())
    move(kind, "row_wise", Path())


@pytest.mark.parametrize("kind", FOUR_RANKS)
@on_ranks(4, hosts=2)
def test_table_states_on_two_hosts(kind: str) -> None:
    move(kind, kind, Path())


@on_ranks(2)
def test_wrong_states_are_refused() -> None:
    model = build(FrequencySGD, "row_wise")
    train(model, range(2))
    before = table_states(model)
    good = before["a"]
    for wrong, message in (
        ({"x": good}, "'x'"),
        ({"b": good}, "'b' has 7 rows"),
        ({"a": TableState(good.counts, good.sums[:3], good.totals)}, "sums of shape"),
        ({"a": TableState(-good.counts, good.sums, good.totals)}, "'a'.*counts"),
        ({"a": TableState(good.counts, good.sums, good.totals * torch.nan)}, "'a'.*finite"),
    ):
        with pytest.raises(ValueError, match=message):
            load_table_states(model, wrong)
    assert torch.equal(table_states(model)["a"].counts, good.counts)


@pytest.mark.parametrize("kind", [*PLANS, "mixed"])
@on_ranks(2)
def test_a_rank_without_a_table_takes_part(kind: str) -> None:
    """Its steps and exchanges are those of the others."""
    tables = [t for t in TABLES if t.name == "a"]
    plan = {"a": make_plan(kind, tables, 2)["a"]}
    pair = Pair(tables, plan)
    for _ in range(3):
        pair.step()
    pair.check()
