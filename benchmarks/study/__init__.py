"""The study: FrequencySGD beside other optimizers, on public data or on a file of yours."""
