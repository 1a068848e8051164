"""Does FrequencySGD learn as well as other optimizers? `python -m benchmarks.study --help`."""
