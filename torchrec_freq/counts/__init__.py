"""Counts where no model is: form, files, checkpoints, data sets, row-wise Adagrad's sums."""
