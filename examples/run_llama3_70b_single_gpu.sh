#!/usr/bin/env bash
# EAGLE-3 draft for Llama-3.3-70B-Instruct on one GPU: the target's weights stay in CPU memory, or on an NVMe disk, and
# pass through the GPU layer by layer.
#
#   bash examples/run_llama3_70b_single_gpu.sh
#   TARGET_OFFLOAD=nvme TARGET_OFFLOAD_PATH=/nvme/target bash examples/run_llama3_70b_single_gpu.sh
#
# Each forward of the target moves all of its layers to the GPU: 137 GB in bf16. At 25 GB/s, about what PCIe 4.0 with 16
# lanes carries, that alone takes 5.5 s, from a disk of 6 GB/s 23 s. So one forward should serve many tokens: BATCH_SIZE
# is the global batch here, one forward an optimizer step. For 16 sequences of 2,048 tokens 4.2 MB are moved a token and
# 4.5e15 operations done, 11 s at 4e14 in a second: computing hides the moving, from memory at least. Shorter sequences
# want a larger batch. Start-up prints this for your data.
#
# Hardware: meant for one GPU with 80 GB. In CPU memory 141 GB of weights, pinned, which PyTorch may round up for each
# tensor: have 200 GB. With nvme 13 GB of buffers instead, and 141 GB on the disk, whose files stay there afterwards. In
# the GPU's memory three layers (5.1 GB), table and head (4.2 GB), the draft with its optimizer (25 GB; 17 GB less with
# DEEPSPEED_CONFIG=ds_configs/zero2_offload.json) and activations. All of this is arithmetic; memory, time and
# acceptance length: not measured yet. Seen to run: on a CPU, with a small target. Written 2026-11-21. Every variable
# can be overridden from the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh

TARGET=${TARGET:-meta-llama/Llama-3.3-70B-Instruct} # folder or hub id
DATASET=${DATASET:-sharegpt}                        # preset, or a JSON Lines file of conversations
DATASET_PATH=${DATASET_PATH:-}                      # local copy of the preset's hub repository; empty: download
CHAT_TEMPLATE=${CHAT_TEMPLATE:-llama3}
OUTPUT=${OUTPUT:-output/llama3-70b-single-gpu}
TARGET_OFFLOAD=${TARGET_OFFLOAD:-cpu}               # cpu or nvme
TARGET_OFFLOAD_PATH=${TARGET_OFFLOAD_PATH:-}        # folder on the disk, with nvme
GLOBAL_BATCH=${GLOBAL_BATCH:-16}                    # sequences per optimizer step
BATCH_SIZE=${BATCH_SIZE:-$GLOBAL_BATCH}             # sequences in one forward of the target
MICRO_BATCH=${MICRO_BATCH:-1}                       # sequences in one forward of the draft
DEEPSPEED_CONFIG=${DEEPSPEED_CONFIG:-ds_configs/zero2.json}
DRAFT_VOCAB_SIZE=${DRAFT_VOCAB_SIZE:-32000}
MAX_LENGTH=${MAX_LENGTH:-2048}                      # tokens
NUM_SAMPLES=${NUM_SAMPLES:-8000}                    # conversations: about 490 steps an epoch
VALIDATION_RATIO=${VALIDATION_RATIO:-0.02}
NUM_EPOCHS=${NUM_EPOCHS:-1}
TTT_LENGTH=${TTT_LENGTH:-7}
LEARNING_RATE=${LEARNING_RATE:-1e-4}
LOG_STEPS=${LOG_STEPS:-10}
SAVE_MINUTES=${SAVE_MINUTES:-30}                    # between two checkpoints; started again, training goes on
REPORT_TO=${REPORT_TO:-tensorboard}

echo "=== 1. data: conversations to tokens and loss mask"
python prepare_data.py --dataset "$DATASET" ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
    --target_model_path "$TARGET" --chat_template "$CHAT_TEMPLATE" --max_length "$MAX_LENGTH" \
    --num_samples "$NUM_SAMPLES" --validation_ratio "$VALIDATION_RATIO" --output_path "$OUTPUT/data"

echo "=== 2. the draft's vocabulary"
python build_vocab_mapping.py --token_freq_path "$OUTPUT/data/token_freq.pt" --draft_vocab_size "$DRAFT_VOCAB_SIZE" \
    --target_model_path "$TARGET" --output_path "$OUTPUT/vocab_mapping"

echo "=== 3. training"
python train_eagle3.py \
    --target_model_path "$TARGET" \
    --data_path "$OUTPUT/data" \
    --d2t_path "$OUTPUT/vocab_mapping/d2t.npy" --t2d_path "$OUTPUT/vocab_mapping/t2d.npy" \
    --target_sharding zero3 --target_offload "$TARGET_OFFLOAD" \
    ${TARGET_OFFLOAD_PATH:+--target_offload_path "$TARGET_OFFLOAD_PATH"} --batch_size "$BATCH_SIZE" \
    --max_length "$MAX_LENGTH" --ttt_length "$TTT_LENGTH" --num_epochs "$NUM_EPOCHS" --learning_rate "$LEARNING_RATE" \
    --draft_global_batch_size "$GLOBAL_BATCH" --draft_micro_batch_size "$MICRO_BATCH" \
    --log_steps "$LOG_STEPS" --report_to "$REPORT_TO" \
    --save_minutes "$SAVE_MINUTES" --save_total_limit 3 --resume \
    --deepspeed_config "$DEEPSPEED_CONFIG" \
    --output_dir "$OUTPUT/draft"

echo "=== 4. check"
python export_draft.py --check "$OUTPUT/draft/final"
# evaluate_draft.py would load the whole target on one GPU. The last "evaluation" line above, what training measured on
# the validation rows, is exact where these hold greedy answers of the target itself.

echo "Serve it, and measure acceptance as it is served (on as many GPUs as the target needs, here 2 of 80 GB):"
echo "  vllm serve $TARGET --tensor-parallel-size 2 --speculative-config '{\"method\": \"eagle3\"," \
    "\"model\": \"$OUTPUT/draft/final\", \"num_speculative_tokens\": 3}'"
echo "  python -m sglang.launch_server --model-path $TARGET --tp-size 2 --speculative-algorithm EAGLE3" \
    "--speculative-draft-model-path $OUTPUT/draft/final --speculative-num-steps 3 --speculative-eagle-topk 1" \
    "--speculative-num-draft-tokens 4"
