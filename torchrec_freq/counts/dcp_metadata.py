"""Checkpoints of ``torch.distributed.checkpoint`` read without running what may be in them.

A checkpoint's ``.metadata`` is a pickle, which can name any function to call. Read here, it can
name the classes of DCP's metadata and torch's types only.
"""

from __future__ import annotations

import pathlib
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

_PLAIN: Final[dict[tuple[str, str], Any]] = {
    **{
        (value.__module__, value.__name__): value
        for value in (
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
    },
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

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checked metadata.

        Raises:
            ValueError: damaged, or not DCP's; the message names the file.
            OSError: missing, or cannot be read.
        """
        path = Path(self.path, ".metadata")
        with path.open("rb") as file:
            try:
                found = _Unpickler(file).load()
                _check(found)
            except _Refused as error:
                raise ValueError(f"{path} {error}") from None
            except Exception as error:  # bytes that are no pickle can fail in any way
                raise ValueError(f"{path} is damaged: {error!r}. Copy it again.") from error
        checked: Metadata = found
        checked.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return checked

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads tensors.

        Raises:
            ValueError: what is asked for is no tensor. DCP would unpickle it.
        """
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                raise ValueError(f"{item.storage_index.fqn} is no tensor, so it is not read")
        return super().read_data(plan, planner)


class _Refused(ValueError):
    """The metadata ask for what they do not need."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise _Refused(
            f"asks for {module}.{name}, which DCP's metadata do not need: it is damaged, or made "
            "to run a program. Nothing of it was run."
        )


def _check(found: Any) -> None:
    """Whether this has the types and bounds that DCP relies on.

    Raises:
        TypeError, ValueError, AttributeError: no.
    """
    _expect(isinstance(found, Metadata), found)
    _expect(isinstance(found.state_dict_metadata, dict), found.state_dict_metadata)
    for key, stored in found.state_dict_metadata.items():
        _expect(isinstance(key, str), key)
        if isinstance(stored, BytesStorageMetadata):
            continue
        _expect(isinstance(stored, TensorStorageMetadata), stored)
        _expect(isinstance(stored.properties.dtype, torch.dtype), stored.properties)
        _expect(_is_size(stored.size) and isinstance(stored.chunks, list), stored)
        for chunk in stored.chunks:
            sizes, offsets = chunk.sizes, chunk.offsets
            _expect(_is_size(sizes) and _is_size(offsets) and len(sizes) == len(offsets), chunk)
    _expect(isinstance(found.storage_data, dict), found.storage_data)
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
