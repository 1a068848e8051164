"""What is stored of tables: every plan, optimizer and version; damage, and what is made to harm."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import Pair, state_of
from plans import WIDE_TABLES, make_plan
from ranks import run_on_ranks
from safetensors.torch import save_file
from torch import Tensor
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_freq import (
    COUNT_CEILING,
    load_table_states,
    read_table_states,
    save_counts,
    table_states,
)
from torchrec_freq.counts.row_state import RowShard, RowState
from torchrec_freq.counts.stored import open_stored

# Of DCP, which saves here without a process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STEM = "optimizer.state.embedding_bags.a.weight.a"
KEY = f"{STEM}.row_counter"


def save(folder: Path, state: Mapping[str, Any]) -> Path:
    dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    return folder


def read(path: Path) -> None:
    """All there is of a file or folder."""
    for table in open_stored(path):
        for _ in table.blocks():
            pass


# What runs have saved.

LAYOUTS: dict[tuple[int, int], list[str]] = {
    (1, 1): ["table_wise", "data_parallel"],
    (2, 1): ["row_wise", "column_wise", "unequal columns", "data_parallel"],
    (4, 2): ["row_wise", "table_row_wise", "table_column_wise", "grid_shard", "four columns"],
}


def momenta(model: Any) -> dict[str, Tensor]:
    """Row-wise Adagrad's sums [rows, column shards] of whole tables, on every rank."""
    found = {}
    for spec in WIDE_TABLES:
        states = model.fused_optimizer.state_dict()["state"]
        state = states.get(f"embedding_bags.{spec.name}.weight", {}).get(f"{spec.name}.momentum1")
        size = torch.tensor(0 if state is None else state.metadata().size[0])
        dist.all_reduce(size, dist.ReduceOp.MAX)
        whole = torch.zeros(int(size))
        for part in [] if state is None else state.local_shards():
            first = part.metadata.shard_offsets[0]
            whole[first : first + len(part.tensor)] = part.tensor
        dist.all_reduce(whole)
        found[spec.name] = whole.view(-1, spec.rows).T
    return found


def check_plans(kinds: list[str], folder: Path) -> None:
    for kind in kinds:
        plan = make_plan(kind, WIDE_TABLES, dist.get_world_size())
        pair = Pair(WIDE_TABLES, plan)
        for _ in range(3):
            pair.step()
        dcp.save(state_of(pair.model), checkpoint_id=folder / kind)
        stored, live = read_table_states(folder / kind), table_states(pair.model)
        assert list(stored) == list(live)
        for name, state in live.items():
            torch.testing.assert_close(vars(stored[name]), vars(state), rtol=0, atol=0)
        other = Pair(WIDE_TABLES, make_plan("table_wise", WIDE_TABLES, dist.get_world_size()))
        load_table_states(other.model, stored)
        for name, state in table_states(other.model).items():
            torch.testing.assert_close(state.row_sums(), live[name].row_sums())
            assert torch.equal(state.counts, live[name].counts)

        if kind == "data_parallel":  # TorchRec trains no such table with row-wise Adagrad
            continue
        pair = Pair(WIDE_TABLES, plan, optimizer=RowWiseAdagrad)
        for _ in range(3):
            pair.step()
        dcp.save(state_of(pair.model), checkpoint_id=folder / f"{kind}.stock")
        sums = momenta(pair.model)
        for name, state in read_table_states(folder / f"{kind}.stock").items():
            assert torch.equal(state.sums, sums[name])
            assert not state.counts.any() and state.totals[1:].tolist() == [0, 0, 0]
            assert list(state.widths) == pair.model.column_shards.get(name, [])
        for table in open_stored(folder / f"{kind}.stock"):
            ((_, counts_R, sums_R),) = table.blocks()
            share = torch.tensor(pair.model.column_shards.get(table.name, [1])).float()
            assert counts_R is None and table.totals is None
            torch.testing.assert_close(sums_R, sums[table.name] @ (share / share.sum()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_plan_is_read(layout: tuple[int, int], tmp_path: Path) -> None:
    ranks, hosts = layout
    options = {"kinds": LAYOUTS[layout], "folder": tmp_path}
    run_on_ranks(ranks, check_plans, options, hosts=hosts)


def totals(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_versions(tmp_path: Path) -> None:
    counts = torch.tensor([COUNT_CEILING + 7, 3, 0], dtype=torch.int32)
    # 0.2: a row's sum is its share of the table's, by its count.
    old = {KEY: counts, f"{STEM}.table_totals": totals(2, 8, 4, 99)}
    old[f"{STEM}.row_counter_age"] = torch.tensor([6])
    folder = save(tmp_path / "0.2", old)
    (table,) = open_stored(folder)
    ((first, counts_R, sums_R),) = table.blocks()
    # A counter above the ceiling is read as the ceiling.
    assert (first, counts_R.tolist()) == (0, [COUNT_CEILING, 3, 0])  # type: ignore[union-attr]
    assert sums_R.tolist() == [2 * COUNT_CEILING, 6, 0]  # type: ignore[union-attr]
    state = read_table_states(folder)["a"]
    assert (state.totals[:3].tolist(), state.age) == ([3, 8, 4], 6)
    assert state.sums.flatten().tolist() == [2 * COUNT_CEILING, 6, 0]
    # 0.1: counts alone.
    folder = save(tmp_path / "0.1", {KEY: counts})
    (table,) = open_stored(folder)
    assert next(table.blocks())[2] is None and table.totals is None
    with pytest.raises(ValueError, match=r"0\.1: 'a' has no table_totals"):
        read_table_states(folder)
    later = save(tmp_path / "later", {KEY: counts, f"{STEM}.table_totals": totals(4, 1, 1, 1)})
    with pytest.raises(ValueError, match=r"table_totals is \[4.*Upgrade"):
        open_stored(later)


def test_a_file_of_counts(tmp_path: Path) -> None:
    save_counts(tmp_path / "counts", {"a": torch.tensor([1, 3]), "b": torch.ones(2)}, {"a": 8.0})
    with_squares, without = open_stored(tmp_path / "counts")
    assert with_squares.name == "a" and with_squares.totals is not None
    assert with_squares.totals[1:3].tolist() == [8, 4]
    ((_, counts_R, sums_R),) = with_squares.blocks()
    assert (counts_R.tolist(), sums_R.tolist()) == ([1, 3], [2, 6])  # type: ignore[union-attr]
    assert without.totals is None and next(without.blocks())[2] is None


def test_other_optimizers_are_left_out(tmp_path: Path) -> None:
    weights = {f"model.embedding_bags.{name}.weight": torch.rand(3, 2) for name in "abc"}
    adam = {STEM.replace("a.weight.a", "b.weight.b") + ".momentum1": torch.rand(3, 2)}
    folder = save(tmp_path / "both", {**weights, **adam, f"{STEM}.momentum1": torch.ones(3)})
    assert [table.name for table in open_stored(folder)] == ["a"]
    with pytest.raises(ValueError, match=r"without the state .*model\.fused_optimizer"):
        read_table_states(save(tmp_path / "one", {**weights, **adam}))


def test_names_of_tables_in_a_checkpoint(tmp_path: Path) -> None:
    def key(path: str, table: str, collection: str = "embedding_bags") -> str:
        return f"{path}{collection}.{table}.weight.{table}.row_counter"

    keys = {
        key("optimizer.state.", "cat_10"): "cat_10",
        key("optimizer.state.", "cat_9"): "cat_9",
        key("optimizer.state.model.user.ebc.", "id"): "model.user.ebc.id",
        key("optimizer.state.model.item.ebc.", "id"): "model.item.ebc.id",
        key("optimizer.state.seq.", "word", "embeddings"): "word",
        key("", "bare.name"): "bare.name",
        # What an optimizer that is not sharded has.
        "optim.state.net.emb.weight.row_counter": "optim.state.net.emb.weight",
        # The same table twice, by two optimizers that were saved.
        key("one.state.", "twin"): "one.state.embedding_bags.twin.weight.twin",
        key("two.state.", "twin"): "two.state.embedding_bags.twin.weight.twin",
    }
    state = {k: torch.tensor([i], dtype=torch.int32) for i, k in enumerate(keys)}
    stored = open_stored(save(tmp_path / "checkpoint", state))
    found = {t.name: int(next(t.blocks())[1].item()) for t in stored}  # type: ignore[union-attr]
    assert found == {name: i for i, name in enumerate(keys.values())}
    names = [table.name for table in stored]  # in the order of their numbers
    assert names.index("cat_10") == names.index("cat_9") + 1


def test_metadata_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a thousand ranks take seconds, and there is a part of each table for each."""
    parts = RowState(
        30, [RowShard(i, True, torch.arange(i, i + 10, dtype=torch.int32)) for i in (20, 0, 10)]
    )
    keys = (KEY, KEY.replace(".a", ".b"))
    folder = save(tmp_path / "checkpoint", dict.fromkeys(keys, parts))
    reads: list[Path] = []
    read_bytes = Path.read_bytes

    def reading(path: Path) -> bytes:
        reads.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    for table in open_stored(folder):
        ((_, counts_R, _),) = table.blocks()
        assert counts_R is not None and counts_R.tolist() == list(range(30))
    assert reads == [folder / ".metadata"]


# What is damaged, or made to do harm.


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sign),)


def change_metadata(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("whole", "asks for posix.mkdir"),
        ("planner_data", "asks for posix.mkdir"),
        ("storage_meta", "asks for posix.mkdir"),
        ("state_dict_metadata", "asks for posix.mkdir"),
        ("bytes", "table_totals is no tensor"),
        ("tensor", "cannot be read.*posix.mkdir"),
        ("relative", "damaged.*../other"),
    ],
)
def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path, where: str, message: str) -> None:
    folder, sign = tmp_path / "checkpoint", tmp_path / "sign"
    attack: Any = Attack(sign)
    state = {KEY: torch.arange(3, dtype=torch.int32)}
    state[f"{STEM}.table_totals"] = attack if where == "bytes" else totals(3, 1, 1, 1)
    save(folder, state)
    if where == "whole":
        (folder / ".metadata").write_bytes(pickle.dumps(attack))
    elif where == "state_dict_metadata":
        change_metadata(folder, lambda m: m.state_dict_metadata.update(x=attack))
    elif where == "tensor":
        torch.save([attack, "x" * 5000], folder / "__0_0.distcp")
        size = (folder / "__0_0.distcp").stat().st_size

        def point(metadata: Any) -> None:
            for key, info in metadata.storage_data.items():
                metadata.storage_data[key] = replace(info, offset=0, length=size)

        change_metadata(folder, point)
    elif where == "relative":  # a file of another folder
        torch.save(attack, tmp_path / "other")
        (info, *_) = pickle.loads((folder / ".metadata").read_bytes()).storage_data.values()
        elsewhere = replace(info, relative_path="../other")
        change_metadata(
            folder, lambda m: m.storage_data.update(dict.fromkeys(m.storage_data, elsewhere))
        )
    elif where != "bytes":
        change_metadata(folder, lambda m: setattr(m, where, attack))
    with pytest.raises(ValueError, match=message):
        read(folder)
    assert not sign.exists()


def test_metadata_that_promise_too_much(tmp_path: Path) -> None:
    folder, rows = tmp_path / "checkpoint", 10**15

    def grow(metadata: Any) -> None:
        stored = metadata.state_dict_metadata[KEY]
        stored.size = stored.chunks[0].sizes = torch.Size([rows])

    change_metadata(save(folder, {KEY: torch.arange(3, dtype=torch.int32)}), grow)
    with pytest.raises(ValueError, match=f"no place for {4 * rows} bytes"):
        read(folder)


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x04K\x01r" + (1 << 27).to_bytes(4, "little"),  # a place in a list of values: 2 GB
        b"\x80\x05\x96" + (1 << 30).to_bytes(8, "little"),  # bytes that would follow
    ],
)
def test_metadata_that_ask_for_memory(tmp_path: Path, pickled: bytes) -> None:
    folder = save(tmp_path / "checkpoint", {KEY: torch.arange(3, dtype=torch.int32)})
    (folder / ".metadata").write_bytes(pickled + b".")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="is damaged"):
            read(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 24


COUNTS = torch.arange(1000, dtype=torch.int32)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def split_off(path: Path) -> None:
    """A whole checkpoint in a folder below."""
    save(path / "whole", {KEY: COUNTS})


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file or folder"),
    "text": (lambda path: path.write_text("count,row\n" * 100), "truncated or not a safetensors"),
    "a model": (lambda path: save_file({"w": COUNTS}, path, {"format": "pt"}), "not one of counts"),
    "empty folder": (Path.mkdir, r"not a whole checkpoint.*no \.metadata"),
    "above": (split_off, r"not a whole.*Whole ones below it: .*/whole\."),
    "no counters": (lambda path: save(path, {"x": COUNTS}), r"no key that ends in \.row_counter"),
    "type": (lambda path: save(path, {KEY: COUNTS.float()}), "no tensor of 1 dim.*torch.int32"),
    "wide": (lambda path: save(path, {KEY: COUNTS.long()}), "no tensor of 1 dim.*torch.int32"),
    "negative": (lambda path: save(path, {KEY: COUNTS - 5}), "counts must lie in 0 to .* got -5"),
    "rows missing": (
        lambda path: save(path, {KEY: RowState(1000, [RowShard(0, True, COUNTS[:600])])}),
        "is not whole: its parts have 600 of 1000",
    ),
    "sums without weights": (
        lambda path: save(path, {f"{STEM}.momentum1": torch.ones(3)}),
        "'a' but not its weights.*Save both",
    ),
    "sums of another run": (
        lambda path: save(
            path,
            {f"{STEM}.momentum1": torch.ones(4), "m.embedding_bags.a.weight": torch.ones(3, 2)},
        ),
        "'a' has .*not of one run",
    ),
}
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated data": (
        lambda path: cut(path / "__0_0.distcp", 2000),
        "is truncated.*cannot be read.*Copy it again",
    ),
    "no data": (lambda path: (path / "__0_0.distcp").unlink(), "is missing.*cannot be read"),
    "other data": (
        lambda path: (path / "__0_0.distcp").write_bytes(b"x" * 9000),
        "cannot be read.*Copy the file again",
    ),
    "truncated metadata": (lambda path: cut(path / ".metadata", 50), r"\.metadata is damaged"),
    "foreign metadata": (
        lambda path: (path / ".metadata").write_bytes(pickle.dumps({"a": 1})),
        r"\.metadata is damaged.*Copy it again",
    ),
}


@pytest.mark.parametrize("what", [*BAD, *DAMAGE])
def test_bad_input_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "input"
    if what in DAMAGE:
        save(path, {KEY: COUNTS})
    do, message = {**BAD, **DAMAGE}[what]
    do(path)
    with pytest.raises((ValueError, OSError), match=f"(?s){message}") as caught:
        read(path)
    assert str(path) in str(caught.value)
