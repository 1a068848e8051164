"""The embedding tables of an arm: FBGEMM's own, the engine's, or an ablation on FBGEMM's kernel."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    CounterBasedRegularizationDefinition,
    CounterWeightDecayMode,
    LearningRateMode,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor, nn

from torchrec_freq import FrequencyConfig
from torchrec_freq.engine.tbe import FrequencyTBE

COLUMNS: Final = 16
CUDA: Final = torch.cuda.is_available()
DEVICE: Final = torch.device("cuda" if CUDA else "cpu")
EPS: Final = 1e-8


def _counting(mode: CounterWeightDecayMode, lr_mode: LearningRateMode) -> dict[str, Any]:
    """FBGEMM's row-wise Adagrad with counters; TorchRec passes these on in `fused_params`."""
    rule = CounterBasedRegularizationDefinition(
        counter_weight_decay_mode=mode, learning_rate_mode=lr_mode
    )
    return {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "weight_decay_mode": WeightDecayMode.COUNTER,
        "counter_based_regularization": rule,
    }


STOCK: Final[dict[str, dict[str, Any]]] = {
    "RowWiseAdagrad": {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD},
    "ConstantStart": {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD},
    "Adagrad": {"optimizer": EmbOptimType.EXACT_ADAGRAD},
    "SGD": {"optimizer": EmbOptimType.EXACT_SGD},
    "Adam": {"optimizer": EmbOptimType.ADAM},
    "CounterSGD": _counting(CounterWeightDecayMode.NONE, LearningRateMode.COUNTER_SGD),
    "AdagradW": _counting(CounterWeightDecayMode.ADAGRADW, LearningRateMode.EQUAL),
    "CounterDecay": _counting(CounterWeightDecayMode.DECOUPLE, LearningRateMode.EQUAL),
}
ONLY_CUDA: Final = ("Adam",)  # FBGEMM has it nowhere else


class Tables(nn.Module):
    """Embedding tables that are trained in the backward of what they return.

    Args:
        rows: of each table.
        weights: float32 [all rows, COLUMNS]: the initial values.
        optimizer: "FrequencySGD" or a key of `STOCK`.
        options: of the optimizer.
    """

    def __init__(
        self,
        rows: Sequence[int],
        weights: Tensor,
        optimizer: str,
        lr: float,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
        if not CUDA:
            place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
        specs = [(count, COLUMNS, *place) for count in rows]
        options = dict(options)
        self.constant = options.pop("constant", None)
        if optimizer == "FrequencySGD":
            config = FrequencyConfig(**options)
            self.tbe = FrequencyTBE(specs, learning_rate=lr, frequency=config)
        else:
            options = {"eps": EPS, **STOCK[optimizer], **options}
            self.tbe = SplitTableBatchedEmbeddingBagsCodegen(specs, learning_rate=lr, **options)
        self.totals = None
        if self.constant is not None:
            self.totals = Totals(self.tbe, rows, self.constant)
        parts = weights.split(list(rows))
        for table, values in zip(self.tbe.split_embedding_weights(), parts, strict=True):
            table.data.copy_(values)

    def forward(self, ids_BF: Tensor) -> Tensor:
        """float32 [samples, features, COLUMNS] rows of int64 [samples, features] ids."""
        ids_L = ids_BF.T.flatten()
        offsets = torch.arange(len(ids_L) + 1, device=ids_L.device)
        output_BX: Tensor = self.tbe(ids_L, offsets)
        if self.totals is not None and output_BX.grad_fn is not None:
            self.totals.watch(output_BX.grad_fn, ids_BF)
        return output_BX.view(len(ids_BF), -1, COLUMNS)


class Totals:
    """Row-wise Adagrad whose sums begin at ``constant`` times the table's mean square so far.

    The ablation of damping: what a row gets is the same however often it has occurred. As with
    FrequencySGD the mean is of the squares of single occurrences, and moves with the table.
    """

    def __init__(
        self, tbe: SplitTableBatchedEmbeddingBagsCodegen, rows: Sequence[int], constant: float
    ) -> None:
        self._tbe, self._constant = tbe, constant
        self._first_F = torch.tensor([0, *rows[:-1]], device=DEVICE).cumsum(0)
        self._squares_F = torch.zeros(len(rows), dtype=torch.float64, device=DEVICE)
        self._occurrences = 0

    def watch(self, node: Any, ids_BF: Tensor) -> None:
        """Adds to the sums before FBGEMM's update, and takes it out of them after it."""
        table_U, rows_U = self._rows(ids_BF)
        sums = self._tbe.momentum1_dev if CUDA else self._tbe.momentum1_host
        own_U = sums.data[rows_U]
        mean_F = (self._squares_F / max(self._occurrences, 1)).float()
        written_U = own_U + self._constant * mean_F[table_U]

        def before(_: Any) -> None:
            sums.data[rows_U] = written_U

        def after(*_: Any) -> None:
            squares_U = sums.data[rows_U] - written_U
            sums.data[rows_U] = own_U + squares_U
            self._squares_F.index_add_(0, table_U, squares_U.double())
            self._occurrences += len(ids_BF)

        node.register_prehook(before)
        node.register_hook(after)

    def _rows(self, ids_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Table and row of each distinct id, as int64 [distinct]."""
        rows_U = (ids_BF + self._first_F).unique()
        return torch.searchsorted(self._first_F, rows_U, right=True) - 1, rows_U
