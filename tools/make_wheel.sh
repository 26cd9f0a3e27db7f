#!/usr/bin/env bash
# Builds the wheel to give away, into dist/: the C++ runtime linked in, the tag that auditwheel finds, the licences inside.
#   WHEEL_CUDA   cuda-12.4 (default): nvcc 12.4 from tools/get_toolkit.sh, whose runtime serves drivers from 525 on;
#                a folder: the toolkit there; off: the CPU device alone
#   WHEEL_PYTHON the Python to build for, with the packages of .venv (default: .venv/bin/python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${WHEEL_PYTHON:-.venv/bin/python}
cuda=${WHEEL_CUDA:-cuda-12.4}
work=$PWD/build/wheel
arguments='-DEP_PORTABLE=ON -DEP_WERROR=ON'

say() { echo "[make_wheel] $*"; }

# The agreement under which the static CUDA runtime may be passed on, where NVIDIA's installers or packages put it.
find_eula() { # toolkit
    local file
    for file in "$1"/EULA.txt "$1"/dist-info/nvidia_cuda_runtime-*/licenses/License.txt; do
        [[ -e $file ]] && echo "$file" && return
    done
    say "no EULA.txt in $1: the wheel may not be given away without it" >&2
    return 1
}

# setuptools packs whatever an earlier build has left there.
rm -rf "$work"/{licenses,raw,dist} build/lib.* build/bdist.*
rm -f "$work/cmake/CMakeCache.txt"
mkdir -p "$work/licenses"
if [[ $cuda == off ]]; then
    arguments+=' -DEP_CUDA=OFF'
else
    [[ -d $cuda ]] || cuda=$(PYTHON=$python tools/get_toolkit.sh "$cuda")
    cp "$(find_eula "$cuda")" "$work/licenses/cuda-eula.txt"
    export CUDACXX=$cuda/bin/nvcc
    arguments+=' -DEP_CUDA=ON'
fi

say "compiling with ${CUDACXX:-no CUDA}"
DEEP_EP_BUILD_DIR=$work/cmake MAX_JOBS=${JOBS:-} CMAKE_ARGS="$arguments ${CMAKE_ARGS:-}" \
    "$python" -m pip --disable-pip-version-check wheel -q . --no-deps --no-build-isolation --wheel-dir "$work/raw"
PATH=$(dirname "$python"):$PATH "$python" -m auditwheel repair --plat auto --wheel-dir "$work/dist" "$work"/raw/*.whl
rm -rf "$work/licenses"
mkdir -p dist
mv "$work"/dist/*.whl dist
say "$(basename "$work"/raw/*.whl): in dist, with the tag that auditwheel found"
