"""Does FrequencySGD learn as well as other optimizers? `python -m examples.study --help`."""
