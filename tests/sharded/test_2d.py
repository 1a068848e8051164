"""2D parallelism: sharding groups that train by themselves, and are averaged at each sync.

TorchRec has it for GPUs only. Here its check of the device is taken out, and gloo, which cannot
average, sums instead; all else is TorchRec's.
"""

from __future__ import annotations

import inspect
import random
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

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
    make_reference,
    restore,
    sample_loss,
    state_of,
    to_kjt,
)
from plans import make_plan
from ranks import on_ranks, run_on_ranks
from reference import Feature, ReferenceTable
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.distributed.tensor import DTensor
from torchrec.distributed import model_parallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embeddingbag import ShardedManagedCollisionEmbeddingBagCollection
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.sharding_plan import construct_module_sharding_plan
from torchrec.distributed.types import ShardingPlan

from torchrec_freq import FrequencySGD, load_row_counts, row_counts, table_states
from torchrec_freq.engine.tbe import FrequencyTBE
from torchrec_freq.sharded import tables as tables_module
from torchrec_freq.sharded.install import frequency_modules

SAMPLES = 3  # of a rank


def without_device_check() -> Any:
    """``DMPCollection.__init__`` that takes any device."""
    source = textwrap.dedent(inspect.getsource(DMPCollection.__init__))
    check = source[source.index("    assert (") : source.index("    # TODO: Add assertion")]
    assert "only supports CUDA" in check
    code = f"def factory(__class__):\n{textwrap.indent(source.replace(check, ''), '    ')}"
    names: dict[str, Any] = {}
    exec(code + "    return __init__", vars(model_parallel), names)
    return mock.patch.object(DMPCollection, "__init__", names["factory"](DMPCollection))


def collection_2d(kind: str, options: dict[str, Any] | None = None, seed: int = 0) -> DMPCollection:
    """Two groups of two of the four ranks, whose tables start equal."""
    torch.manual_seed(seed)
    collection = make_collection(TABLES)
    apply_optimizer_in_backward(
        FrequencySGD, collection.parameters(), {"lr": LR, **(options or {})}
    )
    sharder: Any = EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        collection,
        make_plan(kind, TABLES, 2),
        sharder=sharder,
        local_size=2,
        world_size=2,
        device_type="cpu",
    )

    def average(tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            dist.all_reduce(tensor, group=model._ctxs[0].replica_pg)
            tensor /= 2

    def remote_device(text: str) -> Any:
        return stock(text.partition("/")[0] + "/cpu")  # a CPU has no number

    stock = model_parallel._remote_device
    with (
        without_device_check(),
        mock.patch.object(model_parallel, "_remote_device", remote_device),
    ):
        model = DMPCollection(
            module=collection,
            device=torch.device("cpu"),
            plan=ShardingPlan(plan={"": plan}),
            world_size=4,
            sharding_group_size=2,
            global_pg=dist.group.WORLD,
            node_group_size=2,
            sharders=[sharder],
            custom_all_reduce=average,
        )
    return model


def weights_of(model: DMPCollection) -> dict[str, torch.Tensor]:
    """Whole tables of this rank's group."""
    group = model._ctxs[0].sharding_pg
    weights = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, DTensor):  # data parallel
            weights[name.split(".")[-2]] = value.detach().clone()
            continue
        whole = torch.zeros(value.shape)
        local: Any = value.to_local()
        for offset, part in zip(local.local_offsets(), local.local_shards(), strict=False):
            row, column = offset
            whole[row : row + part.shape[0], column : column + part.shape[1]] = part
        dist.all_reduce(whole, group=group)
        weights[name.split(".")[-2]] = whole
    return weights


class Groups:
    """A model under 2D parallelism, and a reference model for each of its two groups."""

    def __init__(self, kind: str, options: dict[str, Any] | None = None) -> None:
        self.model = collection_2d(kind, options)
        self.rng = random.Random(0)
        weights, own = weights_of(self.model), {t.name: options or {} for t in TABLES}
        self.references = [make_reference(TABLES, weights, own) for _ in range(2)]
        for reference in self.references if kind == "column_wise" else []:
            for t in TABLES:
                reference.tables[t.name].shard_columns = [t.columns // 2] * 2
        # TorchRec interleaves the groups: ranks 0 and 2, ranks 1 and 3.
        self.group, self.place = dist.get_rank() % 2, dist.get_rank() // 2

    def step(self) -> None:
        for group, reference in enumerate(self.references):
            features = make_batch(self.rng, TABLES, 2 * SAMPLES)
            reference.step(features, lambda outputs: sample_loss(outputs).mean())
            if group == self.group:
                train_on(self.model, features, self.place)

    def sync(self, **options: Any) -> None:
        self.model.sync(**options)
        for name in self.references[0].tables:
            tables = [reference.tables[name] for reference in self.references]
            mean = sum(table.weight for table in tables) / 2
            for table in tables:
                table.weight = torch.as_tensor(mean).clone()
            if options.get("include_optimizer_state", True):
                self._average(tables)

    def _average(self, tables: list[ReferenceTable]) -> None:
        for row in range(len(tables[0].weight)):
            least, left = divmod(sum(table.counts[row] for table in tables), 2)
            for group, table in enumerate(tables):
                table.counts[row] = least + (group < left)
        rows = {row for table in tables for row in table.sums}
        sums = {r: sum(t.sums.get(r, torch.zeros(1)) for t in tables) / 2 for r in rows}
        for table in tables:
            table.sums = {row: torch.as_tensor(mean) for row, mean in sums.items()}
        for name in ("squares", "total", "steps"):
            mean = sum(getattr(table, name) for table in tables) / 2
            for table in tables:
                setattr(table, name, mean)

    def check(self) -> None:
        """Weights and state of this rank's group, and what all groups together have."""
        weights, states = weights_of(self.model), table_states(self.model)
        ((_, handle),) = frequency_modules(self.model)
        for name, table in self.references[self.group].tables.items():
            torch.testing.assert_close(weights[name].double(), table.weight, rtol=0, atol=1e-6)
            both = [reference.tables[name] for reference in self.references]
            counts = torch.stack([table.count_tensor() for table in both]).sum(dim=0)
            assert torch.equal(states[name].counts, (counts + 1) // 2), name
            sums = torch.stack([table.sum_tensor() for table in both]).mean(dim=0)
            if table.normalize is not None:
                torch.testing.assert_close(states[name].row_sums(), sums, rtol=1e-4, atol=1e-6)
            for shard in handle.shards_of(name):
                assert torch.equal(shard.counts.long(), shard.part_of(table.count_tensor()))
                # Where no rank shares a table, others have no totals of it.
                totals = handle.table_totals(name)
                torch.testing.assert_close(totals, table.totals(), rtol=1e-6, atol=0)


def train_on(model: Any, features: list[Feature], place: int) -> None:
    """A backward on ``SAMPLES`` samples of a batch."""
    local = to_kjt(features, slice(place * SAMPLES, (place + 1) * SAMPLES))
    sample_loss(model(local).to_dict()).mean().backward()


@pytest.mark.parametrize("options", [{}, {"half_life": 3}, {"normalize": None}])
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
@on_ranks(4)
def test_groups_train_by_themselves_and_are_averaged_at_a_sync(
    kind: str, options: dict[str, Any]
) -> None:
    groups = Groups(kind, options)
    for step in range(6):
        groups.step()
        if step in (1, 2, 4):
            groups.check()
            groups.sync()
    groups.check()


@on_ranks(4)
def test_data_parallel_tables_train_on_all_groups_together() -> None:
    model = collection_2d("data_parallel")
    reference, rng = make_reference(TABLES, weights_of(model)), random.Random(0)
    for _ in range(4):
        features = make_batch(rng, TABLES, 4 * SAMPLES)
        reference.step(features, lambda outputs: sample_loss(outputs).mean())
        train_on(model, features, dist.get_rank())
        model.sync()
    counts, weights = row_counts(model), weights_of(model)
    for name, table in reference.tables.items():
        torch.testing.assert_close(weights[name].double(), table.weight, rtol=0, atol=1e-6)
        assert torch.equal(counts[name], table.count_tensor())


@on_ranks(4)
def test_a_sync_in_parts() -> None:
    with mock.patch.object(tables_module, "_CHUNK_ROWS", 5):  # the memory that it takes
        groups = Groups("row_wise")
        groups.step()
        groups.sync()
        groups.check()
    groups.step()
    groups.sync(include_optimizer_state=False)
    groups.check()


@on_ranks(4)
def test_a_row_that_one_group_has_seen_once_is_not_forgotten() -> None:
    model = collection_2d("row_wise")
    rank = dist.get_rank()
    for step in range(5):
        bags = [[3] if rank == 1 and step == 0 else [0]]
        features = [
            Feature(name, bags if name == "f3" else [[1]]) for t in TABLES for name in t.features
        ]
        sample_loss(model(to_kjt(features)).to_dict()).mean().backward()
        model.sync()
        counts = row_counts(model)["c"]
        assert counts[3] == 1
    # Row 0 was looked up 4 * 5 - 1 times by two groups together.
    assert counts[0] == 10


def keep(weights: dict[str, torch.Tensor], model: Any, file: Path) -> None:
    states = table_states(model)
    if dist.get_rank() == 0:
        torch.save((weights, states), file)


def save_2d(folder: Path) -> None:
    groups = Groups("row_wise", {"half_life": 50})
    for _ in range(3):
        groups.step()
    groups.sync()
    dcp.save(state_of(groups.model), checkpoint_id=folder / "2d")
    keep(weights_of(groups.model), groups.model, folder / "2d.pt")


def check_loaded(model: Any, weights: dict[str, torch.Tensor], file: Path) -> None:
    expected_weights, expected = torch.load(file, weights_only=False)
    for name, found in table_states(model).items():
        state = expected[name]
        assert torch.equal(found.counts, state.counts) and found.age == state.age > 0
        torch.testing.assert_close(found.row_sums(), state.row_sums())
        torch.testing.assert_close(found.totals, state.totals, rtol=1e-12, atol=0)
        assert torch.equal(weights[name], expected_weights[name])


def to_1d_and_save(folder: Path) -> None:
    pair = Pair(TABLES, make_plan("table_wise", TABLES, 2), {"half_life": 50}, seed=1)
    restore(pair.model, folder / "2d")
    check_loaded(pair.model, full_weights(pair.model), folder / "2d.pt")
    pair.step()
    dcp.save(state_of(pair.model), checkpoint_id=folder / "1d")
    keep(full_weights(pair.model), pair.model, folder / "1d.pt")


def to_2d(folder: Path) -> None:
    model = collection_2d("column_wise", {"half_life": 50}, seed=2)
    restore(model, folder / "1d")
    check_loaded(model, weights_of(model), folder / "1d.pt")
    model.sync()  # equal groups stay as they are
    check_loaded(model, weights_of(model), folder / "1d.pt")


def test_checkpoints_from_2d_to_one_group_and_back(tmp_path: Path) -> None:
    run_on_ranks(4, save_2d, {"folder": tmp_path})
    run_on_ranks(2, to_1d_and_save, {"folder": tmp_path})
    run_on_ranks(4, to_2d, {"folder": tmp_path})


@on_ranks(4)
def test_counts_loaded_into_groups() -> None:
    model = collection_2d("row_wise")
    counts = {t.name: torch.arange(t.rows) for t in TABLES}
    load_row_counts(model, counts)
    model.sync()
    for name, found in row_counts(model).items():
        assert torch.equal(found, counts[name])


def test_tables_whose_rows_a_sync_moves_are_refused() -> None:
    collection = ShardedManagedCollisionEmbeddingBagCollection.__new__(
        ShardedManagedCollisionEmbeddingBagCollection
    )
    tbe = FrequencyTBE.__new__(FrequencyTBE)
    collection.__dict__["_table_to_tbe_and_index"] = {"hashed": (tbe, 0)}
    context = SimpleNamespace(modules_to_sync=[(collection, None)])
    with pytest.raises(ValueError, match="Table 'hashed'.*zero-collision"):
        DMPCollection._cache_sync_tensors(None, [context])
