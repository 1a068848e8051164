"""The sums of each table over its rows: squares and occurrences, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counts.state import STATE_FORMAT, TOTALS
from torchrec_freq.rule import cap_squares, mean_square, sample_weight

_CLAMP_STEPS: Final = 1024
"""Steps after which counts are kept from overflowing: a row may occur 2^20 times in each."""


class TableTotals:
    r""":math:`G_t`, :math:`C_t` and the steps that they stand for, of some tables.

    In a sampled step the shards of a table add what they saw. At the end of its backward the sums
    go over the ranks, once for all tables. So between steps everything here is of the same moment,
    and nothing is pending.

    Args:
        configs: the rule's settings for each table, in the same order on every rank.
        device: where the gradients are.
        group: the ranks whose shards add to the same tables; None where each table lies whole on
            one rank, or where there is one process.

    Attributes:
        values: float64 [tables, 4] on the device: ``STATE_FORMAT``, :math:`G_t`, :math:`C_t` and
            the steps that they stand for. May be written between steps.
        ages: int64 [tables] on the CPU: steps since each table was last halved. They say which
            steps are sampled. May be written between steps.
    """

    @torch.inference_mode(False)  # what is made here is trained with, whoever asks for it
    def __init__(
        self,
        configs: Sequence[FrequencyConfig],
        device: torch.device | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._half_lives = [config.half_life for config in configs]
        self._group = group
        # Row-wise Adagrad and the paper's rule go without.
        self._wanted = any(c.normalize is not None and c.prior_count > 0 for c in configs)
        self.values = torch.zeros(len(configs), TOTALS, dtype=torch.float64, device=device)
        self.values.select(1, 0).fill_(STATE_FORMAT)
        self.ages = torch.zeros(len(configs), dtype=torch.int64)
        self._added = self.values.new_zeros(len(configs), 3)
        self._rho: tuple[int, Tensor] | None = None
        self._halve: list[Callable[[int], None]] = []
        self._clamp: list[Callable[[], None]] = []
        self._backward: int | None = None
        self._stream: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # The tensors of a copy count their versions from the start.
        return {**self.__dict__, "_rho": None}

    def listen(self, halve: Callable[[int], None], clamp: Callable[[], None]) -> None:
        """Calls ``halve`` with each table whose half-life is over, and ``clamp`` now and then."""
        self._halve.append(halve)
        self._clamp.append(clamp)

    def rho(self) -> Tensor:
        r"""float32 [tables]: :math:`\rho_t = G_t / C_t`."""
        version = self.values._version
        if self._rho is None or self._rho[0] != version:
            _, squares_T, counts_T, _ = self.values.unbind(1)
            self._rho = version, mean_square(squares_T, counts_T)
        return self._rho[1]

    def sampled(self) -> bool:
        """Whether this step is sampled."""
        return any(map(sample_weight, set(self.ages.tolist())))

    def add(
        self,
        position_F: Tensor,
        squares_F: Tensor,
        occurrences_F: Tensor,
        shares_F2: Tensor | None = None,
    ) -> None:
        """Adds what a shard saw in a backward of a sampled step.

        Args:
            position_F: int64 [features] table of each.
            squares_F: float64 [features] sum over the rows of the mean square of the gradient, over
                the columns of the shard.
            occurrences_F: float64 [features] occurrences that the squares are of.
            shares_F2: float64 [features, 2] what of them is the shard's: its part of the columns;
                1 for one of the shards that hold the same rows, 0 for the others. None: all.
        """
        step_F2 = torch.stack([squares_F, occurrences_F], dim=1).to(torch.float64)
        if shares_F2 is not None:
            step_F2.mul_(shares_F2)
        self._added.narrow(1, 0, 2).index_add_(0, position_F, step_F2)

    def end_with_backward(self) -> None:
        """Ends the step when the backward that is under way has ended.

        All ranks must call it in the same backwards. By then each has issued the other exchanges of
        the backward, so this one comes at the same place on every rank.
        """
        backward = torch._C._current_graph_task_id()
        if self._backward == backward:
            return
        self._backward = backward
        if self.values.is_cuda:
            # Where what has been added so far was computed.
            self._stream = torch.cuda.current_stream(self.values.device)
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        if self._stream is None:
            self.end_step()
            return
        with torch.cuda.stream(self._stream):
            self.end_step()
        torch.cuda.current_stream(self.values.device).wait_stream(self._stream)

    @torch.no_grad()
    def end_step(self) -> None:
        """Takes in what was added, over all ranks, and ages. No device waits for its host."""
        ages = self.ages.tolist()
        weights = [sample_weight(age) for age in ages]
        if self._wanted and any(weights):
            if self._group is not None:
                dist.all_reduce(self._added, group=self._group, async_op=True).wait()
            self._take_in(weights)
        self.ages += 1
        for table, age in enumerate(ages):
            half_life = self._half_lives[table]
            if half_life is not None and age + 1 >= half_life:
                self.ages[table] = 0
                self.values.select(0, table).narrow(0, 1, 3).mul_(0.5)
                for halve in self._halve:
                    halve(table)
        if any(age % _CLAMP_STEPS == 0 for age in ages):
            for clamp in self._clamp:
                clamp()
        self.rho()

    def _take_in(self, weights: Sequence[int]) -> None:
        _, total_T, _, steps_T = self.values.unbind(1)
        squares_T, occurrences_T, seen_T = self._added.unbind(1)
        torch.minimum(squares_T, cap_squares(total_T, steps_T), out=squares_T)
        torch.gt(occurrences_T, 0, out=seen_T)
        if len(set(weights)) == 1:
            self.values.narrow(1, 1, 3).add_(self._added, alpha=weights[0])
        else:
            # Tables of different ages, as after loading one of them.
            weight_T = torch.tensor(weights, dtype=torch.float64, device=self.values.device)
            self.values.narrow(1, 1, 3).addcmul_(self._added, weight_T.unsqueeze(1))
        self._added.zero_()
