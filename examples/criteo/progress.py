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
        self._folder, self._first = folder, dist.get_rank() == 0
        self._writer = SummaryWriter(str(folder), purge_step=step + 1) if self._first else None

    def say(self, text: str) -> None:
        if self._first:
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
        try:
            if self._writer is not None:
                getattr(self._writer, method)(*arguments)
        except OSError as error:
            self._writer = None
            self.say(f"{self._folder}: no more figures are kept: {error}")


def table(summary: Mapping[str, Any]) -> str:
    """How a run ended, as Markdown."""
    lines = ["| | |", "|---|---|"]
    for name, value in summary.items():
        if isinstance(value, dict) and name in ("valid", "test"):
            lines += [f"| {name}, {figure} | {number:.4f} |" for figure, number in value.items()]
        elif isinstance(value, (str, int)):
            lines.append(f"| {name} | {value} |")
        elif isinstance(value, float):
            lines.append(f"| {name} | {value:.5g} |")
    return "\n".join(lines)
