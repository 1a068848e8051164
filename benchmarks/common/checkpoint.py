"""Checkpoints of a training run: whole or not at all, the last few kept, for any number of ranks.

    checkpoints = Checkpoints(Path("runs/mine"), settings={"lr": 0.1}, keep=2)
    state = {"model": model, "optimizer": optimizer}  # each with state_dict and load_state_dict
    start = 0
    if found := checkpoints.latest():
        dense_optimizer.init_state()  # there must be state to load into
        load(found.path, state)
        start = found.step
    for step in range(start + 1, steps + 1):
        ...
        if step % 1000 == 0:
            checkpoints.save(step, state)

The counters of FrequencySGD are part of the state of `model.fused_optimizer`, and nothing here
knows of them.
"""

import json
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException

from benchmarks.common.ranks import from_first, gather, together
from torchrec_freq.output import sync, write_text

MANIFEST: Final = "checkpoint.json"
BLOCK_BYTES: Final = 1 << 24
"""Of a file, read at once."""

# What is not whole has one of these before its name.
_WRITING, _DELETING = "writing-", "deleting-"


class NotSaved(OSError):
    """A checkpoint could not be written; those before it are as they were. All ranks raise it."""


class NoCheckpoint(ValueError):
    """There are checkpoints, but none to go on from. All ranks raise it."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    settings: dict[str, Any]
    progress: Any  # what `save` was given
    files: dict[str, list[int]]  # by name: bytes and CRC-32


class Checkpoints:
    """The checkpoints of one training run, in a folder that all ranks see.

    A checkpoint is a folder `step-00000040` of torch.distributed.checkpoint, with a manifest of its
    files and their checksums. It gets that name when everything is on the disk; what a killed run
    leaves has another one.

    Args:
        folder: made when needed; another run needs another folder.
        settings: what a run must have in common with the checkpoint it resumes, as JSON has it.
        keep: how many checkpoints to keep, at least 1.
    """

    def __init__(self, folder: Path, *, settings: Mapping[str, Any], keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} would delete every checkpoint; it must be at least 1.")
        self.folder = folder
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.keep = keep
        self._damaged: set[Path] = set()  # what `latest` has found so

    def save(self, step: int, state: dict[str, Any], progress: Any = None) -> None:
        """Writes a checkpoint, then deletes all but the last `keep`. All ranks must call it.

        Args:
            step: steps trained so far.
            state: models and optimizers by name, or tensors.
            progress: what else the run needs to go on, as JSON has it; that of rank 0 is kept.

        Raises:
            NotSaved: the disk is full, or cannot be written for another reason. The checkpoints
                before this one are kept, and the next call may succeed.
        """
        final = self.folder / _name(step)
        temporary = self.folder / f"{_WRITING}{final.name}"
        rank = dist.get_rank()

        def refuse(number: int | None, why: str) -> NotSaved:
            return NotSaved(number, f"{final} is not saved: {why}")

        try:
            with together(refuse, OSError):
                if rank == 0:
                    for leftover in self._paths(_WRITING) + self._paths(_DELETING):
                        self._try_delete(leftover)
                    temporary.mkdir(parents=True)
            with together(refuse, OSError):
                try:
                    # Returns when the files of all ranks are on the disk, or raises on all of them.
                    dcp.save(state, checkpoint_id=temporary)
                except CheckpointException as error:
                    # With those of the first rank that failed; OSError first.
                    causes = [cause for cause, _ in error.failures.values()]
                    known = next((e for e in causes if isinstance(e, OSError)), causes[0])
                    where = next(r for r, (e, _) in error.failures.items() if e is known)
                    number = getattr(known, "errno", None)
                    said = f"on rank {where}: {known}"
                    raise OSError(number, said) if number else OSError(said) from error
                own = [".metadata", *(path.name for path in temporary.glob("__0_*"))]
                if rank != 0:
                    own = [path.name for path in temporary.glob(f"__{rank}_*")]
                sums = {name: _sums(temporary / name) for name in own}
            files = {name: part[name] for part in gather(sums) for name in part}
            with together(refuse, OSError):
                if rank == 0:
                    _write_manifest(temporary, step, self.settings, progress, files)
                    if final.exists():  # damaged, or the run would have resumed from it
                        _delete(final)
                    temporary.rename(final)  # atomic: from here on this step has a checkpoint
                    self._damaged.discard(final)
                    sync(self.folder)
                    self._prune(step)
        except NotSaved:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # room for what is more urgent
            raise

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, the same on every rank. All ranks must call it.

        The ranks share the work of reading it to compare its checksums. One that is damaged is
        passed over with a warning that says why.

        Raises:
            NoCheckpoint: it was made with other settings, or all checkpoints are damaged.
        """
        # Ranks that look for themselves could see different folders.
        found, faults = from_first(self._whole() if dist.get_rank() == 0 else None)
        checkpoint: Checkpoint
        for checkpoint in reversed(found):
            if checkpoint.settings != self.settings:
                then, now = checkpoint.settings, self.settings
                differences = "; ".join(
                    f"{name} was {then.get(name)}, is {now.get(name)}"
                    for name in sorted(then.keys() | now.keys())
                    if then.get(name) != now.get(name)
                )
                raise NoCheckpoint(
                    f"{checkpoint.path} comes from a run with other settings: {differences}. Take "
                    "its settings to resume it, or another folder to start anew."
                )
            fault = next(filter(None, gather(_damage(checkpoint))), None)
            if fault is None:
                return checkpoint
            _pass_over(checkpoint.path, fault)
            self._damaged.add(checkpoint.path)
            faults.append(f"{checkpoint.path}: {fault}")
        if faults:
            raise NoCheckpoint(
                f"None of the checkpoints in {self.folder} is whole: {'; '.join(faults)}. Copy "
                "them again, or name another folder to start anew."
            )
        return None

    def _paths(self, prefix: str = "") -> list[Path]:
        """Folders named as checkpoints, in order of their steps, and none of somebody else."""
        pattern = re.compile(rf"{prefix}step-\d{{8,18}}")
        return sorted(filter(lambda p: pattern.fullmatch(p.name), self.folder.glob("*")), key=_step)

    def _whole(self) -> tuple[list[Checkpoint], list[str]]:
        """Those that seem whole, oldest first, and what is wrong with the others."""
        found, faults = [], []
        for path in self._paths():
            try:
                found.append(_read(path))
            except (OSError, ValueError) as error:
                _pass_over(path, str(error))
                faults.append(f"{path}: {error}")
        return found, faults

    def _prune(self, step: int) -> None:
        """Deletes the checkpoints up to this step, and their remains, but the last `keep`."""
        whole = [found.path for found in self._whole()[0] if found.step <= step]
        kept = [path for path in whole if path not in self._damaged][-self.keep :]
        for path in self._paths():
            if path not in kept and _step(path) <= step:
                self._try_delete(path)

    def _try_delete(self, path: Path) -> None:
        """Deletes a folder, or says why not: a checkpoint can be saved beside it all the same."""
        try:
            _delete(path)
        except OSError as error:
            warnings.warn(f"{path} cannot be deleted: {error}", stacklevel=3)


def load(path: Path, state: dict[str, Any]) -> None:
    """Loads what a checkpoint has, in place, whatever the number of ranks and sharding plan.

    All ranks must call it, those without a table too. An optimizer that makes its state in its
    first step, such as TorchRec's `KeyedOptimizerWrapper`, needs its `init_state()` before.

    Args:
        path: folder of the checkpoint.
        state: what `save` was given.

    Raises:
        ValueError: it is of another model, or damaged.
    """
    # The default, made for FSDP, leaves out tables without a shard on this rank. It then takes
    # the checkpoint for one of torch 2.3 and asks for the state of an optimizer without any,
    # which has no tensors, and was not saved.
    planner = DefaultLoadPlanner(flatten_sharded_tensors=False)
    try:
        dcp.load(state, checkpoint_id=path, planner=planner)
    except CheckpointException as error:  # a BaseException
        causes = "; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))
        raise ValueError(f"{path} is of another model, or damaged: {causes}") from error


def _name(step: int) -> str:
    return f"step-{step:08}"


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _write_manifest(
    folder: Path, step: int, settings: Any, progress: Any, files: dict[str, list[int]]
) -> None:
    """Completes a checkpoint; on the disk when this returns, with the names of the other files."""
    manifest = {"step": step, "settings": settings, "progress": progress, "files": files}
    manifest = json.loads(json.dumps(manifest))  # as a reader will have it
    manifest["crc32"] = _checksum(manifest)
    write_text(folder / MANIFEST, json.dumps(manifest))


def _read(path: Path) -> Checkpoint:
    """What the manifest of a checkpoint says. Of its files only the sizes are looked at.

    Raises:
        OSError: a file is missing.
        ValueError: a file is cut short, or the manifest damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        checksum = manifest.pop("crc32")
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged, or of an earlier version: {error!r}") from error
    if checksum != _checksum(manifest):
        raise ValueError(f"{MANIFEST} is damaged: it does not have its checksum")
    if _name(manifest["step"]) != path.name:
        raise ValueError(f"{MANIFEST} is of step {manifest['step']}")
    for name, (size, _) in manifest["files"].items():
        if (found := (path / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found} bytes instead of {size}")
    return Checkpoint(path, **manifest)


def _checksum(manifest: Any) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _sums(path: Path) -> list[int]:
    """Bytes and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _damage(checkpoint: Checkpoint) -> str | None:
    """Why this rank's part of the files is not what was written."""
    rank = dist.get_rank()
    for name in sorted(checkpoint.files)[rank :: dist.get_world_size()]:
        try:
            if _sums(checkpoint.path / name) != checkpoint.files[name]:
                return f"{name} is damaged: it does not have its checksum"
        except OSError as error:
            return f"rank {rank} cannot read it: {error}"
    return None


def _pass_over(path: Path, why: str) -> None:
    if dist.get_rank() == 0:
        message = f"{path} is not a whole checkpoint, passed over: {why}"
        warnings.warn(message, stacklevel=3)


def _delete(path: Path) -> None:
    """Deletes a folder in a way that nobody takes the rest of it for a checkpoint."""
    doomed = path.with_name(f"{_DELETING}{path.name.removeprefix(_WRITING)}")
    if path.name.startswith("step-"):
        path = path.rename(doomed)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
