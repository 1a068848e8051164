"""What the benchmarks and the examples share: data, ranks, checkpoints, training."""
