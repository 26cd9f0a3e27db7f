#!/usr/bin/env bash
# Builds a wheel from a clean state and installs it. The Python is the one on the PATH, or $PYTHON.
#   NVSHMEM_DIR, TORCH_CUDA_ARCH_LIST, MAX_JOBS, …: see README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python3}

# build/ also holds the Makefile's folders: only what setuptools leaves there goes.
rm -rf dist build/lib.* build/temp.* build/bdist.* ./*.egg-info deep_ep_cpp.*.so deep_ep_bench_cpp.*.so

# With the build requirements at hand nothing is downloaded, so this works on a machine without a network.
isolation=()
if "$python" -c 'import pybind11, setuptools; assert int(setuptools.__version__.split(".")[0]) >= 71' 2>/dev/null; then
    isolation=(--no-build-isolation)
fi
"$python" -m pip wheel . --no-deps --wheel-dir dist "${isolation[@]}"
"$python" -m pip install --no-deps --force-reinstall dist/deep_ep-*.whl

if ! "$python" -c 'import torch' 2>/dev/null; then
    echo 'deep_ep is installed; it needs PyTorch to run, and this Python has none (any torch >= 2.1 will do).'
fi
