"""The metadata of a checkpoint, read without running what may be in them.

The ``.metadata`` of ``torch.distributed.checkpoint`` are a pickle, which can name any function to
call. Read here, they can name the classes of DCP's metadata and torch's types only.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

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


def read_metadata(folder: Path) -> Metadata:
    """The checked metadata of a checkpoint.

    Raises:
        ValueError: not a whole checkpoint, damaged, or not DCP's; the message names the path.
        OSError: it cannot be read.
    """
    path = folder / ".metadata"
    if not path.exists():
        whole = [str(found.parent) for found in sorted(folder.rglob(".metadata"))]
        below = f" Whole ones below it: {', '.join(whole)}." if whole else ""
        raise ValueError(
            f"{folder} is not a whole checkpoint of torch.distributed.checkpoint: it has no "
            f".metadata. Name the folder that was given to save as checkpoint_id.{below}"
        )
    raw = io.BytesIO(path.read_bytes())
    try:
        found: Metadata = _Unpickler(raw).load()
        _check(found)
    except Exception as error:  # bytes that are no pickle can fail in any way
        raise ValueError(f"{path} is damaged: {error!r}. Copy it again.") from error
    return found


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
    """Raises any exception unless this has the types and bounds that its readers rely on."""
    _expect(isinstance(found, Metadata), found)
    for key, stored in found.state_dict_metadata.items():
        _expect(isinstance(key, str), key)
        if not isinstance(stored, BytesStorageMetadata):
            _expect(isinstance(stored, TensorStorageMetadata), stored)
            _expect(isinstance(stored.properties.dtype, torch.dtype), stored.properties)
            _expect(isinstance(stored.chunks, list), stored)
            boxes = [(c.offsets, c.sizes) for c in stored.chunks]
            _expect(all(map(_is_size, [stored.size, *(n for box in boxes for n in box)])), stored)
            for box in boxes:
                _expect({len(numbers) for numbers in box} == {len(stored.size)}, stored)
                ends = [first + size for first, size in zip(*box, strict=True)]
                _expect(all(end <= n for end, n in zip(ends, stored.size, strict=True)), stored)
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
