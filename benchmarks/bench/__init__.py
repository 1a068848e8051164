"""What a step costs, beside row-wise Adagrad's: ``python -m benchmarks.bench --help``."""
