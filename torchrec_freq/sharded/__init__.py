"""TorchRec's sharded modules: opt-in, kernels, tables over all ranks, checkpoints."""
