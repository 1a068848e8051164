"""What a run reports: lines and TensorBoard files along the way, a table at its end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard.writer import SummaryWriter


class Monitor:
    """Prints figures and writes them to TensorBoard, on rank 0 only.

    Args:
        folder: of the TensorBoard files.
        step: where the run starts; later figures of a run that was cut off are hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._failed = folder, False
        self._writer = None
        if dist.get_rank() == 0:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def say(self, text: str) -> None:
        if self._writer is not None:
            print(text, flush=True)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures by TensorBoard tag."""
        for tag, value in figures.items():
            self._write("add_scalar", tag, value, step)

    def flush(self) -> None:
        self._write("flush")

    def close(self) -> None:
        self._write("close")

    def _write(self, method: str, *arguments: Any) -> None:
        """Training does not end where figures cannot be kept, as on a full disk."""
        if self._writer is None or self._failed:
            return
        try:
            getattr(self._writer, method)(*arguments)
        except OSError as error:
            self._failed = True
            self.say(f"{self._folder}: no more figures are kept: {error}")


def table(summary: Mapping[str, Any]) -> str:
    """How a run ended, as Markdown."""
    loss = summary["train_loss"]
    lines = {
        "steps": f"{summary['steps']:,}",
        "samples": f"{summary['samples']:,}",
        "ranks": f"{summary['ranks']} ({summary['device']})",
        "training time, s": f"{summary['seconds']:,.1f}",
        "samples/s": f"{summary['samples_per_second']:,.0f}",
        "train loss": "" if loss is None else f"{loss:.4f}",
        **{
            f"{title} {name}": f"{summary[split][metric]:.4f}"
            for split, title in (("valid", "validation"), ("test", "test"))
            for metric, name in (("auc", "AUC"), ("log_loss", "log loss"))
        },
        "optimizer state, bytes a row": f"{summary['optimizer_bytes_per_row']:g}",
        "bad rows left out": f"{summary['bad_rows']:,}",
        "last checkpoint": summary["checkpoint"],
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {lines[name]} |" for name in lines)])
