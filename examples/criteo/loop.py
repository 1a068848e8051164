"""The training loop: steps, figures, evaluations, checkpoints, and a clean stop."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from benchmarks.common.checkpoint import Checkpoints, NotSaved, load
from benchmarks.common.training import Figures, Training
from examples.criteo.batches import Batches, read_ahead
from examples.criteo.model import set_rates
from examples.criteo.progress import Monitor
from examples.criteo.refusal import Refused
from examples.criteo.settings import Settings
from torchrec_freq import TrainingMonitor

TERMINATED = 128 + signal.SIGTERM
"""Exit code of a process that SIGTERM ended."""


@dataclass
class Progress:
    """What a checkpoint keeps besides model and optimizers."""

    seconds: float = 0.0  # of training
    train_loss: float | None = None  # mean of the last steps that were logged
    curve: list[dict[str, Any]] = field(default_factory=list)  # one point an evaluation


class Loop:
    """Trains to the last step, from the last checkpoint if there is one.

    Args:
        training: model and optimizers.
        train: batches.
        held_out: batches for the evaluations along the way (`some`) and at the end (`valid` and
            `test`).
        checkpoints: of this run.
    """

    def __init__(
        self,
        settings: Settings,
        training: Training,
        train: Batches,
        held_out: dict[str, Batches],
        checkpoints: Checkpoints,
    ) -> None:
        self.settings, self.training, self.device = settings, training, training.model.device
        self.train, self.held_out, self.checkpoints = train, held_out, checkpoints
        steps = settings.epochs * train.steps
        self.steps = min(steps, settings.max_steps or steps)
        self.step = 0
        self.saved: int | None = None  # step of the last checkpoint
        self.progress = Progress()
        self.terminated = threading.Event()
        self._resume()
        self.monitor = Monitor(settings.out / "tensorboard", self.step)
        self.tables = None
        if settings.optimizer.name == "FrequencySGD":
            self.tables = TrainingMonitor(training.model, every=1, write=self.monitor.log)
        self.pipeline = TrainPipelineSparseDist(
            training.model,
            training.optimizer,
            self.device,
            execute_all_batches=True,
            custom_model_fwd=self._forward,
        )

    def run(self) -> None:
        """Trains, evaluates, and leaves a checkpoint of the last step.

        Raises:
            SystemExit: after SIGTERM on any rank, with a checkpoint, on every rank.
            Refused: the loss is no finite number, on every rank.
            NotSaved: a checkpoint cannot be written, on every rank; the last good one is kept.
        """
        terminated = self.terminated  # alone: the handler outlives this loop and its model
        signal.signal(signal.SIGTERM, lambda *_: terminated.set())
        every = self.settings.evaluation.every
        if self.step:
            self.monitor.say(f"Resumed from {self._path(self.step)}, after {self.step} steps.")
        self.last_save = time.monotonic()
        while self.step < self.steps:
            if every and self.step and self.step % every == 0:
                self._evaluate("some")
            due = (self.step // every + 1) * every if every else self.steps
            self._train_to(min(due, self.steps))
        self._evaluate("valid", "test")
        if self.saved != self.steps:
            self._save()
        self.monitor.close()

    def _train_to(self, stop: int) -> None:
        """Some steps, after which nothing of them is left in the pipeline."""
        source = read_ahead(self.train, range(self.step, stop), self.settings.data.threads)
        loss = torch.zeros((), device=self.device)
        summed = 0
        self.mark = time.monotonic()
        while self.step < stop:
            rate = set_rates(self.training, self.settings.optimizer, self.step)
            loss += self.pipeline.progress(source)[0]  # stays on the device
            self.step, summed = self.step + 1, summed + 1
            if self.step % self.settings.log_every == 0 or self.step == stop:
                self._log(loss / summed, summed, rate)
                loss.zero_()
                summed = 0
        assert next(self._outputs(source), None) is None  # empties the pipeline

    def _outputs(self, source: Iterator[Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Loss, logits and labels, by batch."""
        while True:
            try:
                yield self.pipeline.progress(source)
            except StopIteration:
                return

    def _over_ranks(self, *values: Tensor | float) -> list[float]:
        """Their sums over the ranks; waits for the device."""
        shared = torch.stack([torch.as_tensor(v, device=self.device).float() for v in values])
        dist.all_reduce(shared)
        sums: list[float] = shared.tolist()
        return sums

    def _log(self, loss: Tensor, steps: int, rate: float) -> None:
        """The only place where the host waits for the device, and the ranks agree what to do."""
        minutes = (time.monotonic() - self.last_save) / 60
        due = dist.get_rank() == 0 and minutes >= self.settings.checkpoint.minutes
        total, terminated, save = self._over_ranks(loss, self.terminated.is_set(), due)
        mean, seconds = total / dist.get_world_size(), time.monotonic() - self.mark
        if not math.isfinite(mean):
            raise Refused(
                f"The training loss is {mean} in the {steps} steps up to step {self.step}. Lower "
                "--optimizer.lr or --optimizer.dense_lr, or let --optimizer.warmup steps pass; "
                f"the last checkpoint in {self.checkpoints.folder} is of an earlier step."
            )
        self.progress.seconds += seconds
        self.progress.train_loss = mean
        speed = steps * self.settings.batch_size / seconds
        self.monitor.log(
            self.step, {"train/loss": mean, "train/lr": rate, "train/samples_per_second": speed}
        )
        self.monitor.say(
            f"step {self.step:,} of {self.steps:,}: loss {mean:.4f}, lr {rate:g}, "
            f"{speed:,.0f} samples/s"
        )
        if terminated:
            self._stop()
        if save and self.step < self.steps:
            try:
                self._save()
            except NotSaved as error:
                if self.settings.checkpoint.not_saved == "stop":
                    raise
                self.last_save = time.monotonic()
                self.monitor.say(f"{error}. Training goes on, and will try again.")
        self.mark = time.monotonic()

    @torch.no_grad()
    def _evaluate(self, *splits: str) -> None:
        """Adds a point to the curve, unless a resumed run has it."""
        curve = self.progress.curve
        if curve and curve[-1]["step"] == self.step:
            return
        point: dict[str, Any] = {"step": self.step}
        self.training.model.eval()
        for split in splits:
            batches = self.held_out[split]
            source = read_ahead(batches, range(batches.steps), self.settings.data.threads)
            metrics = Figures(self.device, self.settings.evaluation.thresholds)
            for number, (_, logits, labels) in enumerate(self._outputs(source), start=1):
                metrics.update(logits, labels)
                # It may take long.
                if number % self.settings.log_every == 0 and any(
                    self._over_ranks(self.terminated.is_set())
                ):
                    self._stop()
            figures = metrics.compute()
            name = "test" if split == "test" else "valid"
            point[name] = figures
            self.monitor.log(self.step, {f"{name}/{key}": figures[key] for key in figures})
            self.monitor.say(
                f"step {self.step:,}: {name} AUC {figures['auc']:.4f}, "
                f"log loss {figures['log_loss']:.4f}"
            )
        self.training.model.train()
        if self.tables is not None:  # counts and effective learning rates of each table
            self.tables.step(self.step)
        curve.append(point)

    def _stop(self) -> None:
        if self.saved != self.step:
            self._save()
        self.monitor.say(
            f"Stopped by SIGTERM after step {self.step:,}: saved {self._path(self.step)}. The same "
            "command goes on from there."
        )
        self.monitor.close()
        raise SystemExit(TERMINATED)

    def _save(self) -> None:
        self.checkpoints.save(self.step, self.training.state(), asdict(self.progress))
        self.saved, self.last_save = self.step, time.monotonic()
        self.monitor.flush()

    def _resume(self) -> None:
        """From this run's last checkpoint, or from another run's if one is given."""
        found, other = self.checkpoints.latest(), self.settings.init_from
        if found is not None and found.step > self.steps:
            raise ValueError(
                f"{found.path} is {found.step} steps old, more than this run has ({self.steps}). "
                "Ask for more --epochs or --max_steps, or start anew in another --out."
            )
        if (path := found.path if found else other) is not None:
            # Adam makes its state in its first step: here one without gradients.
            self.training.dense_optimizer.init_state()
            load(path, self.training.state())
        if found is not None:
            self.progress = Progress(**found.progress)
            self.step = self.saved = found.step

    def _forward(self, batch: Any) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.model.autocast):
            return self.training.model(batch)

    def _path(self, step: int) -> str:
        return str(self.checkpoints.folder / f"step-{step:08}")
