#!/usr/bin/env bash
# Runs suites of tests and fails if any failed; a failed suite does not stop the next one.
#   run_tests.sh cpp|wheel|cuda11|aarch64|address|thread|mutants|python ...
# The runners' own closing lines are the last that each suite prints. The Python suite spends half its time waiting, so
# it runs beside the suites under sanitizers; what it prints comes when they are done.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
jobs=${JOBS:-$(nproc)}
failed=()

say() { echo "[test] $*"; }

# A suite whose tools are not there is skipped aloud on a person's machine, and fails under CI.
lacks() {
    say "$1 SKIPPED: $2"
    [[ -z ${CI:-} ]]
}

run_python() { .venv/bin/python -m pytest; }

# Configures with the given arguments; shows what CMake says only when it fails.
configure() { # build folder, arguments...
    local folder=$1
    shift
    cmake -S . -B "$folder" -DEP_TESTS=ON "$@" >"$folder.log" 2>&1 || {
        cat "$folder.log"
        return 1
    }
    if grep -q '^EP_DOCTEST_INCLUDE:.*NOTFOUND' "$folder/CMakeCache.txt"; then
        lacks 'C++ tests (but those of the GPU)' 'no doctest (Debian: doctest-dev)'
    fi
}

run_ctest() { # build folder, command to run it under...
    local folder=$1
    shift
    cmake --build "$folder" --parallel "$jobs" && "$@" ctest --test-dir "$folder" --output-on-failure \
        --parallel "$jobs"
}

run_cpp() { configure build/dev && run_ctest build/dev; }

# tests/test_wheel.py, in the Python suite, looks at it.
run_wheel() {
    if [[ ! $(uname -m) == x86_64 ]] || ! command -v apt-get >/dev/null; then
        lacks 'the wheel' 'its toolkit is one of Debian for x86-64 (WHEEL_CUDA names another)'
        return
    fi
    # Nobody is given CI's: one architecture shows what the others would.
    if [[ -n ${CI:-} && -z ${TORCH_CUDA_ARCH_LIST:-} ]]; then
        TORCH_CUDA_ARCH_LIST=9.0+PTX tools/make_wheel.sh
    else
        tools/make_wheel.sh
    fi
}

# The oldest nvcc, in its own C++17, for the oldest GPU: compiles, nothing is run.
run_cuda11() {
    local folder=build/cuda11 toolkit
    if [[ ! $(uname -m) == x86_64 ]] || ! command -v apt-get >/dev/null || ! command -v g++-11 >/dev/null; then
        lacks 'compiling with CUDA 11.8' 'needs g++-11 and a Debian on x86-64'
        return
    fi
    toolkit=$(tools/get_toolkit.sh cuda-11.8) || return
    export DISABLE_SM90_FEATURES=1 CUDACXX=$toolkit/bin/nvcc CUDAHOSTCXX=g++-11
    cmake -S . -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release -DEP_WERROR=ON -DEP_CUDA=ON -DEP_PYTHON=OFF \
        >"$folder.log" 2>&1 || {
        cat "$folder.log"
        return 1
    }
    cmake --build "$folder" --target deep_ep_cuda --parallel "$jobs"
}

# Compiles and links for Arm hosts; nothing is run.
run_aarch64() {
    local folder=build/aarch64 root include
    if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! nvcc --version 2>/dev/null | grep -q 'release 13'; then
        lacks 'compiling for aarch64' 'needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu) and nvcc 13'
        return
    fi
    root=$(PYTHON=.venv/bin/python tools/get_toolkit.sh aarch64) || return
    include=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
    # What differs on Arm is the host's half: of the GPU's half PTX is enough, not optimised, since other suites
    # compile the same kernels to machine code.
    cmake -S . -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release -DEP_WERROR=ON -DEP_PORTABLE=ON \
        -DCMAKE_CXX_FLAGS_RELEASE=-O0 -DCMAKE_CUDA_ARCHITECTURES=90-virtual "-DCMAKE_CUDA_FLAGS_RELEASE=-Xcicc -O0" \
        -DCMAKE_TOOLCHAIN_FILE=cmake/toolchains/aarch64-linux-gnu.cmake -DEP_AARCH64_ROOT="$root" -DEP_CUDA=ON \
        -DPython_EXECUTABLE="$PWD/.venv/bin/python" -DPython_INCLUDE_DIR="$include" >"$folder.log" 2>&1 || {
        cat "$folder.log"
        return 1
    }
    cmake --build "$folder" --target deep_ep_cpp --parallel "$jobs" &&
        readelf -h "$folder"/csrc/deep_ep_cpp*.so | grep 'Machine: *AArch64'
}

run_mutants() { run_sanitizer thread --target mutants; }

# sanitizer, and perhaps what to build in place of running the tests...
run_sanitizer() {
    local folder=build/$1
    local sanitizer=$1
    shift
    if ! command -v clang++-14 >/dev/null; then
        lacks "C++ tests under the $sanitizer sanitizer" 'no clang++-14 (Debian: clang-14 libclang-rt-14-dev)'
        return
    fi
    configure "$folder" -G Ninja -DCMAKE_CXX_COMPILER=clang++-14 -DEP_SANITIZE="$sanitizer" -DEP_PYTHON=OFF -DEP_WERROR=ON ||
        return
    if [[ $# -gt 0 ]]; then
        cmake --build "$folder" --parallel "$jobs" "$@"
        return
    fi
    # ThreadSanitizer's shadow needs addresses that are not too random.
    local under=()
    if setarch "$(uname -m)" -R true 2>/dev/null; then
        under=(setarch "$(uname -m)" -R)
    fi
    ASAN_OPTIONS=${ASAN_OPTIONS:-detect_stack_use_after_return=0} TSAN_OPTIONS=${TSAN_OPTIONS:-allow_addr2line=1} \
        run_ctest "$folder" "${under[@]}"
}

mkdir -p build
python_log=build/pytest.log
python_job=
start_python() {
    say '== python: begins beside the next suites'
    run_python >"$python_log" 2>&1 &
    python_job=$!
}

suites=("$@")
for ((i = 0; i < ${#suites[@]}; ++i)); do
    suite=${suites[i]}
    # The extension is as it will be once the C++ suite is through.
    if [[ $suite == address && " ${suites[*]:i} " == *' python '* ]]; then
        start_python
    fi
    say "== $suite"
    start=$SECONDS
    case $suite in
        cpp) run_cpp ;;
        wheel) run_wheel ;;
        cuda11) (run_cuda11) ;;
        aarch64) run_aarch64 ;;
        address | thread) run_sanitizer "$suite" ;;
        mutants) run_mutants ;;
        python)
            if [[ -n $python_job ]]; then
                wait "$python_job"
                status=$?
                cat "$python_log"
                (exit "$status")
            else
                run_python
            fi
            ;;
        *)
            say "unknown suite '$suite'"
            exit 2
            ;;
    esac || failed+=("$suite")
    [[ $suite == python ]] || say "== $suite took $((SECONDS - start)) s"
done

if [[ ${#failed[@]} -gt 0 ]]; then
    say "failed: ${failed[*]}"
    exit 1
fi
