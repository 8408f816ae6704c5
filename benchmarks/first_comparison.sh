#!/usr/bin/env bash
# The first comparison: SST-2 at equal forward passes, one seed, an lr grid for every method.
#   benchmarks/first_comparison.sh DATA_DIR TUNER OUT
# Finished runs are kept: killed and started again, it goes on with the next one.
set -euo pipefail
data=$1 tuner=$2 out=$3
forwards=162

run() { # method lr steps [options]
    local method=$1 lr=$2 steps=$3
    shift 3
    local dir="$out/$method-$lr"
    [ -e "$dir/summary.json" ] && return
    python finetune.py --model smollm2-135m-instruct --task sst2 --data-dir "$data" --method "$method" --lr "$lr" \
        --steps "$steps" --noise rademacher --dev-size 150 --eval-size 300 --eval-every $(((steps + 2) / 3)) \
        --seed 0 --overwrite --out "$dir" "$@" >/dev/null
}

# the middle of each grid first
for lrs in "4e-5 2e-5 1e-3" "2e-5 4e-5 4e-3" "8e-5 8e-5 8e-3"; do
    read -r mezo tuned fzoo <<<"$lrs"
    run mezo "$mezo" $((forwards / 2))
    run zo-finetuner "$tuned" $((forwards / 2)) --tuner "$tuner"
    run fzoo "$fzoo" $((forwards / 9))
done
python -m zotuner report "$out"/*/ --plot "$out/loss.png"
