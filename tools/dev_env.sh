#!/usr/bin/env bash
# Brings what the Makefile's tasks stand on.
#   dev_env.sh system build|test|lint   system packages, through apt-get where we may
#   dev_env.sh venv base|demo|all       .venv: to build with; with torch, to run the demo; with all tools
#   dev_env.sh native FOLDER            the extension for this machine alone, in FOLDER/python
#   dev_env.sh install                  deep_ep in .venv (editable) and the CMake tree build/dev
# Where something cannot be brought it says so and goes on, except under CI, where everything is required.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

say() { echo "[dev_env] $*"; }
has_command() { command -v "$1" >/dev/null; }
has_header() {
    echo "#include <$1>" | "${CXX:-c++}" -E -x c++ - >/dev/null 2>&1
}
has_clang_runtime() {
    local library
    library=$(clang++-14 -print-file-name="libclang_rt.tsan-$(uname -m).a" 2>/dev/null) && [[ -e $library ]]
}

# Prints the Debian packages that are missing for a task.
missing_packages() {
    case $1 in
        build)
            has_command c++ || echo g++
            has_command cmake || echo cmake
            has_command ninja || echo ninja-build
            has_header boost/context/detail/fcontext.hpp || echo libboost-context-dev
            ;;
        test)
            has_header doctest/doctest.h || echo doctest-dev
            has_command clang++-14 || echo clang-14
            has_clang_runtime || echo libclang-rt-14-dev
            [[ $(uname -m) != x86_64 ]] || has_command aarch64-linux-gnu-g++ || echo g++-aarch64-linux-gnu
            [[ $(uname -m) != x86_64 ]] || has_command g++-11 || echo g++-11
            ;;
        lint)
            has_command clang-format-14 || echo clang-format-14
            has_command shellcheck || echo shellcheck
            ;;
        *)
            echo "unknown task '$1'" >&2
            return 2
            ;;
    esac
}

setup_system() {
    local missing
    mapfile -t missing < <(missing_packages "$1")
    [[ ${#missing[@]} -gt 0 ]] || return 0
    if [[ $(id -u) -eq 0 ]] && has_command apt-get; then
        say "installing on this system, as root, with apt-get: ${missing[*]}"
        if apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            "${missing[@]}" >/dev/null; then
            return 0
        fi
    fi
    say "missing for '$1': ${missing[*]} (Debian's names). Nothing was installed. As root: apt-get install ${missing[*]}"
    [[ -z ${CI:-} ]] || return 1
    say 'going on without; what needs them is left out, and says so'
}

has_torch() { "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; }

# A venv over a Python that brings its own torch (a GPU image, perhaps without a network): sees all that Python's
# packages, and nothing is downloaded. The .pth covers a Python that is itself a venv.
make_venv_over_torch() {
    "$python" -m venv --without-pip --system-site-packages .venv
    local site
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import site, sysconfig; print(sysconfig.get_path("purelib"))' >"$site/outer_packages.pth"
    say "using the torch of $("$python" -c 'import sys; print(sys.executable)'); nothing is downloaded"
}

pip_install() { .venv/bin/python -m pip --disable-pip-version-check install -qq "$@"; }

# Prints the packages of extras in pyproject.toml, one a line.
packages_of() {
    .venv/bin/python - "$@" <<'PY'
import re, sys
text = open('pyproject.toml').read()
extras = re.search(r'^\[project\.optional-dependencies\]$(.*?)^\[', text, re.M | re.S).group(1)
for name in sys.argv[1:]:
    values = re.search(rf'^{name} = \[(.*?)\]$', extras, re.M | re.S).group(1)
    print(*re.findall(r'"([^"]+)"', values), sep='\n')
PY
}

make_venv() { # how much of it; each step wants the one before
    local packages
    case $1 in
        base)
            [[ -x .venv/bin/pip ]] || "$python" -m venv --clear .venv
            pip_install --upgrade 'setuptools>=70.1' 'pybind11>=2.12,<4'
            has_command cmake || pip_install cmake
            has_command ninja || pip_install ninja
            ;;
        demo)
            say "installing ${TORCH:=torch==2.13.0}"
            mapfile -t packages < <(packages_of demo)
            pip_install "$TORCH" "${packages[@]}"
            ;;
        all)
            mapfile -t packages < <(packages_of test lint wheel)
            pip_install "${packages[@]}"
            ;;
        *)
            echo "unknown part of .venv '$1'" >&2
            return 2
            ;;
    esac
}

setup_venv() { # how much of it
    if ! has_torch "$python"; then
        make_venv "$1"
    elif [[ $1 == base ]]; then
        make_venv_over_torch
    fi
    [[ $1 != demo ]] ||
        .venv/bin/python -c 'import torch; print("[dev_env] torch", torch.__version__, "cuda", torch.version.cuda)'
}

# The extension for this machine: no GPU, no nvcc; a GPU, its architecture alone. Configured anew each time, because GPUs
# and drivers come and go. Users compile it, so a warning of their compiler is none of their business.
build_native() { # folder
    local generator=()
    PATH=$PWD/.venv/bin:$PATH
    has_command ninja && generator=(-G Ninja)
    cmake -S . -B "$1" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DEP_CUDA=NATIVE -DEP_MODULE_DIR="$PWD/$1/python" \
        -DPython_EXECUTABLE="$PWD/.venv/bin/python" >"$1.log" 2>&1 || {
        cat "$1.log"
        return 1
    }
    grep 'deep_ep: CUDA device' "$1.log"
    cmake --build "$1" --target deep_ep_cpp --parallel "${JOBS:-$(nproc)}"
}

# In CI for 10.0 alone: the wheel's toolkit and the oldest one compile for 8.0 there, the wheel's and that for Arm hosts for 9.0.
# All kernels for a GPU take a minute.
install_package() {
    local for_ci=
    [[ -z ${CI:-} ]] || ! nvcc --version 2>/dev/null | grep -q 'release 13' ||
        for_ci='-DCMAKE_CUDA_ARCHITECTURES=100'
    DEEP_EP_BUILD_DIR=build/dev MAX_JOBS=${JOBS:-} CMAKE_ARGS="-DEP_WERROR=ON $for_ci ${CMAKE_ARGS:-}" \
        .venv/bin/python -m pip --disable-pip-version-check install -qq --no-deps --no-build-isolation --editable .
}

case ${1:-} in
    system) setup_system "$2" ;;
    venv) setup_venv "$2" ;;
    native) build_native "$2" ;;
    install) install_package ;;
    *)
        sed -n '2,7s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
esac
