#!/usr/bin/env bash
# The values of docs/tasks.md: every task with a prompt for causal models, zero-shot, and then after 20 steps of MeZO.
#   benchmarks/zero_shot.sh DATA_DIR OUT [OPTIONS]
# Takes the tasks that DATA_DIR has. OPTIONS go to every run, such as --max-length 512. Finished runs are kept: killed and
# started again, it goes on with the next one.
set -euo pipefail
data=$1 out=$2
shift 2
options=("$@")
tasks="sst2 rte cb boolq wsc wic multirc copa record squad drop gsm8k metamathqa"

run() { # name task [options]
    local dir="$out/$1" task=$2
    shift 2
    if [ ! -d "$data/$task" ] || [ -e "$dir/summary.json" ]; then return; fi
    python finetune.py --model smollm2-135m-instruct --task "$task" --data-dir "$data" --train-size 100 --dev-size 10 \
        --eval-size 1000 --seed 0 --overwrite --out "$dir" "$@" "${options[@]}"
}

for task in $tasks; do run "$task" "$task" --method none; done
for task in $tasks; do run "$task-mezo" "$task" --method mezo --steps 20 --batch-size 4 --eval-size 100; done
