"""Frequency-aware fused optimizer for TorchRec's sharded embedding tables.

Importing this package registers :class:`FrequencySGD` with TorchRec.
"""

import sys

from torchrec_freq import _versions

try:
    _versions.check()
except _versions.StackError as refusal:
    # What `python -m torchrec_freq` is called while the package is imported.
    if sys.argv[:1] == ["-m"] and "torchrec_freq" in sys.orig_argv:
        sys.exit(str(refusal))
    raise

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.engine.counters import COUNT_CEILING
from torchrec_freq.files import CountsFile, load_counts, save_counts
from torchrec_freq.monitor import TrainingMonitor
from torchrec_freq.optimizer import FrequencySGD
from torchrec_freq.sharded.counts import load_row_counts, row_counts
from torchrec_freq.sharded.install import install
from torchrec_freq.sharded.opt_in import fused_params

install()

__version__ = _versions.__version__
__all__ = [
    "COUNT_CEILING",
    "CountsFile",
    "FrequencyConfig",
    "FrequencySGD",
    "TrainingMonitor",
    "fused_params",
    "load_counts",
    "load_row_counts",
    "row_counts",
    "save_counts",
]
