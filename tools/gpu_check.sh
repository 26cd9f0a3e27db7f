#!/usr/bin/env bash
# Everything that needs a GPU, in one go: builds for this machine's GPU, tests, sanitizes, measures, and prints a table
# of steps last. A failing step does not stop the others; each has its own time limit, and all together have one.
#
#   tools/gpu_check.sh                      the steps of `check`: what a change of a kernel must pass
#   tools/gpu_check.sh suite                what the figures of a machine need: benchmarks, tests, pressure, lost ranks
#   tools/gpu_check.sh proof                SMs that others hold, faults, random programs of calls, a build without SM90
#   tools/gpu_check.sh build conformance    these, in the order given
#   tools/gpu_check.sh build pressure_start pressure that outlives this command; where a command may take ten minutes:
#   tools/gpu_check.sh pressure_collect     ... its end, from another command, which waits for it
#   tools/gpu_check.sh --list               what there is
#   tools/gpu_check.sh --device cpu suite   a rehearsal with tiny sizes on a machine without a GPU (after `make build`)
#
# Ranks: one for each GPU; on a machine with one, four share it (as threads of one process where speed is measured).
# Needs nvcc, CMake, ninja and a Python with torch, pybind11 and pytest; downloads nothing and installs nothing.
# Results go to $OUT (unset: ./out), at most seven files: gpu_check.log with the output of every step, gpu_check.txt
# with the table, gpu_check_*.json with the table and what each step said, pressure.log, and the benchmarks' JSON (plots:
# tools/render_benchmarks.py --plots). JSON to keep: benchmarks/results, and benchmarks/results/checks for the table.
#   GPU_CHECK_BUDGET_S     for all steps (530)
#   GPU_CHECK_RANKS        the number of ranks
#   GPU_CHECK_PRESSURE_S   of the pressure step: 300, or 60 where it cannot run beside the tests; of pressure_start: 600
#   GPU_CHECK_SEED         of pressure and fuzz: which random calls are made (0)
#   GPU_CHECK_FUZZ_S       of the fuzz step (60), on one node; and half of it on virtual nodes
#   GPU_CHECK_STATE        where pressure_start leaves what pressure_collect needs (build/pressure); emptied first
#   GPU_CHECK_BESIDE       1: pressure runs beside the steps after the benchmarks (default with several GPUs); 0: alone
#   GPU_CHECK_TESTS        arguments for pytest
#   GPU_CHECK_BENCH        further options for the benchmarks, after those of this script
#   PYTHON                 python3
# shellcheck disable=SC2317,SC2329,SC2034  # the steps, and the sizes of a benchmark, are used by name
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD
out=${OUT:-$root/out}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/gpu_check.log
table=$out/gpu_check.txt
pressure_log=$out/pressure.log
build=$root/build/gpu
python=${PYTHON:-python3}

device=${GPU_CHECK_DEVICE:-cuda}
if [[ ${1:-} == --device ]]; then
    device=${2:-}
    shift 2
fi
if [[ $device != cuda && $device != cpu ]]; then
    echo "--device must be cuda or cpu, got '$device'" >&2
    exit 2
fi
export GPU_CHECK_DEVICE=$device
[[ $device == cuda ]] || export DEEP_EP_DEVICE=$device

export CC=${CC:-/usr/bin/gcc} CXX=${CXX:-/usr/bin/g++}
export CUDAHOSTCXX=${CUDAHOSTCXX:-$CXX} PATH=$PATH:/usr/local/cuda/bin
export PYTHONUNBUFFERED=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# The comparison must not use NVLink multicast: on a shared host it can put GPUs out of service.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
export DEEP_EP_TIMEOUT_SECS=${DEEP_EP_TIMEOUT_SECS:-30}

num_gpus=0
[[ $device == cpu ]] || num_gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | wc -l)
shared_by=$([[ $device == cpu ]] && echo 2 || echo 4)
num_ranks=${GPU_CHECK_RANKS:-$((num_gpus > 1 ? num_gpus : shared_by))}
has_own_gpus=$((num_gpus >= num_ranks))
beside=${GPU_CHECK_BESIDE:-$((num_gpus > 1))}
pressure_s=${GPU_CHECK_PRESSURE_S:-$((beside ? 300 : 60))}
pressure_margin_s=60 # for the processes to start, and for the round that they are in
fuzz_s=${GPU_CHECK_FUZZ_S:-60}
long_pressure_s=${GPU_CHECK_PRESSURE_S:-600}
state=${GPU_CHECK_STATE:-$root/build/pressure} # not in a folder that others write to: it is removed and made anew
commit=${GPU_CHECK_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null)}
deadline=$((SECONDS + ${GPU_CHECK_BUDGET_S:-530}))
step_limit_s=${GPU_CHECK_STEP_LIMIT_S:-0} # in the shell of a step

# Seconds that a step may take: a step that hangs takes time from the last ones only.
declare -A limits=(
    [machine]=20 [build]=200 [conformance]=40 [intranode]=80 [pytest]=400 [lost_rank]=90 [demo]=90 [memcheck]=150
    [racecheck]=150 [bench]=200 [bench_ll]=110 [bench_graphs]=40 [pressure]=$((pressure_s + pressure_margin_s))
    [co_residency]=120 [faults]=150 [fuzz]=$((fuzz_s * 3 / 2 + 120)) [sm80]=240
    [pressure_start]=30 [pressure_collect]=$((long_pressure_s + pressure_margin_s))
)
declare -A sets=(
    [check]='machine build conformance pytest demo memcheck racecheck bench'
    [suite]='machine build conformance bench bench_ll bench_graphs pytest lost_rank demo pressure'
    [proof]='machine build co_residency faults fuzz sm80'
)
all_steps=(machine build conformance intranode pytest lost_rank demo memcheck racecheck bench bench_ll bench_graphs
    co_residency faults fuzz sm80 pressure pressure_start pressure_collect)
declare -A needs_gpu=([conformance]=1 [bench_graphs]=1 [co_residency]=1 [sm80]=1)
declare -A rehearsed=()
if [[ $device == cpu ]]; then
    rehearsed=([memcheck]='rehearsed without compute-sanitizer' [racecheck]='rehearsed without compute-sanitizer')
fi

step_machine() {
    if [[ $device == cuda ]]; then
        nvidia-smi && nvidia-smi topo -m
        nvcc --version
    fi
    cmake --version && "$CXX" --version
    "$python" --version &&
        "$python" -c 'import torch; print("torch", torch.__version__, torch.cuda.device_count(), "GPUs")'
}

# The extension lands in the checkout, where Python finds it. Machine code for this GPU alone: it builds faster.
step_build() {
    local arch
    if [[ $device == cpu ]]; then
        "$python" -c 'import deep_ep_cpp; print("as built before:", deep_ep_cpp.__file__)'
        return
    fi
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
    cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DEP_CUDA=ON -DEP_TESTS=ON \
        -DCMAKE_CUDA_ARCHITECTURES="${arch:-90}-real" -DPython_EXECUTABLE="$(command -v "$python")" \
        -DEP_MODULE_DIR="$root" &&
        cmake --build "$build" --parallel "$(nproc)" --target deep_ep_cpp deep_ep_bench_cpp device_conformance_cuda &&
        "$python" -c 'import deep_ep_cpp; assert deep_ep_cpp.is_cuda_built()'
}

conformance=$build/tests/cpp/device_conformance_cuda

step_conformance() { "$conformance"; }

# Sizes of what the test scripts do. The experts of a rank stay the same, so that any number of ranks divides them.
if [[ $device == cpu ]]; then
    ht_sizes=(--num-processes "$num_ranks" --num-tokens 8 --hidden 64 --num-topk 2 --num-experts $((4 * num_ranks))
        --num-sms 2)
    ll_sizes=(--num-processes "$num_ranks" --num-tokens 8 --hidden 128 --num-topk 2 --num-experts $((4 * num_ranks)))
    tests=(tests/test_intranode.py tests/test_low_latency.py -k late_rank)
else
    ht_sizes=(--num-processes "$num_ranks" --num-tokens 128 --num-experts $((32 * num_ranks)) --num-sms 16)
    ll_sizes=(--num-processes "$num_ranks" --num-tokens 128 --num-experts $((36 * num_ranks)))
    # Not those that look at the repository, or run on the CPU wherever they are, or have a step of their own.
    tests=(tests --ignore-glob='*/unit/test_b*.py' --ignore-glob='*/unit/test_examples_*.py'
        --ignore=tests/unit/test_docs.py --ignore=tests/unit/test_gpu_check.py --ignore=tests/test_co_residency.py
        --ignore=tests/test_faults.py --ignore=tests/test_fuzz.py)
fi
[[ -z ${GPU_CHECK_TESTS:-} ]] || read -ra tests <<<"$GPU_CHECK_TESTS"

step_intranode() { "$python" tests/test_intranode.py "${ht_sizes[@]}"; }

step_pytest() { "$python" -m pytest "${tests[@]}" -q --maxfail=10 -p no:cacheprovider; }

step_co_residency() { "$python" -m pytest tests/test_co_residency.py -q -p no:cacheprovider; }

step_faults() { "$python" -m pytest tests/test_faults.py -q -p no:cacheprovider; }

# Random programs of calls, on one node and on virtual ones.
step_fuzz() {
    local status=0 ranks=$((num_ranks < 4 ? num_ranks : 4))
    fuzz "$ranks" "$ranks" "$fuzz_s" || status=1
    fuzz "$ranks" $((ranks > 2 ? ranks / 2 : 1)) $((fuzz_s / 2)) || status=1
    return "$status"
}

fuzz() { # ranks, of a node, seconds
    "$python" tests/fuzz.py --device "$device" --num-processes "$1" --ranks-per-node "$2" --seconds "$3" --seed "$seed" \
        --shrink-seconds 20 --save "$out/fuzz_$2_of_$1.json"
}

# What GPUs before SM90 run: PTX of 8.0, without bulk copies. A module of its own, found before that of the checkout.
step_sm80() {
    local folder=$root/build/gpu_sm80
    DISABLE_SM90_FEATURES=1 cmake -S "$root" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release -DEP_CUDA=ON \
        -DCMAKE_CUDA_ARCHITECTURES=80 -DPython_EXECUTABLE="$(command -v "$python")" -DEP_MODULE_DIR="$folder/python" &&
        cmake --build "$folder" --parallel "$(nproc)" --target deep_ep_cpp &&
        cd "$folder" && PYTHONPATH=$folder/python:$root "$python" -c "import deep_ep_cpp
assert deep_ep_cpp.is_cuda_built() and not deep_ep_cpp.is_sm90_compiled(), deep_ep_cpp.__file__" &&
        PYTHONPATH=$folder/python:$root "$python" -m pytest "$root/tests/test_intranode.py" \
            "$root/tests/test_low_latency.py" "$root/tests/test_lending.py" -q -p no:cacheprovider \
            -k 'any_rank_count or any_hidden or routing or bitwise or pressure or scales or every_format or lent or graph'
}

# A rank is killed: without enable_shrink its peers get an error that names it, with it they go on.
step_lost_rank() {
    local status=0
    "$python" -m pytest tests/test_intranode.py tests/test_low_latency.py -q -k killed_rank -p no:cacheprovider || status=1
    "$python" tests/test_low_latency.py "${ll_sizes[@]}" --shrink-test || status=1
    return "$status"
}

step_demo() {
    "$python" examples/run_demo.py --device "$device" --num-processes "$num_ranks" \
        --steps "$([[ $device == cpu ]] && echo 2 || echo 20)"
}

# Random calls of one mode for so long. Bits of repeated calls are compared, and with the reference.
press() { # mode, seconds
    if [[ $1 == high_throughput ]]; then
        "$python" tests/test_intranode.py "${ht_sizes[@]}" --seed "$seed" --pressure-test "$2"
    else
        "$python" tests/test_low_latency.py "${ll_sizes[@]}" --seed "$seed" --pressure-test --seconds "$2"
    fi
}
modes=(high_throughput low_latency)
seed=${GPU_CHECK_SEED:-0}

# Both modes at the same time.
step_pressure() {
    local status=0 press_s=$((step_limit_s - pressure_margin_s))
    press_s=$((press_s < pressure_s ? press_s : pressure_s))
    press_s=$((press_s > 1 ? press_s : 1))
    press high_throughput "$press_s" &
    local high_throughput=$!
    press low_latency "$press_s" || status=1
    wait "$high_throughput" || status=1
    return "$status"
}

# The same in sessions of their own, which go on when this command is over. Each mode leaves its log, and at the end its
# exit status, in $state.
step_pressure_start() {
    local mode
    if is_pressed; then
        echo "pressure is on already, see $state; collect it first"
        return 1
    fi
    rm -rf "$state"
    mkdir -p "$state"
    echo "$commit" >"$state/commit"
    for mode in "${modes[@]}"; do
        GPU_CHECK_STEP=press_$mode setsid --fork timeout -k 15 $((long_pressure_s + pressure_margin_s)) \
            bash "$root/tools/gpu_check.sh" >"$state/$mode.log" 2>&1 </dev/null
    done
    # Once their numbers are there, nobody takes them for dead.
    while [[ ! -e $state/high_throughput.pid || ! -e $state/low_latency.pid ]]; do sleep 0.1; done
    echo "pressure for $long_pressure_s s with seed $seed goes on in $state; then: tools/gpu_check.sh pressure_collect"
}

step_press_high_throughput() { leave_status high_throughput; }

step_press_low_latency() { leave_status low_latency; }

leave_status() { # mode
    echo $$ >"$state/$1.pid"
    press "$1" "$long_pressure_s"
    echo $? >"$state/$1.status"
}

is_pressed() {
    local mode
    for mode in "${modes[@]}"; do
        if [[ -e $state/$mode.pid && ! -e $state/$mode.status ]] && kill -0 "$(<"$state/$mode.pid")" 2>/dev/null; then
            return 0
        fi
    done
    return 1
}

# Waits for the end, as long as this step may take. Pressure that goes on then can be collected later.
step_pressure_collect() {
    local mode status=0 found lines=2
    if [[ ! -d $state ]]; then
        echo "no pressure was started: there is no $state"
        return 1
    fi
    while is_pressed && ((SECONDS < step_limit_s - 3)); do sleep 1; done
    for mode in "${modes[@]}"; do
        found=$(cat "$state/$mode.status" 2>/dev/null)
        if [[ -z $found ]]; then
            found=$(is_pressed && echo 'none yet, collect it again' || echo 'none: it was killed')
        fi
        [[ $found == 0 ]] || status=1 lines=15
        printf '== %s, commit %s: exit status %s\n' "$mode" "$(<"$state/commit")" "$found"
        cat "$state/$mode.log"
    done >"$pressure_log"
    # What is printed at the end: the last lines of both.
    for mode in "${modes[@]}"; do
        grep "^== $mode," "$pressure_log"
        tail -n "$lines" "$state/$mode.log"
    done
    return "$status"
}

# Our kernels alone, and no errors of calls: the tests provoke some. Sanitized programs run many times slower: the
# kernels' own tests, then two ranks and few tokens: rows through slots, lent rows, across nodes, low latency in every format.
sanitize() {
    local under=(compute-sanitizer --tool "$1" --target-processes all --launch-timeout 0 --kernel-name kns=deep_ep
        --report-api-errors no --error-exitcode 9) verdicts=() status=0
    if [[ $device == cpu ]]; then
        under=() # rehearses the options of the programs
    else
        sanitized 'the conformance tests' "$conformance"
    fi
    sanitized 'dispatch and combine through slots' "$python" -m deep_ep bench intranode "${small_case[@]}" "${small_ht[@]}"
    DEEP_EP_LEND_BYTES=$((16 << 20)) sanitized 'the same with lent rows' "$python" -m deep_ep bench intranode \
        "${small_case[@]}" "${small_ht[@]}"
    DEEP_EP_RAIL=host sanitized 'across nodes' "$python" -m deep_ep bench internode --ranks-per-node 1 "${small_case[@]}" \
        "${small_ht[@]:0:4}"
    sanitized 'low latency' "$python" -m deep_ep bench low-latency "${small_case[@]}" --tokens 8
    printf '%s\n' "${verdicts[@]}"
    return "$status"
}

# For sanitize(), whose variables it uses. One program does not stop the next.
sanitized() { # what, program...
    local what=$1 verdict=clean
    shift
    echo "== $what"
    "${under[@]}" "$@" || {
        status=$?
        verdict="exit status $status"
    }
    verdicts+=("$what: $verdict")
}

step_memcheck() { sanitize memcheck; }

# Races in shared memory. (Races between blocks and ranks: the CPU executor under ThreadSanitizer.)
step_racecheck() { sanitize racecheck; }

small_case=(--device "$device" --num-processes 2 --hidden 512 --experts 8 --topk 4 --warmups 1 --repeats 2 --input-sets 1)
small_ht=(--tokens 32 --num-sms 4 --no-comparison)

# Benchmark, its ranks, its sizes on a GPU, its sizes on the CPU. Only the JSON comes back; a run that its limit ends leaves one too.
measure() {
    local name=$1 ranks=$2 folder sizes further status
    local -n on_gpu=$3 on_cpu=$4
    folder=$(mktemp -d)
    sizes=("${on_gpu[@]}")
    [[ $device == cuda ]] || sizes=("${on_cpu[@]}")
    read -ra further <<<"${GPU_CHECK_BENCH:-}"
    "$python" -m deep_ep bench "$name" --device "$device" --num-processes "$ranks" "${sizes[@]}" "${further[@]}" \
        --save "$folder" --commit "$commit"
    status=$?
    cp "$folder"/*.json "$out" && rm -r "$folder"
    return "$status"
}

as_threads=()
ll_ranks=$num_ranks
if ((num_gpus == 1 && num_ranks > 1)); then
    as_threads=(--ranks-as-threads)
    ll_ranks=2 # they divide the SMs among themselves: more would have too few
fi
# shellcheck disable=SC2054  # lists for the benchmark
tiny=(--tokens 4 --hidden 128 --experts 4 --topk 2 --repeats 1 --input-sets 1 --routing uniform,hot-rank)
# shellcheck disable=SC2054
ht_bench=(--tokens 4096,8192 --num-sms 8,12,16,24 --routing uniform,hot-rank --repeats 20 --profile "${as_threads[@]}")
# shellcheck disable=SC2054
ll_bench=(--tokens 1,8,32,128,512 --routing uniform,hot-rank --repeats 20 --profile "${as_threads[@]}")
# Threads cannot capture graphs. Processes that share a GPU can, slowly: it works, and says nothing about speed.
if ((has_own_gpus)); then
    ll_bench+=(--graphs)
fi
graph_bench=(--tokens 128 --repeats 3 --warmups 1 --input-sets 1 --graphs)

step_bench() { measure intranode "$num_ranks" ht_bench tiny; }

step_bench_ll() { measure low-latency "$ll_ranks" ll_bench tiny; }

step_bench_graphs() {
    if ((has_own_gpus)); then
        echo 'graphs are part of bench_ll on this machine'
    else
        measure low-latency "$num_ranks" graph_bench tiny
    fi
}

declare -A outcome seconds
has_failed=0
pressure_pid=

# Runs a step in a shell of its own, so that its limit also ends what it started. Output, status.
limited() { # step, limit
    GPU_CHECK_STEP_LIMIT_S=$2 GPU_CHECK_STEP=$1 timeout -k 15 "$2" bash "$root/tools/gpu_check.sh"
}

# The seconds that a step may still take: its limit, or what is left. Nothing when that is too little.
time_for() {
    local left=$((deadline - SECONDS)) limit=${limits[$1]}
    ((left >= 5)) || return 1
    echo $((left < limit ? left : limit))
}

note() { # step, status, limit, log, line where its output begins
    local step=$1 status=$2
    case $status in
        0) outcome[$step]=${rehearsed[$step]:-pass} ;;
        124 | 137) outcome[$step]="FAIL: ended after $3 s" ;;
        *) outcome[$step]="FAIL: exit status $status" ;;
    esac
    if ((status != 0)); then
        has_failed=1
        printf '\n==== %s failed; the end of its output:\n' "$step"
        tail -n "+$5" "$4" | tail -n 40
    elif [[ $step == @(conformance|memcheck|racecheck|fuzz|pressure|pressure_collect) ]]; then
        printf '\n==== %s:\n' "$step"
        tail -n "+$5" "$4" | tail -n 6
    fi
}

run_step() {
    local step=$1 limit start=$SECONDS before status
    if [[ $device == cpu && -n ${needs_gpu[$step]:-} ]]; then
        outcome[$step]='left out: it needs a GPU'
        return
    fi
    if ! limit=$(time_for "$step"); then
        outcome[$step]='not run: no time left'
        has_failed=1
        return
    fi
    printf '\n==== %s (at most %s s) ====\n' "$step" "$limit" >>"$log"
    before=$(wc -l <"$log")
    limited "$step" "$limit" >>"$log" 2>&1
    status=$?
    seconds[$step]=$((SECONDS - start))
    note "$step" "$status" "$limit" "$log" $((before + 1))
}

# Beside the steps that do not measure, which come last then. It ends by itself.
start_pressure() {
    pressure_limit=$(time_for pressure) || return
    pressure_start=$SECONDS
    limited pressure "$pressure_limit" >"$pressure_log" 2>&1 &
    pressure_pid=$!
}

wait_for_pressure() {
    local status
    wait "$pressure_pid"
    status=$?
    seconds[pressure]=$((SECONDS - pressure_start))
    note pressure "$status" "$pressure_limit" "$pressure_log" 1
}

run_steps() {
    local i rest
    for i in "${!steps[@]}"; do
        rest=" ${steps[*]:i} "
        if ((beside)) && [[ -z $pressure_pid && $rest == *' pressure '* && $rest != *' bench'* &&
            ${steps[i]} != @(machine|build|conformance) ]]; then
            start_pressure
        fi
        if [[ ${steps[i]} == pressure && -n $pressure_pid ]]; then
            wait_for_pressure
        else
            run_step "${steps[i]}"
        fi
    done
}

print_table() {
    printf '%-16s %8s  %s\n' step seconds result
    local step
    for step in "${steps[@]}"; do
        printf '%-16s %8s  %s\n' "$step" "${seconds[$step]:--}" "${outcome[$step]:-not run}"
    done
    printf '%s GPU(s), %s ranks, commit %s, log: %s\n' "$num_gpus" "$num_ranks" "${commit:-unknown}" "${log##*/}"
}

if [[ -n ${GPU_CHECK_STEP:-} ]]; then
    trap : TERM # its limit ends the program of a step; what it has measured is still copied
    "step_$GPU_CHECK_STEP"
    exit
fi
if [[ ${1:-} == --list ]]; then
    for step in "${all_steps[@]}"; do echo "$step (at most ${limits[$step]} s)"; done
    for name in check suite proof; do echo "$name: ${sets[$name]}"; done
    exit
fi
steps=()
for name in "${@:-check}"; do
    # shellcheck disable=SC2206  # a set is a list of words
    steps+=(${sets[$name]:-$name})
done
for step in "${steps[@]}"; do
    if [[ -z ${limits[$step]:-} ]]; then
        echo "no step '$step'; there are: ${all_steps[*]}; and sets of them: ${!sets[*]}" >&2
        exit 2
    fi
done
: >"$log"
stamp=$(mktemp)
run_steps
results=()
for file in "$out"/*_intranode_*.json "$out"/*_low-latency_*.json; do
    [[ $file -nt $stamp ]] && results+=("$file")
done
rm "$stamp"
if ((${#results[@]} > 0)); then
    echo
    "$python" tools/render_benchmarks.py --text "${results[@]}"
fi
echo
print_table | tee "$table"
command="tools/gpu_check.sh ${*:-check}"
[[ $device == cuda ]] || command="tools/gpu_check.sh --device $device ${*:-check}"
settings=$(env | grep -E '^GPU_CHECK_(RANKS|PRESSURE_S|SEED|BESIDE|TESTS|BENCH)=' | sort | tr '\n' ' ')
"$python" tools/gpu_check_record.py "$out" --commit "${commit:-unknown}" --command "$settings$command" --device "$device" \
    --num-gpus "$num_gpus" --num-ranks "$num_ranks" >/dev/null || has_failed=1
exit "$has_failed"
