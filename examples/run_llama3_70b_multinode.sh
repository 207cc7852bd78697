#!/usr/bin/env bash
# EAGLE-3 draft for Llama-3.3-70B-Instruct on two nodes of eight GPUs. The eight GPUs of a node share one copy of the
# target (tensor parallel); the draft is data parallel over all sixteen.
#
# Write a hostfile with a line for each node, `NAME slots=8`, the first one first. If the first has pdsh, and reaches
# each of them, itself included, by ssh without a password, start this there:
#
#   HOSTFILE=hostfile bash examples/run_llama3_70b_multinode.sh
#
# Without ssh start it on each node, with the node's line in the hostfile, counted from 0, and the first node's address:
#
#   HOSTFILE=hostfile NO_SSH=1 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash examples/run_llama3_70b_multinode.sh
#   HOSTFILE=hostfile NO_SSH=1 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash examples/run_llama3_70b_multinode.sh
#
# This repository, its Python environment, OUTPUT, and DATASET and TARGET if they are paths, lie under the same path on
# every node, OUTPUT on a file system that all nodes share. A TARGET from the hub is downloaded once a node (141 GB).
#
# Hardware: meant for 2 x 8 GPUs with 80 GB. By arithmetic in bf16 each holds 17.1 GB of the target's layers, 4.2 GB of
# its embedding table and head, and 2.8 GB of the draft's weights (1.4 billion), beside gradients, optimizer states and
# activations. Memory, time and acceptance length: not measured yet. Seen to run: two ranks on one machine, with a small
# target, both ways. Written 2026-11-21. Every variable can be overridden from the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh

TARGET=${TARGET:-meta-llama/Llama-3.3-70B-Instruct} # folder or hub id
DATASET=${DATASET:-sharegpt}                        # preset, or a JSON Lines file of conversations
DATASET_PATH=${DATASET_PATH:-}                      # local copy of the preset's hub repository; empty: download
CHAT_TEMPLATE=${CHAT_TEMPLATE:-llama3}
OUTPUT=${OUTPUT:-output/llama3-70b-multinode}
HOSTFILE=${HOSTFILE:-hostfile}                      # a line for each node: NAME slots=8
NO_SSH=${NO_SSH:-0}                                 # 1: this script is started on each node
NODE_RANK=${NODE_RANK:-0}                           # this node's line in the hostfile, with NO_SSH=1
MASTER_ADDR=${MASTER_ADDR:-}                        # address of the first node; empty: asked for over ssh
MASTER_PORT=${MASTER_PORT:-29500}                   # a free port there
WAIT_MINUTES=${WAIT_MINUTES:-120}                   # for the first node's data, with NO_SSH=1
DIST_TIMEOUT=${DIST_TIMEOUT:-60}                    # minutes; loading or downloading the target has to fit
TP_SIZE=${TP_SIZE:-8}                               # GPUs that share one copy of the target: those of a node
BATCH_SIZE=${BATCH_SIZE:-1}                         # sequences per rank in one forward of the target: 8 on 8 GPUs
DEEPSPEED_CONFIG=${DEEPSPEED_CONFIG:-ds_configs/zero2.json}
DRAFT_VOCAB_SIZE=${DRAFT_VOCAB_SIZE:-32000}
MAX_LENGTH=${MAX_LENGTH:-2048}                      # tokens
VALIDATION_RATIO=${VALIDATION_RATIO:-0.005}
NUM_EPOCHS=${NUM_EPOCHS:-2}
TTT_LENGTH=${TTT_LENGTH:-7}
LEARNING_RATE=${LEARNING_RATE:-1e-4}
GLOBAL_BATCH=${GLOBAL_BATCH:-32}                    # sequences per optimizer step: a multiple of MICRO_BATCH x 16 ranks
MICRO_BATCH=${MICRO_BATCH:-1}                       # sequences per rank in one forward of the draft
LOG_STEPS=${LOG_STEPS:-50}
SAVE_MINUTES=${SAVE_MINUTES:-30}                    # between two checkpoints; started again, training goes on
REPORT_TO=${REPORT_TO:-tensorboard}

if [ ! -f "$HOSTFILE" ]; then # the launcher would go on with this node alone
    echo "error: no hostfile $HOSTFILE: write one line for each node, NAME slots=GPUS, and set HOSTFILE to its path" >&2
    exit 2
fi
nodes=(--hostfile "$HOSTFILE" --master_port "$MASTER_PORT" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
first=1
if [ "$NO_SSH" = 1 ]; then
    if [ -z "$MASTER_ADDR" ]; then
        echo "error: NO_SSH=1 needs MASTER_ADDR, the address of the first node" >&2
        exit 2
    fi
    nodes+=(--no_ssh --node_rank "$NODE_RANK")
    [ "$NODE_RANK" = 0 ] || first=0
fi

if [ "$first" = 1 ]; then
    echo "=== 1. data: conversations to tokens and loss mask"
    python prepare_data.py --dataset "$DATASET" ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
        --target_model_path "$TARGET" --chat_template "$CHAT_TEMPLATE" --max_length "$MAX_LENGTH" \
        --validation_ratio "$VALIDATION_RATIO" --output_path "$OUTPUT/data"

    echo "=== 2. the draft's vocabulary"
    python build_vocab_mapping.py --token_freq_path "$OUTPUT/data/token_freq.pt" \
        --draft_vocab_size "$DRAFT_VOCAB_SIZE" --target_model_path "$TARGET" --output_path "$OUTPUT/vocab_mapping"
else
    echo "=== 1. and 2. are the first node's: waiting for $OUTPUT/vocab_mapping"
    for _ in $(seq $((WAIT_MINUTES * 12))); do
        [ ! -e "$OUTPUT/vocab_mapping/t2d.npy" ] || break # it is written last
        sleep 5
    done
    if [ ! -e "$OUTPUT/vocab_mapping/t2d.npy" ]; then
        echo "error: the first node has not written $OUTPUT/vocab_mapping within $WAIT_MINUTES minutes:" \
            "see its output, and whether $OUTPUT is on a file system that the nodes share" >&2
        exit 2
    fi
fi

echo "=== 3. training"
deepspeed "${nodes[@]}" train_eagle3.py \
    --target_model_path "$TARGET" \
    --data_path "$OUTPUT/data" \
    --d2t_path "$OUTPUT/vocab_mapping/d2t.npy" --t2d_path "$OUTPUT/vocab_mapping/t2d.npy" \
    --tp_size "$TP_SIZE" --batch_size "$BATCH_SIZE" --dist_timeout "$DIST_TIMEOUT" \
    --max_length "$MAX_LENGTH" --ttt_length "$TTT_LENGTH" --num_epochs "$NUM_EPOCHS" --learning_rate "$LEARNING_RATE" \
    --draft_global_batch_size "$GLOBAL_BATCH" --draft_micro_batch_size "$MICRO_BATCH" \
    --log_steps "$LOG_STEPS" --report_to "$REPORT_TO" \
    --save_minutes "$SAVE_MINUTES" --save_total_limit 3 --resume \
    --deepspeed_config "$DEEPSPEED_CONFIG" \
    --output_dir "$OUTPUT/draft"
[ "$first" = 1 ] || exit 0

echo "=== 4. check"
python export_draft.py --check "$OUTPUT/draft/final"
# evaluate_draft.py would load the whole target on one GPU. The last "evaluation" line above, what training measured on
# the validation rows, is exact where these hold greedy answers of the target itself.

echo "Serve it, and measure acceptance as it is served:"
echo "  vllm serve $TARGET --tensor-parallel-size $TP_SIZE --speculative-config '{\"method\": \"eagle3\"," \
    "\"model\": \"$OUTPUT/draft/final\", \"num_speculative_tokens\": 3}'"
echo "  python -m sglang.launch_server --model-path $TARGET --tp-size $TP_SIZE --speculative-algorithm EAGLE3" \
    "--speculative-draft-model-path $OUTPUT/draft/final --speculative-num-steps 3 --speculative-eagle-topk 1" \
    "--speculative-num-draft-tokens 4"
