"""Counters through checkpoints: any plan to any plan, any number of ranks, and what is refused."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import Pair, restore, state_of
from plans import WIDE_TABLES as TABLES
from plans import make_plan
from ranks import on_ranks, run_on_ranks
from torch.distributed.checkpoint.api import CheckpointException

from torchrec_freq import row_counts, table_states
from torchrec_freq.counts.row_state import RowShard, RowState

OPTIONS = {"half_life": 3}
GLOBAL_BATCH = 4
STEPS = 4

# (ranks, hosts) -> plans
LAYOUTS: dict[tuple[int, int], list[str]] = {
    (1, 1): ["table_wise", "four columns", "data_parallel"],
    (2, 1): ["table_wise", "row_wise", "column_wise", "four columns", "data_parallel", "mixed"],
    (4, 2): ["table_row_wise", "table_column_wise", "grid_shard", "row_wise", "four columns"],
}


def train_and_save(kind: str, ranks: int, folder: Path) -> None:
    pair = Pair(TABLES, make_plan(kind, TABLES, ranks), OPTIONS)
    for _ in range(STEPS):
        pair.step(per_rank=GLOBAL_BATCH // ranks)
    pair.check()
    dcp.save(state_of(pair.model), checkpoint_id=folder / f"{kind} {ranks}")
    columns = json.dumps(pair.model.column_shards)
    (folder / f"{kind} {ranks}" / "columns.json").write_text(columns)


def load_and_train(kind: str, ranks: int, folder: Path, part: slice) -> None:
    for source in sorted(folder.iterdir())[part]:
        pair = Pair(TABLES, make_plan(kind, TABLES, ranks), OPTIONS)
        pair.split_reference(json.loads((source / "columns.json").read_text()))
        for _ in range(STEPS):
            pair.step_reference(GLOBAL_BATCH)
        pair.split_reference(pair.model.column_shards)
        restore(pair.model, source)
        pair.check()
        # Through the next halving, at step 6.
        for _ in range(3):
            pair.step(per_rank=GLOBAL_BATCH // ranks)
        pair.check()


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_any_plan_to_any_plan(every: int, tmp_path: Path) -> None:
    """Every plan's checkpoint to every plan; or to every seventh, others for the next."""
    layouts = [(kind, *layout) for layout, kinds in LAYOUTS.items() for kind in kinds]
    for kind, ranks, hosts in layouts:
        arguments = {"kind": kind, "ranks": ranks, "folder": tmp_path}
        run_on_ranks(ranks, train_and_save, arguments, hosts=hosts)
    assert len(list(tmp_path.iterdir())) == len(layouts) == 14
    for number, (kind, ranks, hosts) in enumerate(layouts):
        part = {"part": slice((number + 1) % every, None, every)}
        arguments = {"kind": kind, "ranks": ranks, "folder": tmp_path}
        run_on_ranks(ranks, load_and_train, arguments | part, hosts=hosts)


@pytest.mark.parametrize("kind", ["row_wise", "column_wise", "table_wise"])
@on_ranks(2)
def test_through_a_model_with_dtensors(kind: str, tmp_path: Path) -> None:
    first = Pair(TABLES, make_plan("mixed", TABLES, 2), OPTIONS)
    first.step()
    dcp.save(state_of(first.model), checkpoint_id=tmp_path / "first")
    second = Pair(TABLES, make_plan(kind, TABLES, 2), OPTIONS, dtensor=True)
    restore(second.model, tmp_path / "first")
    second.go_on(first)
    second.step()
    dcp.save(state_of(second.model), checkpoint_id=tmp_path / "second")
    third = Pair(TABLES, make_plan("four columns", TABLES, 2), OPTIONS)
    restore(third.model, tmp_path / "second")
    third.go_on(second)
    third.check()
    third.step()
    third.check()


@on_ranks(2)
def test_each_row_is_saved_once(tmp_path: Path) -> None:
    pair = Pair(TABLES, make_plan("four columns", TABLES, 2), OPTIONS)
    pair.step()
    dcp.save(state_of(pair.model), checkpoint_id=tmp_path)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    key = "optimizer.state.embedding_bags.a.weight.a.row_counter"
    stored: Any = metadata.state_dict_metadata[key]
    assert stored.size == torch.Size([12]) and len(stored.chunks) == 1
    assert stored.properties.dtype == torch.int32


@pytest.mark.parametrize("kind", ["row_wise", "four columns", "data_parallel"])
@on_ranks(2)
def test_torch_save_and_deepcopy(kind: str) -> None:
    pair = Pair(TABLES, make_plan(kind, TABLES, 2), OPTIONS)
    for _ in range(2):
        pair.step()
    optimizer = pair.model.fused_optimizer
    file = io.BytesIO()
    torch.save(optimizer.state_dict()["state"], file)
    file.seek(0)
    saved = {"state": torch.load(file, weights_only=False)}  # TorchRec's tensors of shards need it
    copied = copy.deepcopy(optimizer.state_dict())
    states = table_states(pair.model)
    for state in (saved, copied):
        pair.step()
        optimizer.load_state_dict(state)
        for name, now in table_states(pair.model).items():
            assert torch.equal(now.counts, states[name].counts) and now.age == 2
            assert torch.equal(now.sums, states[name].sums)
            assert torch.equal(now.totals, states[name].totals)


@on_ranks(2)
def test_a_ranks_file_does_not_fit_another_plan() -> None:
    saved = Pair(TABLES, make_plan("row_wise", TABLES, 2)).model.fused_optimizer.state_dict()
    optimizer = Pair(TABLES, make_plan("table_wise", TABLES, 2)).model.fused_optimizer
    for key in saved["state"].keys() - optimizer.state_dict()["state"].keys():
        del saved["state"][key]
    with pytest.raises(ValueError, match=r"another sharding plan.*distributed\.checkpoint"):
        optimizer.load_state_dict(saved)


@on_ranks(2)
def test_whole_tensors_fit_every_plan() -> None:
    """As a tool writes that gathers a checkpoint into plain tensors."""
    optimizer = Pair(TABLES, make_plan("four columns", TABLES, 2)).model.fused_optimizer
    state = optimizer.state_dict()
    whole = {t.name: torch.arange(t.rows, dtype=torch.int32) for t in TABLES}
    for states in state["state"].values():
        for key in states:
            if key.endswith(".row_counter"):
                states[key] = whole[key.split(".")[0]]
    pair = Pair(TABLES, make_plan("four columns", TABLES, 2))
    pair.model.fused_optimizer.load_state_dict(state)
    for name, counts in row_counts(pair.model).items():
        assert torch.equal(counts, whole[name].long())


@on_ranks(2)
def test_states_of_other_optimizers_and_of_version_0_1_are_refused(tmp_path: Path) -> None:
    pair = Pair(TABLES, make_plan("row_wise", TABLES, 2))
    sgd = Pair(TABLES, make_plan("row_wise", TABLES, 2), optimizer=torch.optim.SGD)
    old = copy.deepcopy(pair.model.fused_optimizer.state_dict())
    for states in old["state"].values():
        for key in [key for key in states if not key.endswith("row_counter")]:
            del states[key]
            states[f"{key.split('.')[0]}.table_scale"] = torch.zeros(4, dtype=torch.float64)
    for number, (state, message) in enumerate(
        [
            (sgd.model.fused_optimizer.state_dict(), "neither row_counter nor momentum1"),
            (old, r"is of torchrec_freq 0\.1"),
        ]
    ):
        with pytest.raises(ValueError, match=rf"of '[abc]'.*{message}.*load_row_counts"):
            pair.model.fused_optimizer.load_state_dict(state)
        dcp.save({"optimizer": state}, checkpoint_id=tmp_path / str(number))
        with pytest.raises(CheckpointException, match="Missing key"):
            wanted = {"optimizer": pair.model.fused_optimizer.state_dict()}
            dcp.load(wanted, checkpoint_id=tmp_path / str(number))
    # The weights alone load, and the counts start from zero.
    dcp.save({"model": sgd.model.state_dict()}, checkpoint_id=tmp_path / "weights")
    dcp.load({"model": pair.model.state_dict()}, checkpoint_id=tmp_path / "weights")
    pair.step()
    pair.check()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("row_counter", -1, "-1"),
        ("row_counter", 2**30 + 1, str(2**30 + 1)),
        ("table_totals", torch.tensor([2.0, torch.nan, 1.0, 1.0]), "finite"),
        ("table_totals", torch.tensor([7.0, 1.0, 1.0, 1.0]), "format 3"),
        ("row_counter_age", -3, "-3"),
    ],
)
@on_ranks(1)
def test_a_damaged_state_is_refused(key: str, value: Any, message: str) -> None:
    pair = Pair(TABLES, make_plan("table_wise", TABLES, 1))
    pair.step()
    optimizer = pair.model.fused_optimizer
    state = copy.deepcopy(optimizer.state_dict())
    states = state["state"]["embedding_bags.c.weight"]
    if isinstance(value, int):
        parts = states[f"c.{key}"]
        for part in [s.tensor for s in parts.shards] if hasattr(parts, "shards") else [parts]:
            part[0] = value
    else:
        states[f"c.{key}"] = value
    with pytest.raises(ValueError, match=f"'c'.*{message}"):
        optimizer.load_state_dict(state)
    pair.step()
    pair.check()


@on_ranks(1)
def test_counts_above_two_billion_rows() -> None:
    """Offsets as far as metadata goes: no table of that size is allocated."""
    rows = 2**33
    shards = [
        RowShard(start, True, torch.empty(2**32, dtype=torch.int32, device="meta"))
        for start in (0, 2**32)
    ]
    state = RowState(rows, shards)
    assert state.shape == (rows,)
    items = state.__create_write_items__("key", state)
    chunks = state.__create_chunk_list__()
    assert [tuple(item.index.offset or ()) for item in items] == [(0,), (2**32,)]
    assert [(tuple(c.offsets), tuple(c.sizes)) for c in chunks] == [
        ((0,), (2**32,)),
        ((2**32,), (2**32,)),
    ]


@on_ranks(1)
def test_arithmetic_is_refused() -> None:
    state = RowState(4, [RowShard(0, True, torch.zeros(4, dtype=torch.int32))])
    with pytest.raises(NotImplementedError, match="row_counts"):
        state + 1
