"""The commands of ``python -m torchrec_freq``, a module each; the core does not import them."""
