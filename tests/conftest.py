"""Settings that every test needs before torch starts its threads."""

import os

# Several ranks share the cores, and gloo must not be reachable from outside.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
