"""Measurements: a step beside other optimizers, how they learn, a switch from row-wise Adagrad."""
