#!/usr/bin/env bash
# Everything that needs a GPU, in one go: builds for this machine's GPU, tests, sanitizes, measures, and prints a table
# of steps last. A failing step does not stop the others; each has its own time limit, and all together have one.
#
#   tools/gpu_check.sh                      all steps
#   tools/gpu_check.sh build conformance    these, in the order given
#   tools/gpu_check.sh --list               what there is
#
# Needs nvcc, CMake, ninja and a Python with torch, pybind11 and pytest; downloads nothing and installs nothing.
# Results go to $OUT (unset: ./out): gpu_check.log with the output of every step, gpu_check.txt with the table, and the
# benchmark's JSON. GPU_CHECK_BUDGET_S (530) is the time for all steps, GPU_CHECK_RANKS the number of ranks.
# shellcheck disable=SC2317,SC2329  # the steps are called by name
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD
out=${OUT:-$root/out}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/gpu_check.log
table=$out/gpu_check.txt
build=$root/build/gpu
deadline=$((SECONDS + ${GPU_CHECK_BUDGET_S:-530}))

export CC=${CC:-/usr/bin/gcc} CXX=${CXX:-/usr/bin/g++}
export CUDAHOSTCXX=${CUDAHOSTCXX:-$CXX} PATH=$PATH:/usr/local/cuda/bin
export PYTHONUNBUFFERED=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export DEEP_EP_TIMEOUT_SECS=${DEEP_EP_TIMEOUT_SECS:-30}

num_gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | wc -l)
# One rank per GPU; on a machine with one, four ranks share it.
num_ranks=${GPU_CHECK_RANKS:-$((num_gpus > 1 ? num_gpus : 4))}

# Seconds that a step may take. The sum is about the budget: a step that hangs takes time from the last ones only.
declare -A limits=(
    [machine]=20 [build]=200 [conformance]=40 [intranode]=80 [pytest]=120 [demo]=60 [memcheck]=60 [racecheck]=60
    [bench]=90
)
all_steps=(machine build conformance intranode pytest demo memcheck racecheck bench)

step_machine() {
    nvidia-smi && nvidia-smi topo -m
    nvcc --version && cmake --version && "$CXX" --version
    python3 --version && python3 -c 'import torch; print("torch", torch.__version__, torch.cuda.device_count(), "GPUs")'
}

# The extension lands in the checkout, where Python finds it. Machine code for this GPU alone: it builds faster.
step_build() {
    local arch
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
    cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DEP_CUDA=ON -DEP_TESTS=ON \
        -DCMAKE_CUDA_ARCHITECTURES="${arch:-90}-real" -DPython_EXECUTABLE="$(command -v python3)" \
        -DEP_MODULE_DIR="$root" &&
        cmake --build "$build" --parallel "$(nproc)" --target deep_ep_cpp device_conformance_cuda &&
        python3 -c 'import deep_ep_cpp; assert deep_ep_cpp.is_cuda_built()'
}

conformance=$build/tests/cpp/device_conformance_cuda

step_conformance() { "$conformance"; }

step_intranode() { python3 tests/test_intranode.py --num-processes "$num_ranks"; }

step_pytest() { python3 -m pytest tests -q --maxfail=10 -p no:cacheprovider; }

step_demo() { python3 examples/run_demo.py --device cuda --num-processes "$num_ranks" --steps 20; }

# Our kernels alone, and no errors of calls: the tests provoke some. Sanitized programs run many times slower: the
# kernels' own tests, then two ranks and few tokens.
sanitize() {
    local options=(--tool "$1" --target-processes all --launch-timeout 0 --kernel-name kns=deep_ep
        --report-api-errors no --error-exitcode 9)
    compute-sanitizer "${options[@]}" "$conformance" &&
        compute-sanitizer "${options[@]}" python3 -m deep_ep.bench intranode "${small_case[@]}"
}

step_memcheck() { sanitize memcheck; }

# Races in shared memory. (Races between blocks and ranks: the CPU executor under ThreadSanitizer.)
step_racecheck() { sanitize racecheck; }

small_case=(--device cuda --num-processes 2 --tokens 32 --hidden 512 --experts 8 --topk 4 --num-sms 4
    --warmups 1 --repeats 2 --input-sets 1)

step_bench() {
    local commit
    commit=$(git rev-parse --short=12 HEAD 2>/dev/null)
    python3 -m deep_ep.bench intranode --device cuda --num-processes "$num_ranks" --num-sms 8,16,24 --graphs \
        --save "$out" --commit "$commit"
}

declare -A outcome seconds
has_failed=0

# A step runs in a shell of its own, so that its limit also ends what it started.
run_step() {
    local step=$1 limit=${limits[$1]} left=$((deadline - SECONDS)) start=$SECONDS status
    if ((left < 5)); then
        outcome[$step]='not run: no time left'
        has_failed=1
        return
    fi
    ((left < limit)) && limit=$left
    printf '\n==== %s (at most %s s) ====\n' "$step" "$limit" >>"$log"
    local before
    before=$(wc -l <"$log")
    GPU_CHECK_STEP=$step timeout -k 5 "$limit" bash "$root/tools/gpu_check.sh" >>"$log" 2>&1
    status=$?
    seconds[$step]=$((SECONDS - start))
    case $status in
        0) outcome[$step]=pass ;;
        124 | 137) outcome[$step]="FAIL: ended after $limit s" ;;
        *) outcome[$step]="FAIL: exit status $status" ;;
    esac
    if ((status != 0)); then
        has_failed=1
        printf '\n==== %s failed; the end of its output:\n' "$step"
        tail -n "+$((before + 1))" "$log" | tail -n 40
    elif [[ $step == bench || $step == conformance ]]; then
        printf '\n==== %s:\n' "$step"
        tail -n "+$((before + 1))" "$log" | tail -n 30
    fi
}

print_table() {
    printf '%-12s %8s  %s\n' step seconds result
    local step
    for step in "${steps[@]}"; do
        printf '%-12s %8s  %s\n' "$step" "${seconds[$step]:--}" "${outcome[$step]:-not run}"
    done
    printf '%s GPU(s), %s ranks, log: %s\n' "$num_gpus" "$num_ranks" "${log##*/}"
}

if [[ -n ${GPU_CHECK_STEP:-} ]]; then
    "step_$GPU_CHECK_STEP"
    exit
fi
if [[ ${1:-} == --list ]]; then
    for step in "${all_steps[@]}"; do echo "$step (at most ${limits[$step]} s)"; done
    exit
fi
steps=("$@")
(($# == 0)) && steps=("${all_steps[@]}")
for step in "${steps[@]}"; do
    if [[ -z ${limits[$step]:-} ]]; then
        echo "no step '$step'; there are: ${all_steps[*]}" >&2
        exit 2
    fi
done
: >"$log"
for step in "${steps[@]}"; do run_step "$step"; done
echo
print_table | tee "$table"
exit "$has_failed"
