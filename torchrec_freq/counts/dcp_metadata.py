"""Checkpoints of ``torch.distributed.checkpoint`` read without running what may be in them.

A checkpoint's ``.metadata`` is a pickle, which can name any function to call. Read here, it can
name the classes of DCP's metadata and torch's types only.
"""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from torchrec_freq.counts.row_state import RowShard, RowState

_CLASSES: Final = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    OrderedDict,
)
_PLAIN: Final[dict[tuple[str, str], Any]] = {
    **{(value.__module__, value.__name__): value for value in _CLASSES},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Where the checkpoint was written; such a path does not look at the disk.
    **{
        (module, name): getattr(pathlib, f"Pure{name.removeprefix('Pure')}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
}


class Reader(FileSystemReader):
    """DCP's reader of a folder, for tensors in folders from others."""

    _found: Metadata | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Starts anew, perhaps in another folder."""
        super().reset(checkpoint_id)
        self._found = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checked metadata, read once: those of many ranks take seconds.

        Raises:
            ValueError: damaged, or not DCP's; the message names the file.
            OSError: missing, or cannot be read.
        """
        if self._found is None:
            path = Path(self.path, ".metadata")
            raw = io.BytesIO(path.read_bytes())
            try:
                found: Metadata = _Unpickler(raw).load()
                _check(found)
            except Exception as error:  # bytes that are no pickle can fail in any way
                raise ValueError(f"{path} is damaged: {error!r}. Copy it again.") from error
            self._found = found
        self._found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return self._found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads tensors.

        Raises:
            ValueError: what is asked for is no tensor. DCP would unpickle it.
        """
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                raise ValueError(f"{item.storage_index.fqn} is no tensor, so it is not read")
        return super().read_data(plan, planner)


class _Unpickler(pickle._Unpickler):
    # The one in Python, without this: the rest takes as much memory as a number in the pickle says.
    dispatch = pickle._Unpickler.dispatch.copy()
    del dispatch[pickle.BYTEARRAY8[0]]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise ValueError(
            f"it asks for {module}.{name}, which DCP's metadata do not need, as if made to run a "
            "program. Nothing of it was run"
        )


def _check(found: Metadata) -> None:
    """Raises any exception unless this has the types and bounds that DCP relies on."""
    _expect(isinstance(found, Metadata), found)
    for key, stored in found.state_dict_metadata.items():
        _expect(isinstance(key, str), key)
        if not isinstance(stored, BytesStorageMetadata):
            _expect(isinstance(stored, TensorStorageMetadata), stored)
            _expect(isinstance(stored.properties.dtype, torch.dtype), stored.properties)
            _expect(isinstance(stored.chunks, list), stored)
            sizes = [size for c in stored.chunks for size in (c.sizes, c.offsets)]
            _expect(all(map(_is_size, [stored.size, *sizes])), stored)
            _expect(all(len(c.sizes) == len(c.offsets) for c in stored.chunks), stored)
    for index, info in found.storage_data.items():
        _expect(isinstance(index, MetadataIndex) and isinstance(index.fqn, str), index)
        name = info.relative_path
        # A file of the folder, and no other one.
        _expect(isinstance(name, str) and Path(name).name == name, name)
        _expect(all(type(n) is int and n >= 0 for n in (info.offset, info.length)), info)


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.Size) and all(0 <= n < 1 << 62 for n in value)


def _expect(holds: bool, value: object) -> None:
    if not holds:
        raise ValueError(f"unexpected {value!r:.100}")


class Checkpoint:
    """A checkpoint whose tensors of one dimension are read part by part.

    It needs no process group, and fits any sharding plan.

    Attributes:
        metadata: what describes it.
        stored: what describes each key.

    Raises:
        ValueError: no whole checkpoint, or a damaged one; the message names the folder.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / ".metadata").exists():
            whole = [str(path.parent) for path in sorted(folder.rglob(".metadata"))]
            below = f" Whole ones below it: {', '.join(whole)}." if whole else ""
            raise ValueError(
                f"{folder} is not a whole checkpoint of torch.distributed.checkpoint: it has no "
                f".metadata. Name the folder that was given to save as checkpoint_id.{below}"
            )
        self.folder = folder
        self._reader = Reader(folder)
        self.metadata = self._reader.read_metadata()
        self.stored = self.metadata.state_dict_metadata

    def stems(self, suffix: str) -> list[str]:
        """Keys that end in this, without it."""
        return [key.removesuffix(suffix) for key in self.stored if key.endswith(suffix)]

    def parts(
        self, key: str, dtypes: Sequence[torch.dtype], otherwise: str
    ) -> list[tuple[int, int]]:
        """First element and length of each saved part of a tensor of one dimension, in order.

        Args:
            dtypes: that it may have.
            otherwise: what is said of the key where there is another thing.

        Raises:
            ValueError: it is another thing, or parts of it are missing, also in the files; the
                message names folder and key.
        """
        stored = self.stored[key]
        if (
            not isinstance(stored, TensorStorageMetadata)
            or len(stored.size) != 1
            or stored.properties.dtype not in dtypes
        ):
            raise ValueError(f"{self.folder}: {key} {otherwise}: {stored}.")
        if any(len(chunk.sizes) != 1 for chunk in stored.chunks):
            raise ValueError(f"{self.folder}/.metadata is damaged: {key} has parts of a matrix.")
        # Ranks without a row may have saved a part of none.
        parts = sorted((c.offsets[0], c.sizes[0]) for c in stored.chunks if c.sizes[0])
        end = 0
        for first, rows in parts:
            if first != end:
                break
            end += rows
        if end != stored.size[0]:
            raise ValueError(f"{self.folder}: {key} lacks rows from {end} of {stored.size[0]}.")
        # No memory for more rows than files can hold.
        for first, rows in parts:
            info = self.metadata.storage_data.get(MetadataIndex(key, [first]))
            if info is None or info.length < rows * stored.properties.dtype.itemsize:
                raise ValueError(
                    f"{self.folder}/.metadata is damaged: {key} has no place for {rows} rows."
                )
            file = self.folder / info.relative_path
            if file.exists() and file.stat().st_size < info.offset + info.length:
                raise ValueError(f"{file} is truncated: {key} cannot be read. Copy it again.")
        return parts

    def load(self, key: str, into: Tensor, first: int = 0, size: int | None = None) -> None:
        """Reads a tensor, or its elements from ``first`` on, as many as ``into`` has.

        Args:
            size: of the whole tensor; None where it is that of ``into``.

        Raises:
            ValueError: they cannot be read; the message names folder and key.
        """
        target = into if size is None else RowState(size, [RowShard(first, True, into)])
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load({key: target}, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
                raise KeyboardInterrupt from error
            raise ValueError(
                f"{self.folder}: {key} cannot be read: {'; '.join(map(repr, causes))}. Copy it "
                "again."
            ) from error
