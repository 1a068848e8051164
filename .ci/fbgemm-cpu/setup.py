"""Package `fbgemm-gpu` without files that stands for FBGEMM's CPU build.

TorchRec requires the distribution `fbgemm-gpu`, the CUDA build, which cannot be imported without
the NVIDIA driver and would overwrite `fbgemm-gpu-cpu`, as both own the folder fbgemm_gpu/. With
this package installed pip sees the requirement fulfilled, now and in every later install.

    FBGEMM_VERSION=1.8.0 pip install .ci/fbgemm-cpu
"""

import os

from setuptools import setup

version = os.environ.get("FBGEMM_VERSION")
if not version:
    raise SystemExit("FBGEMM_VERSION is not set: set it to the FBGEMM release, such as 1.8.0.")

setup(
    name="fbgemm-gpu",
    version=version,
    description="Stands for FBGEMM's CPU build where a package requires fbgemm-gpu",
    install_requires=[f"fbgemm-gpu-cpu=={version}"],
    packages=[],
    py_modules=[],
)
