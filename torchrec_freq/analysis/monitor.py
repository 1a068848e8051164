"""What the counts say while training: a few numbers a table, to TensorBoard or any callable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_freq.analysis.rates import QUANTILES, RatesByCount, learning_rates, sum_rates
from torchrec_freq.analysis.traffic import BINS, CHUNK_ROWS, CountHistogram, sum_by_count
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

    For a table that :func:`torchrec_freq.row_counts` calls ``item`` it writes

    - ``item/rows_seen``: share of the rows that have been looked up, 0 to 1;
    - ``item/lookups``: sum of the counts, so lookups so far, halved by ``half_life``;
    - ``item/top_1pct_lookups``: share of the lookups that go to the 1% most frequent rows;
    - ``item/scale``: root mean square of the gradient of an occurrence;
    - ``item/count_p50``, ``_p90``, ``_p99``, ``_max``: quantiles of the counts of the rows that
      have been seen;
    - ``item/lr_at_p50`` and so on: learning rate of the rows with such a count, their geometric
      mean (:func:`torchrec_freq.learning_rates`);
    - ``item/lr_spread_at_p50`` and so on: the factor within which two thirds of them are.

    What is not known yet is left out: counts and rates before the first lookup, rates and scale
    before the first gradient. Counts below 128 are exact, larger ones within 1.6%. Column shards
    have rates of their own, which all enter.

    Between two writes nothing is computed and nothing sent. To write, each rank sums over the rows
    of its shards, on its device, and the sums go over the ranks: one all-reduce of some 70 KB a
    table.

    Args:
        model: sharded, with tables that train with FrequencySGD.
        every: steps between two writes, at least 1; those divisible by it are written.
        write: a TensorBoard ``SummaryWriter``, or a callable that is given the step and the numbers
            by name. Other ranks than 0 may give None.

    Raises:
        ValueError: a wrong argument, or no table of the model trains with FrequencySGD.
    """

    def __init__(self, model: nn.Module, *, every: int = 1000, write: Writer | Any | None) -> None:
        if type(every) is not int or every < 1:
            raise ValueError(f"Invalid every value: {every!r}. Must be a whole number >= 1.")
        named_tables(model)  # there are some
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._write = _writer(write) if rank == 0 else None
        self._model, self._every = model, every

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
        return {
            f"{name}/{key}": value
            for name, (handle, table) in named_tables(self._model).items()
            for key, value in _read(handle, table.name).items()
        }


def _read(handle: FrequencyTables, name: str) -> dict[str, float]:
    config, device = handle.tables[name].config, handle.totals.values.device
    sums_6B = torch.zeros(6, BINS, dtype=torch.float64, device=device)
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    for shard in handle.shards_of(name):
        totals = handle.table_totals(name).clone()
        if not shard.first:
            continue
        lr = shard.learning_rate()
        for counts_R, sums_R in zip(
            shard.counts.split(CHUNK_ROWS), shard.sums.split(CHUNK_ROWS), strict=True
        ):
            if shard.primary:
                sums_6B[:2] += sum_by_count(counts_R, torch.ones_like(counts_R), counts_R)
            rates_R = learning_rates(config, counts_R, sums_R, totals, lr)
            sums_6B[2:] += sum_rates(counts_R, rates_R)
    if handle.process_group is not None and handle.process_group.size() > 1:
        dist.all_reduce(sums_6B, group=handle.process_group)
        dist.all_reduce(totals, dist.ReduceOp.MAX, group=handle.process_group)
    return _numbers(sums_6B.cpu(), totals.cpu())


def _numbers(sums_6B: Tensor, totals: Tensor) -> dict[str, float]:
    histogram, rates = CountHistogram.of_bins(sums_6B[:2]), RatesByCount(sums_6B[2:])
    numbers = {
        "rows_seen": histogram.rows_seen / histogram.rows,
        "lookups": histogram.lookups,
        "top_1pct_lookups": histogram.top_share(histogram.rows / 100),
    }
    if totals[2] > 0:
        numbers["scale"] = float(totals[1] / totals[2]) ** 0.5
    for quantile, share in QUANTILES.items() if histogram.rows_seen else ():
        count = numbers[f"count_{quantile}"] = histogram.quantile(share)
        if rate := rates.at(count):
            numbers[f"lr_at_{quantile}"], numbers[f"lr_spread_at_{quantile}"] = rate
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
