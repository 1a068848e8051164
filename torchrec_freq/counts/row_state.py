"""The checkpoint form of a table's counters: one tensor of all rows, whatever the sharding plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

aten = torch.ops.aten


@dataclass(frozen=True)
class RowShard:
    """Some rows of a table on this rank.

    Attributes:
        row_offset: the first of them.
        primary: whether this rank saves them; of replicas, one does.
        tensor: [rows of the shard], the memory itself.
    """

    row_offset: int
    primary: bool
    tensor: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> RowShard:
        """A copy on the CPU: asynchronous checkpoints are staged by it."""
        return RowShard(self.row_offset, self.primary, self.tensor.to("cpu", copy=True))


class RowState(torch.Tensor):
    """A tensor [rows] of a whole table of which this rank holds parts, some of them replicas.

    It is a view for checkpoints, not for arithmetic. ``torch.distributed.checkpoint`` saves each
    row once and loads every replica, so a checkpoint fits any plan and number of ranks; it can also
    be copied, moved, pickled, and loaded from a plain tensor of all rows.

    TorchRec's own row-wise states cannot change their number of column shards: they lay the
    replicas behind each other in one tensor.

    Args:
        rows: rows of the whole table.
        shards: the parts on this rank.

    Attributes:
        owner: the tables of the sharded module that it is a state of, and the table's name; None
            for a copy.
    """

    shards: tuple[RowShard, ...]
    owner: tuple[Any, str] | None = None

    @staticmethod
    def __new__(cls, rows: int, shards: Sequence[RowShard]) -> RowState:
        values = shards[0].tensor
        state = torch.Tensor._make_wrapper_subclass(
            cls, (rows,), dtype=values.dtype, device=values.device
        )
        assert isinstance(state, RowState)
        state.shards = tuple(shards)
        return state

    def local_shards(self) -> list[RowShard]:
        """The parts on this rank, as a ``ShardedTensor`` gives its own."""
        return list(self.shards)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        parts = [f"{first}:{first + rows}" for first, rows in self._layout()]
        return f"RowState(rows={self.shape[0]}, here={', '.join(parts)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> RowState:
        return _map(self, torch.clone)

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts = [(shard.row_offset, shard.primary, shard.tensor) for shard in self.shards]
        return _rebuild, (self.shape[0], parts)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _VIEWS:
            return args[0]
        if func in _COPIES:
            return _map(args[0], lambda values: func(values, *args[1:], **kwargs))
        if func is aten.new_empty.default:
            device = kwargs.get("device")
            return _map(args[0], lambda values: torch.empty_like(values, device=device))
        if func is aten.is_pinned.default:
            return all(shard.tensor.is_pinned() for shard in args[0].shards)
        if func is aten.copy_.default:
            return _copy(args[0], args[1])
        raise NotImplementedError(
            f"{func} on the row counters of a checkpoint. They are split over the ranks: read "
            "whole ones with torchrec_freq.row_counts(model)."
        )

    # What torch.distributed.checkpoint asks of a tensor that knows its own layout.

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        items = []
        for shard, chunk in zip(self._filled(), self.__create_chunk_list__(), strict=True):
            if shard.primary:
                properties = TensorProperties.create_from_tensor(shard.tensor)
                data = TensorWriteData(chunk, properties, self.size())
                index = MetadataIndex(fqn, chunk.offsets)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size([shard.row_offset]), shard.tensor.size())
            for shard in self._filled()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        filled = self._filled()
        # Column shards on one rank begin at the same row: only the number tells them apart.
        if index.index is not None and index.index < len(filled):
            shard = filled[index.index]
            if index.offset is None or shard.row_offset == index.offset[0]:
                return shard.tensor
        assert index.offset is not None
        return next(s.tensor for s in filled if s.row_offset == index.offset[0])

    def _layout(self) -> list[tuple[int, int]]:
        return [(shard.row_offset, shard.tensor.numel()) for shard in self.shards]

    def _filled(self) -> list[RowShard]:
        return [shard for shard in self.shards if shard.tensor.numel()]


_VIEWS: Final = {aten.detach.default, aten.alias.default}
_COPIES: Final = {
    *(aten.clone.default, aten._to_copy.default, aten._pin_memory.default),
    *(aten.empty_like.default, aten.zeros_like.default),
}


def _map(state: RowState, function: Callable[[Tensor], Tensor]) -> RowState:
    shards = [RowShard(s.row_offset, s.primary, function(s.tensor)) for s in state.shards]
    return RowState(state.shape[0], shards)


def _copy(target: RowState, source: Tensor) -> RowState:
    if source.shape != target.shape:
        raise ValueError(
            f"row counters of {list(source.shape)} rows do not fit a table of "
            f"{list(target.shape)} rows"
        )
    if isinstance(source, RowState):
        if source._layout() != target._layout():
            raise ValueError(
                f"{source!r} was saved by a rank of another sharding plan than {target!r}. Load it "
                "with torch.distributed.checkpoint, which fits it to this plan."
            )
        for shard, other in zip(target.shards, source.shards, strict=True):
            if shard.tensor.data_ptr() != other.tensor.data_ptr():
                shard.tensor.copy_(other.tensor)
    else:
        for shard in target.shards:
            shard.tensor.copy_(source.narrow(0, shard.row_offset, shard.tensor.numel()))
    return target


def _rebuild(rows: int, parts: list[tuple[int, bool, Tensor]]) -> RowState:
    return RowState(rows, [RowShard(*part) for part in parts])


# torch.load accepts files with these without weights_only=False.
torch.serialization.add_safe_globals([_rebuild])
