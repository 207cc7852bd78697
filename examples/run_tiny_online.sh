#!/usr/bin/env bash
# A complete EAGLE-3 training in miniature, from nothing: no GPU, no downloads except the Python packages.
#
# Trains a small Llama-style target on the documentation of Python's standard library, trains a draft for it on two
# ranks, and measures the draft by speculative decoding before and after, on prompts that were not trained on.
#
#   bash examples/run_tiny_online.sh
#
# Hardware: two CPU cores, 4 GB of memory; 6 minutes. Acceptance length 4.250, before training 1.000 (x86-64, Python
# 3.11, torch 2.13.0, 2026-11-21). Every variable can be overridden from the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh

OUTPUT=${OUTPUT:-output/tiny}             # everything is written here
RANKS=${RANKS:-2}                         # processes of the draft's training
TARGET_STEPS=${TARGET_STEPS:-500}         # optimizer steps of the target
NUM_EPOCHS=${NUM_EPOCHS:-1}               # of the draft's training
MAX_LENGTH=${MAX_LENGTH:-256}             # tokens
DRAFT_VOCAB_SIZE=${DRAFT_VOCAB_SIZE:-1024}
NUM_PROMPTS=${NUM_PROMPTS:-16}            # of the evaluation
TRAINER=${TRAINER:-train_eagle3.py}
TRAINER_FLAGS=("$@")                      # arguments go to it
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # one rank per core

if [ -e "$OUTPUT" ]; then
    echo "error: $OUTPUT exists; remove it, or set OUTPUT to another folder" >&2
    exit 2
fi
mkdir -p "$OUTPUT"
started=$(date +%s)
stage() { echo; echo "=== $* ($(($(date +%s) - started)) s)"; }

stage "1. the target's tokenizer"
python examples/make_tiny_target.py tokenizer --output "$OUTPUT/target"

stage "2. data: conversations to tokens and loss mask"
python prepare_data.py --dataset pydoc --target_model_path "$OUTPUT/target" --output_path "$OUTPUT/data" \
    --max_length "$MAX_LENGTH" --validation_ratio 0.02

stage "3. the target's weights"
OMP_NUM_THREADS=2 python examples/make_tiny_target.py weights --output "$OUTPUT/target" \
    --data_path "$OUTPUT/data" --steps "$TARGET_STEPS"

stage "4. the draft's vocabulary"
python build_vocab_mapping.py --token_freq_path "$OUTPUT/data/token_freq.pt" --draft_vocab_size "$DRAFT_VOCAB_SIZE" \
    --target_model_path "$OUTPUT/target" --output_path "$OUTPUT/vocab_mapping"

train() {
    deepspeed --num_gpus "$RANKS" "$TRAINER" \
        --target_model_path "$OUTPUT/target" \
        --data_path "$OUTPUT/data" \
        --d2t_path "$OUTPUT/vocab_mapping/d2t.npy" --t2d_path "$OUTPUT/vocab_mapping/t2d.npy" \
        --learning_rate 2e-3 --num_epochs "$NUM_EPOCHS" --warmup_ratio 0.05 --max_length "$MAX_LENGTH" \
        --batch_size 4 --draft_micro_batch_size 2 --draft_global_batch_size 8 --log_steps 40 "${TRAINER_FLAGS[@]}" "$@"
}

evaluate() {
    OMP_NUM_THREADS=2 python evaluate_draft.py --target_model_path "$OUTPUT/target" --prompts "$OUTPUT/data" \
        --num_prompts "$NUM_PROMPTS" --max_new_tokens 64 --draft_model_path "$1" --output "$2"
}

stage "5. acceptance before training"
train --output_dir "$OUTPUT/initial" --dry_run
evaluate "$OUTPUT/initial/latest" "$OUTPUT/evaluation_before"

stage "6. training"
train --output_dir "$OUTPUT/draft" --report_to tensorboard --save_best

stage "7. acceptance after training"
python export_draft.py --check "$OUTPUT/draft/best"
evaluate "$OUTPUT/draft/best" "$OUTPUT/evaluation_after"

stage "done: the curves are in $OUTPUT/draft/curves.png"
python - "$OUTPUT" <<'PY'
import json, sys
for name in ("before", "after"):
    figures = json.load(open(f"{sys.argv[1]}/evaluation_{name}/evaluation.json"))
    print(f"acceptance length {name} training: {figures['acceptance_length']:.3f}")
PY
