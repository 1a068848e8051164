"""Pictures as PNG, in one style: the same for the same figures, on any background."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import matplotlib

from torchrec_freq.output import writing

GREY: Final = "#808080"  # legible on white and on black
INKS: Final = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLE: Final = dict.fromkeys((*INKS, "grid.color"), GREY) | {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": "medium",
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


@contextlib.contextmanager
def picture(path: Path) -> Iterator[Any]:
    """A matplotlib figure to paint, which becomes a file."""
    matplotlib.use("Agg")  # a file, no window
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure = pyplot.figure(layout="constrained")
        yield figure
        with writing(path) as file:
            figure.savefig(file, format="png", dpi=120, transparent=True)
        pyplot.close(figure)
