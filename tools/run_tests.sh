#!/usr/bin/env bash
# Runs suites of tests and fails if any failed; a failed suite does not stop the next one.
#   run_tests.sh cpp|address|thread|mutants|python ...
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
