#!/usr/bin/env bash
# EAGLE-3 draft for DeepSeek-R1-Distill-Llama-8B, trained online: the target stays in memory and its hidden states are
# formed while training. The distillations into Qwen are another TARGET.
#
#   DATASET=answers.jsonl bash examples/run_deepseek_r1_distill_online.sh
#   TARGET=deepseek-ai/DeepSeek-R1-Distill-Qwen-7B DATASET=answers.jsonl bash examples/run_deepseek_r1_distill_online.sh
#
# These targets think first, and at length: most of what they produce is reasoning. So the draft needs answers with
# reasoning, best those of the target itself: a row's last answer keeps what stands under reasoning_content, or before
# </think> in its content, although the target's own template drops it. Earlier answers of a row lose it, as they do
# when the target is served: give one row for each. ShareGPT, the default, has no reasoning: with it all stages run, but
# expect little of such a draft while the target thinks.
#
# Hardware: meant for one node of 8 GPUs with 80 GB; each holds the whole target, 16 GB. Time and acceptance length:
# not measured yet. Seen to run: on a CPU, with a small target. Written 2026-11-21. Every variable can be overridden
# from the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh

TARGET=${TARGET:-deepseek-ai/DeepSeek-R1-Distill-Llama-8B} # folder or hub id
DATASET=${DATASET:-sharegpt}                        # preset, or a JSON Lines file of conversations
DATASET_PATH=${DATASET_PATH:-}                      # local copy of the preset's hub repository; empty: download
CHAT_TEMPLATE=${CHAT_TEMPLATE:-deepseek-r1-distill}
OUTPUT=${OUTPUT:-output/deepseek-r1-distill-llama-8b-online}
NUM_GPUS=${NUM_GPUS:-8}                             # ranks on this node
DEEPSPEED_CONFIG=${DEEPSPEED_CONFIG:-ds_configs/zero2.json}
DRAFT_VOCAB_SIZE=${DRAFT_VOCAB_SIZE:-32000}
MAX_LENGTH=${MAX_LENGTH:-8192}                      # tokens
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
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-1024}

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
echo "  vllm serve $TARGET --speculative-config '{\"method\": \"eagle3\", \"model\": \"$OUTPUT/draft/final\"," \
    "\"num_speculative_tokens\": 3}'"
echo "  python -m sglang.launch_server --model-path $TARGET --speculative-algorithm EAGLE3" \
    "--speculative-draft-model-path $OUTPUT/draft/final --speculative-num-steps 3 --speculative-eagle-topk 1" \
    "--speculative-num-draft-tokens 4"
