#!/usr/bin/env bash
# Everything that needs a GPU, side by side on its cores: the tests marked `gpu`, tests/test_cuda.py and the state
# machine. Logs go to $OUT (default: build/gpu); one line for each part comes last. Needs the `dev` extra.
#
#     tests/run_gpu.sh                                 # all, within about nine minutes on 16 cores
#     tests/run_gpu.sh kernels+passes@120 models       # one wave after the other: PART[+PART...][@SECONDS]
#
# Parts: kernels, passes (inspection too), runtime (tests marked `gpu`), models (tests/test_cuda.py and its neighbour),
# machine (the state machine, compiled) and static (its decode loop over segments that are not compiled, with more
# examples). A part that takes more than its wave's SECONDS is ended, and what it had found by then is counted. Further
# options of pytest go into PYTEST_ADDOPTS. DJINN_TEST_DEVICE=cpu tries the last three without a GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-build/gpu}"
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"

# Plugins that happen to be installed stay out: some warn, and warnings of other versions shall be seen, not fail.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Each process compiles by itself: there are as many as cores.
export TORCHINDUCTOR_COMPILE_THREADS=1 OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE="${HYPOTHESIS_PROFILE:-unshrunk}"
export DJINN_TEST_DEVICE="${DJINN_TEST_DEVICE:-cuda}"
CORES="$(env -u OMP_NUM_THREADS nproc)"

# NAME SECONDS WORKERS ARGUMENTS...: one part, to its own log; ends with the seconds it took.
part() {
    local name=$1 seconds=$2 workers=$3 begun=$SECONDS
    shift 3
    timeout --signal=INT --kill-after=20 "$seconds" "$PYTHON" -m pytest -p xdist.plugin -p _hypothesis_pytestplugin \
        -p no:cacheprovider -vv -W default --durations=15 -n "$((workers < CORES ? workers : CORES))" "$@" \
        >"$OUT/$name.log" 2>&1
    local status=$?
    ((status == 124 || status == 137)) && echo "ended after $seconds s" >>"$OUT/$name.log"
    echo "$((SECONDS - begun)) $status" >"$OUT/.$name"
}

start() {
    local name=$1 seconds=$2
    case $name in
    kernels) part kernels "$seconds" 6 tests/kernels -m gpu --dist worksteal ;;
    passes) part passes "$seconds" 2 tests/passes tests/inspecting -m gpu --dist worksteal ;;
    runtime) part runtime "$seconds" 2 tests/runtime -m gpu --dist loadfile ;;
    models) part models "$seconds" 12 tests/test_cuda.py tests/test_cuda_elsewhere.py --dist loadscope ;;
    machine | static)
        local backend=inductor examples=200
        [[ $name == static ]] && backend=static examples=700
        rm -rf "$OUT/.examples.$name" && mkdir "$OUT/.examples.$name"
        DJINN_TEST_BACKEND="${DJINN_TEST_BACKEND:-$backend}" DJINN_STATE_LOG="$OUT/.examples.$name" \
            DJINN_STATE_EXAMPLES="${DJINN_STATE_EXAMPLES:-$examples}" DJINN_STATE_SECONDS="$((seconds * 3 / 4))" \
            part "$name" "$seconds" 7 tests/runtime/test_state_machine.py --dist loadscope -rP
        ;;
    *)
        echo "no part is called $name" >&2
        exit 2
        ;;
    esac
}

# What pytest said of each test, while it ran: right also where it did not come to its end.
counted() {
    local log="$OUT/$1.log" said passed failed skipped
    said=$(grep -E '^\[gw[0-9]+\] ' "$log" | sed -E 's/^\[gw[0-9]+\] \[ *[0-9]+%\] ([A-Z]+).*/\1/')
    passed=$(grep -cE '^(PASSED|XFAIL)$' <<<"$said")
    failed=$(grep -cE '^(FAILED|ERROR|XPASS)$' <<<"$said")
    skipped=$(grep -c '^SKIPPED$' <<<"$said")
    read -r took status <"$OUT/.$1"
    rm -f "$OUT/.$1"
    echo "$1: $passed passed, $failed failed, $skipped skipped, $took s, exit status $status"
    grep -hoE "^\{'model.*examples, .*" "$log" | sort -u | sed 's/^/    /'
    if [[ -d $OUT/.examples.$1 ]]; then
        find "$OUT/.examples.$1" -type f -exec sed 's/^/    ended early: /' {} +  # machines that were killed
        rm -rf "$OUT/.examples.$1"
    fi
    [[ $status == 0 ]]
}

(($# == 0)) && set -- kernels+passes+runtime+static@160 models+machine@350
names=()
for wave in "$@"; do
    limit=300
    [[ $wave == *@* ]] && limit=${wave##*@}
    IFS=+ read -ra chosen <<<"${wave%@*}"
    for name in "${chosen[@]}"; do
        start "$name" "$limit" &
    done
    wait
    for name in "${chosen[@]}"; do
        [[ -e $OUT/.$name ]] && names+=("$name")
    done
done

{
    failures=0
    for name in "${names[@]}"; do
        counted "$name" || failures=$((failures + 1))
    done
    ((failures == 0 && ${#names[@]} > 0))
} 2>&1 | tee "$OUT/summary.txt"
exit "${PIPESTATUS[0]}"
