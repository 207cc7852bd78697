#!/usr/bin/env bash
# EAGLE-3 draft for Qwen3-30B-A3B, a mixture of experts, trained online: TP_SIZE ranks share a copy of the target, their
# hidden states are formed while training. The draft is dense: its intermediate size is the one that the target's
# config.json has for dense layers, 6,144, as much as the 8 experts of 768 that work on a token.
#
#   bash examples/run_qwen3_30b_a3b_online.sh
#   TARGET=Qwen/Qwen3-30B-A3B-Instruct-2507 bash examples/run_qwen3_30b_a3b_online.sh
#
# Whether the target thinks is decided by CHAT_TEMPLATE. qwen3-instruct, the default, is for answers at once, as
# ShareGPT's are: serve the target with thinking switched off (enable_thinking=false), or take the Instruct one. For a
# target that thinks take qwen3-thinking, answers of its own with their reasoning under reasoning_content, and a longer
# MAX_LENGTH.
#
# Hardware: meant for one node of 8 GPUs with 80 GB. By arithmetic the target has 61 GB of weights; two ranks that share
# them hold 31 GB each. The evaluation at the end holds all of them on one GPU. TP_SIZE has to divide the 4 key-value
# heads. Time and acceptance length: not measured yet. Seen to run: on a CPU, with a small target. Written 2026-11-21.
# Every variable can be overridden from the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh

TARGET=${TARGET:-Qwen/Qwen3-30B-A3B}                # folder or hub id
DATASET=${DATASET:-sharegpt}                        # preset, or a JSON Lines file of conversations
DATASET_PATH=${DATASET_PATH:-}                      # local copy of the preset's hub repository; empty: download
CHAT_TEMPLATE=${CHAT_TEMPLATE:-qwen3-instruct}      # or qwen3-thinking
OUTPUT=${OUTPUT:-output/qwen3-30b-a3b-online}
NUM_GPUS=${NUM_GPUS:-8}                             # ranks on this node
TP_SIZE=${TP_SIZE:-2}                               # ranks that share a copy of the target
DEEPSPEED_CONFIG=${DEEPSPEED_CONFIG:-ds_configs/zero2.json}
DRAFT_VOCAB_SIZE=${DRAFT_VOCAB_SIZE:-32000}
MAX_LENGTH=${MAX_LENGTH:-2048}                      # tokens
VALIDATION_RATIO=${VALIDATION_RATIO:-0.005}
NUM_EPOCHS=${NUM_EPOCHS:-2}
TTT_LENGTH=${TTT_LENGTH:-7}
LEARNING_RATE=${LEARNING_RATE:-1e-4}
GLOBAL_BATCH=${GLOBAL_BATCH:-16}                    # sequences per optimizer step, all ranks
MICRO_BATCH=${MICRO_BATCH:-1}                       # sequences per rank in one forward of the draft
LOG_STEPS=${LOG_STEPS:-50}
SAVE_MINUTES=${SAVE_MINUTES:-30}                    # between two checkpoints; started again, training goes on
REPORT_TO=${REPORT_TO:-tensorboard}
NUM_PROMPTS=${NUM_PROMPTS:-32}                      # of the evaluation
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-256}

echo "=== 1. data: conversations to tokens and loss mask"
python prepare_data.py --dataset "$DATASET" ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
    --target_model_path "$TARGET" --chat_template "$CHAT_TEMPLATE" --max_length "$MAX_LENGTH" \
    --validation_ratio "$VALIDATION_RATIO" --output_path "$OUTPUT/data"

echo "=== 2. the draft's vocabulary"
python build_vocab_mapping.py --token_freq_path "$OUTPUT/data/token_freq.pt" --draft_vocab_size "$DRAFT_VOCAB_SIZE" \
    --target_model_path "$TARGET" --output_path "$OUTPUT/vocab_mapping"

echo "=== 3. training"
deepspeed --num_gpus "$NUM_GPUS" train_eagle3.py \
    --target_model_path "$TARGET" \
    --data_path "$OUTPUT/data" \
    --d2t_path "$OUTPUT/vocab_mapping/d2t.npy" --t2d_path "$OUTPUT/vocab_mapping/t2d.npy" \
    --tp_size "$TP_SIZE" \
    --max_length "$MAX_LENGTH" --ttt_length "$TTT_LENGTH" --num_epochs "$NUM_EPOCHS" --learning_rate "$LEARNING_RATE" \
    --draft_global_batch_size "$GLOBAL_BATCH" --draft_micro_batch_size "$MICRO_BATCH" \
    --log_steps "$LOG_STEPS" --report_to "$REPORT_TO" \
    --save_minutes "$SAVE_MINUTES" --save_total_limit 3 --resume \
    --deepspeed_config "$DEEPSPEED_CONFIG" \
    --output_dir "$OUTPUT/draft"

echo "=== 4. check and evaluation"
python export_draft.py --check "$OUTPUT/draft/final"
python evaluate_draft.py --target_model_path "$TARGET" --draft_model_path "$OUTPUT/draft/final" \
    --prompts "$OUTPUT/data" --num_prompts "$NUM_PROMPTS" --max_new_tokens "$MAX_NEW_TOKENS" \
    --num_draft_tokens "$TTT_LENGTH" --output "$OUTPUT/evaluation"

echo "Serve it:"
echo "  vllm serve $TARGET --tensor-parallel-size $TP_SIZE --speculative-config '{\"method\": \"eagle3\"," \
    "\"model\": \"$OUTPUT/draft/final\", \"num_speculative_tokens\": 3}'"
echo "  python -m sglang.launch_server --model-path $TARGET --tp-size $TP_SIZE --speculative-algorithm EAGLE3" \
    "--speculative-draft-model-path $OUTPUT/draft/final --speculative-num-steps 3 --speculative-eagle-topk 1" \
    "--speculative-num-draft-tokens 4"
[ "$CHAT_TEMPLATE" != qwen3-instruct ] || echo "with \"chat_template_kwargs\": {\"enable_thinking\": false} in" \
    "each request: this draft has learned answers without a thought."
