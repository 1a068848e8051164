"""The batches of a rank, read ahead of the training."""

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES
from torchrec.datasets.utils import Batch

from examples.criteo.days import Days, single_ids


class Batches:
    """This rank's share of each global batch, by its number.

    Batch k is samples [k * batch_size, (k + 1) * batch_size) of a sequence, and the ranks share it
    in order, so that what is trained does not depend on how many they are. No rank goes without:
    a rest of fewer samples than ranks is part of the batch before it.

    Args:
        days: the sequence.
        part: its samples start to stop.
        rows: of each table, where ids are taken modulo them.
        batch_size: samples, all ranks.
        whole: leaves out what does not fill a batch.
        order_seed: takes the batches of each pass in another random order; None: in order.
    """

    def __init__(
        self,
        days: Days,
        part: range,
        *,
        rows: Sequence[int] | None,
        batch_size: int,
        whole: bool = False,
        order_seed: int | None = None,
    ) -> None:
        self._days, self._part, self._batch_size = days, part, batch_size
        self._rows = None if rows is None else np.array(rows)
        wide = any(day.files["sparse"].dtype == np.int64 for day in days.days)
        self._id_dtype = np.int64 if wide and rows is None else np.int32
        self._order_seed, self._whole = order_seed, whole
        full, rest = divmod(len(part), batch_size)
        self.steps = full if whole else max(full + (rest >= dist.get_world_size()), 1)
        """Batches in a pass."""

    def __getitem__(self, step: int) -> Batch:
        """Batch of a step, counted from 0 over all passes."""
        epoch, number = divmod(step, self.steps)
        if self._order_seed is not None:
            number = int(_order(self._order_seed, epoch, self.steps)[number])
        batch = self._part[number * self._batch_size :]
        if number < self.steps - 1 or self._whole:
            batch = batch[: self._batch_size]
        # As torch.tensor_split has it: the first ranks have one sample more.
        rank = dist.get_rank()
        size, more = divmod(len(batch), dist.get_world_size())
        start = batch.start + rank * size + min(rank, more)
        samples = self._days.read(start, start + size + (rank < more))
        ids = samples["sparse"] if self._rows is None else samples["sparse"] % self._rows
        ids_BF = torch.from_numpy(ids.astype(self._id_dtype, copy=False))
        dense_BD, labels_B = (torch.from_numpy(samples[kind]) for kind in ("dense", "labels"))
        return single_ids(DEFAULT_CAT_NAMES, ids_BF, dense_BD, labels_B.flatten())


@functools.lru_cache(maxsize=2)  # threads may be on either side of an epoch's end
def _order(seed: int, epoch: int, steps: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(steps)


def read_ahead(batches: Batches, steps: range, threads: int) -> Iterator[Batch]:
    """The batches of some steps in order, each thread one ahead. Pinned where there is a GPU.

    Threads, as reading files and copying arrays leave Python to others; processes would have to be
    told apart from the ranks by whoever sends signals to a job.
    """

    def read(step: int) -> Batch:
        batch = batches[step]
        return batch.pin_memory() if torch.cuda.is_available() else batch

    with ThreadPoolExecutor(threads, "read") as pool:
        pending: deque[Future[Batch]] = deque()
        for step in steps:
            pending.append(pool.submit(read, step))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
