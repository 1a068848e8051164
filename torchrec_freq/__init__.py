"""Frequency-aware fused optimizer for TorchRec's sharded embedding tables.

Importing this package registers :class:`FrequencySGD` with TorchRec.
"""

from torchrec_freq import _versions

_versions.check()

from torchrec_freq.config import FrequencyConfig  # noqa: E402
from torchrec_freq.counters import COUNT_CEILING  # noqa: E402
from torchrec_freq.files import CountsFile, load_counts, save_counts  # noqa: E402
from torchrec_freq.optimizer import FrequencySGD  # noqa: E402
from torchrec_freq.register import fused_params, install  # noqa: E402
from torchrec_freq.state import load_row_counts, row_counts  # noqa: E402

install()

__version__ = _versions.__version__
__all__ = [
    "COUNT_CEILING",
    "CountsFile",
    "FrequencyConfig",
    "FrequencySGD",
    "fused_params",
    "load_counts",
    "load_row_counts",
    "row_counts",
    "save_counts",
]
