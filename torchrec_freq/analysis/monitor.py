"""What the counts say while training: a few numbers a table, to TensorBoard or any callable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_freq.analysis.rates import QUANTILES, learning_rates
from torchrec_freq.analysis.traffic import BINS, CountHistogram, sample_bin_counts
from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counts.state import TOTALS
from torchrec_freq.model_state import named_tables
from torchrec_freq.sharded.tables import FrequencyTables

Writer = Callable[[int, dict[str, float]], object]


class TrainingMonitor:
    """Writes numbers of each table every so many steps.

    All ranks make it and call :meth:`step`; rank 0 writes.

    >>> monitor = TrainingMonitor(model, write=SummaryWriter("runs/mine"))  # doctest: +SKIP
    >>> for step, batch in enumerate(batches):  # doctest: +SKIP
    ...     train(batch)
    ...     monitor.step(step)

    Of a table that :func:`torchrec_freq.row_counts` calls ``item`` it writes

    - ``item/rows_seen``: share of the rows that have been looked up, 0 to 1;
    - ``item/lookups``: sum of the counts, so lookups so far, halved by ``half_life``;
    - ``item/top_1pct_lookups``: share of the lookups that go to the 1% most frequent rows;
    - ``item/count_p50``, ``_p90``, ``_p99``, ``_max``: quantiles of the counts of the rows that
      have been seen;
    - ``item/lr_at_p50``, ``_p90``, ``_p99``, ``_max``: learning rate of a row with such a count,
      as :func:`torchrec_freq.learning_rates` says, with the current ``lr``;
    - ``item/scale``: root mean square of the gradient of an occurrence, where the table is
      normalized.

    What is not known yet is left out: counts and rates before the first lookup, rates and scale
    before the first gradient. Counts below 128 are exact, larger ones within 1.6%.

    Between two writes nothing is computed and nothing sent. To write, each rank bins the counts of
    its shards on its device, and the bins are summed over the ranks: one all-reduce of some 30 KB a
    table for each sharded module. Of shards with more than ``max_rows`` rows a sample is binned:
    :func:`torchrec_freq.analysis.traffic.sample_bin_counts` says how, and with what error.

    Args:
        model: sharded, with tables that train with FrequencySGD.
        every: steps between two writes, at least 1; those divisible by it are written.
        write: a TensorBoard ``SummaryWriter``, or a callable that is given the step and the numbers
            by name. Other ranks than 0 may give None.
        max_rows: of a shard, those that are binned at most, at least 1; None for all. With the
            default a share of the rows is within 0.0003, and one of the lookups of a shard of 100
            million rows within 0.0024 (standard errors).

    Raises:
        ValueError: a wrong argument, or no table of the model trains with FrequencySGD.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1000,
        write: Writer | Any | None,
        max_rows: int | None = 1 << 22,
    ) -> None:
        for name, value in (("every", every), ("max_rows", 1 if max_rows is None else max_rows)):
            if type(value) is not int or value < 1:
                raise ValueError(f"Invalid {name} value: {value!r}. Must be a whole number >= 1.")
        named_tables(model)  # there are some
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._write = _writer(write) if rank == 0 else None
        self._model = model
        self._every = every
        self._max_rows = max_rows

    def step(self, step: int) -> None:
        """Writes the numbers if ``step`` is divisible by ``every``. All ranks must call it.

        Args:
            step: number of the step, from 0, as the writer is to show it.
        """
        if step % self._every:
            return
        numbers = self.read()
        if self._write is not None:
            self._write(step, numbers)

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """The numbers by name, now and the same on every rank. All ranks must call it."""
        numbers: dict[str, float] = {}
        sums: dict[FrequencyTables, Tensor] = {}
        for name, (handle, table) in named_tables(self._model).items():
            if handle not in sums:
                sums[handle] = self._sum(handle)
            sums_X = sums[handle][handle.positions[table.name]]
            histogram = CountHistogram.of_bins(sums_X[: 2 * BINS].view(2, -1))
            *totals, lr = sums_X[2 * BINS :].tolist()
            values = _numbers(histogram, table.config, totals, lr)
            numbers.update({f"{name}/{key}": value for key, value in values.items()})
        return numbers

    def _sum(self, handle: FrequencyTables) -> Tensor:
        """float64 [tables, 2 * BINS + 5] on the CPU: bins, totals, lr; summed over the ranks."""
        handle.totals.settle()
        values = handle.totals.values
        sums_TX = values.new_zeros(len(handle.tables), 2 * BINS + TOTALS + 1)
        for shard in handle.shards:
            if not shard.primary:
                continue
            sums_X = sums_TX[handle.positions[shard.table]]
            counts_R = shard.tbe.settled_counts(shard.index)
            bins_2B = sample_bin_counts(counts_R, self._max_rows or counts_R.numel())
            sums_X[: 2 * BINS].add_(bins_2B.view(-1))
            if shard.row_offset == 0:  # of all shards of a table, one
                sums_X[2 * BINS : -1] = handle.table_totals(shard.table)
                sums_X[-1] = shard.learning_rate()
        handle.reduce(sums_TX, dist.ReduceOp.SUM)
        return sums_TX.cpu()


def _numbers(
    histogram: CountHistogram, config: FrequencyConfig, totals: Sequence[float], lr: float
) -> dict[str, float]:
    numbers = {
        "rows_seen": histogram.rows_seen / histogram.rows,
        "lookups": histogram.lookups,
        "top_1pct_lookups": histogram.top_share(histogram.rows / 100),
    }
    known = totals[1] > 0 and totals[2] > 0
    if histogram.rows_seen:
        counts = {name: histogram.quantile(share) for name, share in QUANTILES.items()}
        numbers |= {f"count_{name}": count for name, count in counts.items()}
        if known or config.normalize is None:
            rates = learning_rates(config, [*counts.values()], totals if known else None, lr)
            numbers |= {f"lr_at_{name}": r for name, r in zip(counts, rates, strict=True)}
    if known and config.normalize is not None:
        numbers["scale"] = math.sqrt(totals[1] / totals[3])
    return numbers


def _writer(write: Any) -> Writer:
    """A callable of anything that ``write`` may be."""
    if callable(write):
        return write  # type: ignore[no-any-return]
    if not hasattr(write, "add_scalar"):
        raise ValueError(
            f"Invalid write value: {write!r}. Must be a TensorBoard SummaryWriter, or a callable "
            "write(step, numbers)."
        )

    def to_tensorboard(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            write.add_scalar(name, value, step)

    return to_tensorboard
