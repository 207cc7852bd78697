#!/usr/bin/env bash
# EAGLE-3 draft for Llama-3.1-8B-Instruct, trained offline: first the target's hidden states are written to disk, then
# the draft is trained from them, without the target (docs/hidden_states.md).
#
#   bash examples/run_llama3_offline.sh
#   TARGET=/models/llama DATASET=chats.jsonl HIDDEN_STATES=/disk/states bash examples/run_llama3_offline.sh
#
# STAGES=states ends after the hidden states; STAGES=train does the rest, for example on another machine with the same
# OUTPUT and HIDDEN_STATES. Other variables and the arguments are those of run_llama3_online.sh. Started again after an
# interruption, it continues where it stopped.
#
# Hardware: meant for one node of 8 GPUs with 80 GB; the training alone needs one smaller GPU (NUM_GPUS=1), if
# NUM_PROMPTS=0 leaves out the evaluation, which loads the target. The states take up to 33 KB a token in bfloat16, 16
# KB in fp8; the total is printed before anything is written. Runs on a CPU with a small target.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh

export TARGET=${TARGET:-meta-llama/Llama-3.1-8B-Instruct}
export OUTPUT=${OUTPUT:-output/llama3-8b-offline}
STAGES=${STAGES:-all}                                 # states, train, or all
NUM_GPUS=${NUM_GPUS:-8}                               # ranks on this node
BATCH_SIZE=${BATCH_SIZE:-8}                           # sequences per rank in one forward of the target
HIDDEN_STATES=${HIDDEN_STATES:-$OUTPUT/hidden_states}
HIDDEN_STATES_DTYPE=${HIDDEN_STATES_DTYPE:-bfloat16}  # fp8 takes half
MAX_DISK=${MAX_DISK:-}                                # GB that the states may take; empty: what the disk has

case $STAGES in states | train | all) ;; *)
    echo "error: STAGES is $STAGES: choose states, train or all" >&2
    exit 2
esac

if [ "$STAGES" != train ]; then
    STAGES=1 bash examples/run_llama3_online.sh

    echo "=== 1b. the target's hidden states"
    deepspeed --num_gpus "$NUM_GPUS" prepare_hidden_states.py \
        --target_model_path "$TARGET" --data_path "$OUTPUT/data" --batch_size "$BATCH_SIZE" \
        --output_path "$HIDDEN_STATES" --hidden_states_dtype "$HIDDEN_STATES_DTYPE" ${MAX_DISK:+--max_disk "$MAX_DISK"}
fi
[ "$STAGES" != states ] || exit 0

STAGES="2 3 4" BATCH_SIZE=2 exec bash examples/run_llama3_online.sh \
    --hidden_states_path "$HIDDEN_STATES" --on_missing raise "$@"
