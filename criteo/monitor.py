"""What a run reports: lines and TensorBoard files along the way, a summary at its end."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard.writer import SummaryWriter

from torchrec_freq.output import write_text


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


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        steps, samples: trained over all restarts.
        seconds: of training, without evaluations and checkpoints.
        train_loss: mean over the last steps before the end.
        valid, test: AUC and log loss.
        optimizer_bytes_per_row: state of the tables' optimizer.
        bad_rows: left out.
    """

    steps: int
    samples: int
    ranks: int
    device: str
    seconds: float
    train_loss: float | None
    valid: dict[str, float]
    test: dict[str, float]
    optimizer_bytes_per_row: float
    bad_rows: int
    checkpoint: str
    curve: list[dict[str, Any]]
    settings: dict[str, Any]

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    def write(self, path: Path) -> None:
        content = {**vars(self), "samples_per_second": self.samples_per_second}
        write_text(path, json.dumps(content, indent=1) + "\n")

    def table(self) -> str:
        """As Markdown."""
        lines = [
            ("steps", f"{self.steps:,}"),
            ("samples", f"{self.samples:,}"),
            ("ranks", f"{self.ranks} ({self.device})"),
            ("training time, s", f"{self.seconds:,.1f}"),
            ("samples/s", f"{self.samples_per_second:,.0f}"),
            ("train loss", "" if self.train_loss is None else f"{self.train_loss:.4f}"),
            *(
                (f"{split} {title}", f"{figures[name]:.4f}")
                for split, figures in (("validation", self.valid), ("test", self.test))
                for name, title in (("auc", "AUC"), ("log_loss", "log loss"))
            ),
            ("optimizer state, bytes a row", f"{self.optimizer_bytes_per_row:g}"),
            ("bad rows left out", f"{self.bad_rows:,}"),
            ("last checkpoint", self.checkpoint),
        ]
        rows = [f"| {name} | {value} |" for name, value in lines]
        return "\n".join(["| | |", "|---|---|", *rows])
