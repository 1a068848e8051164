"""TorchRec's planner, which knows from counts which rows are hot."""

from torchrec_freq.planner.estimates import make_planner

__all__ = ["make_planner"]
