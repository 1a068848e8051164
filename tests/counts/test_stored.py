"""Stored counts as others left them: names of tables, damage, and what is made to do harm."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from torchrec_freq import COUNT_CEILING, save_counts
from torchrec_freq.counts.dcp_metadata import Reader
from torchrec_freq.counts.row_state import RowShard, RowState
from torchrec_freq.counts.stored import open_stored

# Of DCP, which saves here without a process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KEY = "optimizer.state.embedding_bags.a.weight.a.row_counter"


def save(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def read(path: Path) -> None:
    """All there is of a file or folder."""
    for table in open_stored(path):
        for _ in table.blocks():
            pass


def test_names_of_tables_in_a_checkpoint(tmp_path: Path) -> None:
    def key(path: str, table: str, collection: str = "embedding_bags") -> str:
        return f"{path}{collection}.{table}.weight.{table}.row_counter"

    keys = {
        key("optimizer.state.", "top"): "top",
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
    found = {table.name: next(table.blocks())[1].item() for table in stored}
    assert found == {name: i for i, name in enumerate(keys.values())}
    assert all(table.totals is None for table in stored)


def test_a_counter_above_the_ceiling_is_read_as_the_ceiling(tmp_path: Path) -> None:
    counts = torch.tensor([COUNT_CEILING + 7, 3], dtype=torch.int32)
    (table,) = open_stored(save(tmp_path / "checkpoint", {KEY: counts}))
    assert next(table.blocks())[1].tolist() == [COUNT_CEILING, 3]


def test_metadata_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a thousand ranks take seconds, and there is a part of each table for each."""
    parts = RowState(
        30, [RowShard(i, True, torch.arange(i, i + 10, dtype=torch.int32)) for i in (0, 10, 20)]
    )
    keys = (KEY, KEY.replace(".a", ".b"))
    folder = save(tmp_path / "checkpoint", dict.fromkeys(keys, parts))
    reads: list[Path] = []
    read_bytes = Path.read_bytes

    def reading(path: Path) -> bytes:
        reads.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    found = [torch.cat([part for _, part in table.blocks()]) for table in open_stored(folder)]
    assert [counts.tolist() for counts in found] == [list(range(30))] * 2
    assert reads == [folder / ".metadata"]
    reader = Reader(tmp_path / "none")
    reader.reset(folder)
    assert reader.read_metadata().state_dict_metadata.keys() == set(keys)


def damage(folder: Path, what: str) -> Path:
    """A path that must be refused."""
    path = folder / "input"
    if what == "missing":
        return path
    if what in ("empty folder", "killed save"):
        path.mkdir()
        if what == "killed save":
            (path / "__0_0.distcp").write_bytes(b"123")
        return path
    counts = torch.arange(1000, dtype=torch.int32)
    if what == "above":
        save(path / "whole", {KEY: counts})
        return path
    if what == "no counters":
        return save(path, {"model": {"a": torch.ones(3)}})
    if what == "wrong type":
        return save(path, {KEY: torch.ones(3)})
    if what == "wide":  # would not fit into what is read into
        return save(path, {KEY: counts.long() + 2**32})
    if what == "negative in checkpoint":
        return save(path, {KEY: counts - 5})
    if what == "rows missing":
        return save(path, {KEY: RowState(1000, [RowShard(0, True, counts[:600])])})
    if what in ("truncated data", "no data", "truncated metadata", "foreign metadata"):
        save(path, {KEY: counts})
        file = path / "__0_0.distcp"
        if what == "no data":
            file.unlink()
        elif what == "truncated data":
            file.write_bytes(file.read_bytes()[:2000])
        elif what == "truncated metadata":
            (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:50])
        else:
            (path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
        return path
    if what == "a model":
        save_file({"weight": torch.ones(3)}, path, {"format": "pt"})
    elif what == "text":
        path.write_text("count,row\n" * 100)
    else:
        save_counts(path, {"a": counts})
        if what == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
    return path


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
    "where", ["whole", "planner_data", "storage_meta", "state_dict_metadata", "tensor", "relative"]
)
def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path, where: str) -> None:
    folder, sign = tmp_path / "checkpoint", tmp_path / "sign"
    attack: Any = Attack(sign)
    totals = KEY.replace("row_counter", "table_totals")
    save(
        folder,
        {
            KEY: torch.arange(3, dtype=torch.int32),
            totals: attack if where == "tensor" else torch.ones(4),
        },
    )
    if where == "whole":
        (folder / ".metadata").write_bytes(pickle.dumps(attack))
    elif where == "state_dict_metadata":
        change_metadata(folder, lambda m: m.state_dict_metadata.update(x=attack))
    elif where == "relative":  # a file of another folder
        torch.save(attack, tmp_path / "other")
        (info, *_) = pickle.loads((folder / ".metadata").read_bytes()).storage_data.values()
        change_metadata(
            folder,
            lambda m: m.storage_data.update(
                {k: replace(info, relative_path="../other") for k in m.storage_data}
            ),
        )
    elif where != "tensor":
        change_metadata(folder, lambda m: setattr(m, where, attack))
    message = "asks for posix.mkdir"
    if where == "tensor":
        message = f"{totals} is no tensor"
    elif where == "relative":
        message = "damaged.*../other"
    with pytest.raises(ValueError, match=message):
        read(folder)
    assert not sign.exists()


def test_metadata_that_promise_too_much(tmp_path: Path) -> None:
    folder, rows = tmp_path / "checkpoint", 10**15

    def grow(metadata: Any) -> None:
        stored = metadata.state_dict_metadata[KEY]
        stored.size = stored.chunks[0].sizes = torch.Size([rows])

    change_metadata(save(folder, {KEY: torch.arange(3, dtype=torch.int32)}), grow)
    with pytest.raises(ValueError, match=f"no place for {rows} rows"):
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


def test_tables_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = ["cat_10", "cat_9", "a"]
    path = save(
        tmp_path / "input",
        {f"{name}.row_counter": torch.arange(3, dtype=torch.int32) for name in names},
    )
    assert [table.name for table in open_stored(path)] == ["a", "cat_9", "cat_10"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "no such file or folder"),
        ("truncated", "truncated or not a safetensors file"),
        ("text", "truncated or not a safetensors file"),
        ("a model", "not one of counts.*'pt'"),
        ("empty folder", r"not a whole checkpoint.*no \.metadata"),
        ("above", r"not a whole.*Whole ones below it: .*/whole\."),
        ("killed save", r"not a whole checkpoint.*no \.metadata"),
        ("no counters", r"without row counters.*model\.fused_optimizer\.state_dict"),
        ("wrong type", "no tensor of counts"),
        ("wide", "no tensor of counts"),
        ("negative in checkpoint", "counts must lie in 0 to .* got -5"),
        ("rows missing", "lacks rows from 600 of 1000"),
        ("truncated data", "is truncated.*cannot be read.*Copy it again"),
        ("no data", "cannot be read.*No such file"),
        ("truncated metadata", r"\.metadata is damaged.*Copy it again"),
        ("foreign metadata", r"\.metadata is damaged.*Copy it again"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, what: str, message: str) -> None:
    path = damage(tmp_path, what)
    with pytest.raises((ValueError, OSError), match=f"(?s){message}") as caught:
        read(path)
    assert str(path) in str(caught.value)
