#!/usr/bin/env bash
# All benchmarks on one GPU, the telling ones first; JSON and a log into $OUT (default: benchmarks/results/ and the card).
# Reports and pictures are made from the JSON afterwards: djinn-fx bench report $OUT/decode_gpt2.json
# Arguments choose, by NAME or NAME:MODEL: run_gpu.sh steps decode:gpt2. BUDGET=2 gives each twice the seconds.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# "NVIDIA H100 80GB HBM3" becomes h100.
card=$(python3 -c 'import torch; print(torch.cuda.get_device_name().upper())' | grep -oE '[ABH][0-9]{3}' | head -1)
card=${card:-gpu}
OUT="${OUT:-benchmarks/results/${card,,}}"
BUDGET="${BUDGET:-1}"
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
status=0
chosen=" $* "

# NAME MODEL SECONDS [OPTIONS]: no part begins after so many seconds; one that has begun has 90 more.
bench() {
    local name=$1 model=$2 seconds=$3
    shift 3
    [[ $chosen == "  " || $chosen == *" $name "* || $chosen == *" $name:$model "* ]] || return 0
    echo "=== $name $model, $seconds s, $(date -u +%H:%M:%S)"
    timeout --kill-after=30 "$((seconds * BUDGET + 90))" python3 -m benchmarks."$name" \
        --model "$model" --device cuda --budget-seconds "$((seconds * BUDGET))" --out "$OUT" "$@" || status=1
}

{
    bench steps gpt2 180
    bench steps llama-8b-shape 360
    bench decode gpt2 240
    bench decode llama-8b-shape 330
    bench interactivity gpt2 240
    bench checkpoint gpt2 100
    bench compile llama-8b-shape 120 --depths 32 --no-peers
    bench virtual gpt2 120
    bench virtual llama-8b-shape 240
    bench density gpt2 180
    bench density llama-8b-shape 240
    bench harvest gpt2 60
    bench harvest llama-8b-shape 90
    bench endurance gpt2 150
    bench endurance llama-8b-shape 120 --quick
    ls -l "$OUT"
    exit "$status"
} 2>&1 | tee "$OUT/run.log"
exit "${PIPESTATUS[0]}"
