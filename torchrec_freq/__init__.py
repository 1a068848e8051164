"""Frequency-aware fused optimizer for TorchRec's sharded embedding tables.

Importing this package registers :class:`FrequencySGD` with TorchRec.
"""

from torchrec_freq import _versions

_versions.check()  # before anything fails on import

from torchrec_freq.analysis.monitor import TrainingMonitor
from torchrec_freq.analysis.rates import learning_rates
from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counts.files import CountsFile, load_counts, save_counts
from torchrec_freq.counts.ids import count_ids
from torchrec_freq.counts.state import COUNT_CEILING, TableState
from torchrec_freq.counts.stored import read_table_states
from torchrec_freq.model_state import (
    adagrad_sums,
    evict_rows,
    load_adagrad_sums,
    load_row_counts,
    load_table_states,
    row_counts,
    table_states,
)
from torchrec_freq.optimizer import FrequencySGD
from torchrec_freq.sharded.install import install
from torchrec_freq.sharded.opt_in import fused_params

install()

__version__ = _versions.__version__
__all__ = [
    "COUNT_CEILING",
    "CountsFile",
    "FrequencyConfig",
    "FrequencySGD",
    "TableState",
    "TrainingMonitor",
    "adagrad_sums",
    "count_ids",
    "evict_rows",
    "fused_params",
    "learning_rates",
    "load_adagrad_sums",
    "load_counts",
    "load_row_counts",
    "load_table_states",
    "read_table_states",
    "row_counts",
    "save_counts",
    "table_states",
]
