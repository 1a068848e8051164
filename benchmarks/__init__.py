"""Measurements: what a step costs, and how the optimizers learn."""
