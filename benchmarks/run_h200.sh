#!/usr/bin/env bash
# All benchmarks on one GPU, JSON and one log into $OUT (default: bench/h200), within about eight minutes.
# Reports and pictures are made from the JSON afterwards: djinn-fx bench report $OUT/decode_gpt2.json
# BUDGET scales every part: BUDGET=2 gives each twice the seconds. Arguments choose: run_h200.sh decode compile
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT="${OUT:-bench/h200}"
BUDGET="${BUDGET:-1}"
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
status=0
chosen=" $* "

# NAME MODEL SECONDS [OPTIONS]: no part begins after so many seconds; a part that has begun ends by itself.
bench() {
    local name=$1 model=$2 seconds=$3
    shift 3
    [[ $chosen == "  " || $chosen == *" $name "* ]] || return 0
    echo "=== $name $model, $seconds s, $(date -u +%H:%M:%S)"
    timeout --kill-after=30 "$((seconds * BUDGET + 60))" python3 -m benchmarks."$name" \
        --model "$model" --device cuda --budget-seconds "$((seconds * BUDGET))" --out "$OUT" "$@" || status=1
}

{
    bench interactivity gpt2 70
    bench decode gpt2 80
    bench decode llama-8b-shape 170
    bench checkpoint gpt2 40
    bench compile gpt2 90
    ls -l "$OUT"
    exit "$status"
} 2>&1 | tee "$OUT/run.log"
exit "${PIPESTATUS[0]}"
