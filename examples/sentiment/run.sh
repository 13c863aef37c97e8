#!/usr/bin/env bash
# Steers a pretrained story model with a reward model trained on film reviews, and asks a second reward model, trained on
# other reviews, what it thinks of the result. About 15 minutes on one CPU core.
#
#   bash run.sh MODEL DATA OUT
#
# MODEL: a small story model (tinystories-260k). DATA: a folder with train.jsonl, gold_train.jsonl and test.jsonl, pairs of
# a chosen and a rejected text. OUT: a new folder.
set -euo pipefail
model=$1 data=$2 out=$3
here=$(cd "$(dirname "$0")" && pwd)
python "$here/openings.py" "$out/openings"

reward_settings=(--learning_rate 2e-3 --num_train_epochs 5 --logging_steps 72)
remax reward --model "$model" --train_dataset "$data/train.jsonl" --eval_dataset "$data/test.jsonl" \
    --output_dir "$out/reward" "${reward_settings[@]}"
remax reward --model "$model" --train_dataset "$data/gold_train.jsonl" --eval_dataset "$data/test.jsonl" \
    --output_dir "$out/gold" "${reward_settings[@]}"

remax train --model "$model" --reward_model "$out/reward/model" \
    --train_dataset "$out/openings/train.jsonl" --eval_dataset "$out/openings/test.jsonl" --output_dir "$out/policy" \
    --max_steps 100 --learning_rate 3e-4 --beta 0.1 --max_completion_length 64 --logging_steps 10

for scorer in reward gold; do
    for policy in "$model" "$out/policy/model"; do
        remax evaluate --model "$policy" --ref_model "$model" --reward_model "$out/$scorer/model" \
            --eval_dataset "$out/openings/test.jsonl" --max_completion_length 64 --num_generations 4 \
            --output_dir "$out/evaluation/$scorer-$(basename "$(dirname "$policy")")"
    done
done
