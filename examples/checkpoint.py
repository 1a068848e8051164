"""Checkpoints of a training run: whole or not at all, the last few kept, for any number of ranks.

    checkpoints = Checkpoints(Path("runs/mine"), settings={"lr": 0.1}, keep=2)
    state = {"model": model, "optimizer": optimizer}  # each with state_dict and load_state_dict
    start = 0
    if found := checkpoints.latest():
        dense_optimizer.init_state()  # there must be state to load into
        checkpoints.load(found, state)
        start = found.step
    for step in range(start + 1, steps + 1):
        ...
        if step % 1000 == 0:
            checkpoints.save(step, state)

The counters of FrequencySGD are part of the state of `model.fused_optimizer`, and nothing here
knows of them.
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner

MANIFEST: Final = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    settings: dict[str, Any]
    progress: Any  # what `save` was given


class Checkpoints:
    """The checkpoints of one training run, in a folder that all ranks see.

    A checkpoint is a folder `step-00000040` of torch.distributed.checkpoint, with a manifest of its
    files. It gets that name when everything is written; what a killed run leaves has another one.

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

    def save(self, step: int, state: dict[str, Any], progress: Any = None) -> None:
        """Writes a checkpoint, then deletes all but the last `keep`. All ranks must call it.

        Args:
            step: steps trained so far.
            state: models and optimizers by name, or tensors.
            progress: what else the run needs to go on, as JSON has it; that of rank 0 is kept.
        """
        final = self.folder / _name(step)
        temporary = self.folder / f"writing-{final.name}"
        if dist.get_rank() == 0:
            for leftover in self.folder.glob("writing-*"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        dist.barrier()
        dcp.save(state, checkpoint_id=temporary)  # returns when the files of all ranks are on disk
        if dist.get_rank() == 0:
            manifest = {
                "step": step,
                "settings": self.settings,
                "progress": progress,
                "files": {path.name: path.stat().st_size for path in temporary.iterdir()},
            }
            with (temporary / MANIFEST).open("w") as file:
                json.dump(manifest, file)
                file.flush()
                os.fsync(file.fileno())
            if final.exists():  # damaged, or the run would have resumed from it
                shutil.rmtree(final)
            temporary.rename(final)  # atomic: from here on there is a checkpoint of this step
            self._prune(step)
        dist.barrier()

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, the same on every rank. All ranks must call it.

        Raises:
            ValueError: it was made with other settings.
        """
        found: list[Checkpoint | None] = [None]
        if dist.get_rank() == 0:  # ranks that look for themselves could see different folders
            found += self._whole()
        found = found[-1:]
        dist.broadcast_object_list(found)
        (checkpoint,) = found
        if checkpoint is not None and checkpoint.settings != self.settings:
            then, now = checkpoint.settings, self.settings
            differences = "; ".join(
                f"{name} was {then.get(name)}, is {now.get(name)}"
                for name in sorted(then.keys() | now.keys())
                if then.get(name) != now.get(name)
            )
            raise ValueError(
                f"{checkpoint.path} comes from a run with other settings: {differences}. Take its "
                "settings to resume it, or another folder to start anew."
            )
        return checkpoint

    def load(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        """Loads what `save` was given, in place, whatever the number of ranks and sharding plan.

        All ranks must call it. An optimizer that makes its state in its first step, such as
        TorchRec's `KeyedOptimizerWrapper`, needs its `init_state()` before.
        """
        # The default, made for FSDP, leaves out tables without a shard on this rank. It then takes
        # the checkpoint for one of torch 2.3 and asks for SGD's state, which has no tensors.
        planner = DefaultLoadPlanner(flatten_sharded_tensors=False)
        dcp.load(state, checkpoint_id=checkpoint.path, planner=planner)

    def _whole(self) -> list[Checkpoint]:
        """The whole checkpoints on disk, oldest first."""
        found = []
        for path in sorted(self.folder.glob("step-*")):
            try:
                found.append(read(path))
            except (OSError, ValueError) as error:
                warnings.warn(f"{path} is not a whole checkpoint, skipped: {error}", stacklevel=3)
        return found

    def _prune(self, step: int) -> None:
        """Deletes the checkpoints up to this step, and their remains, but the last `keep`."""
        whole = [checkpoint for checkpoint in self._whole() if checkpoint.step <= step]
        kept = {checkpoint.path for checkpoint in whole[-self.keep :]}
        for path in self.folder.glob("step-*"):
            if path not in kept and path.name <= _name(step):
                shutil.rmtree(path)


def read(path: Path) -> Checkpoint:
    """What the manifest of a checkpoint says.

    Raises:
        OSError: a file is missing.
        ValueError: a file is cut short.
    """
    manifest = json.loads((path / MANIFEST).read_text())  # its JSONDecodeError is a ValueError
    for name, size in manifest.pop("files").items():
        if (found := (path / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found} bytes instead of {size}")
    return Checkpoint(path, **manifest)


def _name(step: int) -> str:
    return f"step-{step:08}"
