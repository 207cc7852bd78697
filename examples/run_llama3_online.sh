#!/usr/bin/env bash
# EAGLE-3 draft for Llama-3.1-8B-Instruct, trained online: the target stays in memory and computes its hidden states
# during training. ShareGPT conversations, a draft vocabulary of 32,000 tokens.
#
# This is the complete recipe. The recipes of other targets set its variables and run it.
#
#   bash examples/run_llama3_online.sh
#   TARGET=/models/Llama-3.1-8B-Instruct DATASET=chats.jsonl NUM_GPUS=4 bash examples/run_llama3_online.sh
#   bash examples/run_llama3_online.sh --weight_decay 0.1     # arguments go to the trainer
#   STAGES="3 4" bash examples/run_llama3_online.sh           # some of the stages
#
# Started again after an interruption, it continues where it stopped.
#
# Hardware: meant for one node of 8 GPUs with 80 GB. Runs on a CPU with a small target. Every variable can be
# overridden from the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh

TARGET=${TARGET:-meta-llama/Llama-3.1-8B-Instruct}  # folder or hub id
DATASET=${DATASET:-sharegpt}                        # preset, or a JSON Lines file of conversations
DATASET_PATH=${DATASET_PATH:-}                      # local copy of the preset's hub repository; empty: download
REGENERATE=${REGENERATE:-}                          # local: the target replies itself, on all ranks; empty: data as is
REGENERATE_MAX_TOKENS=${REGENERATE_MAX_TOKENS:-4096} # per reply
CHAT_TEMPLATE=${CHAT_TEMPLATE:-llama3}
OUTPUT=${OUTPUT:-output/llama3-8b-online}
NUM_SAMPLES=${NUM_SAMPLES:-}                        # conversations, drawn at random; empty: all
MAX_LENGTH=${MAX_LENGTH:-2048}                      # tokens
VALIDATION_RATIO=${VALIDATION_RATIO:-0.005}         # share of the conversations that selects the best checkpoint
DRAFT_VOCAB_SIZE=${DRAFT_VOCAB_SIZE-32000}          # empty: all tokens
NUM_GPUS=${NUM_GPUS:-8}                             # ranks on this node
LAUNCHER=${LAUNCHER:-deepspeed --num_gpus $NUM_GPUS}  # command that starts the ranks
TRAINER=${TRAINER:-train_eagle3.py}
RECIPE=${RECIPE-best}                               # flags of train_eagle3.py --recipe; empty: its defaults
TP_SIZE=${TP_SIZE:-1}                               # ranks that share one copy of the target
BATCH_SIZE=${BATCH_SIZE:-2}                         # sequences per rank in one forward of the target
DEEPSPEED_CONFIG=${DEEPSPEED_CONFIG:-ds_configs/zero2.json}
PRECISION=${PRECISION:-auto}                        # of the draft: bf16, fp32; auto: bf16 on GPUs
NUM_EPOCHS=${NUM_EPOCHS:-2}
TTT_LENGTH=${TTT_LENGTH-7}                          # of train_eagle3.py
NUM_DRAFT_TOKENS=${NUM_DRAFT_TOKENS:-$TTT_LENGTH}   # per pass of the evaluation; empty: what a block holds
LEARNING_RATE=${LEARNING_RATE:-1e-4}
GLOBAL_BATCH=${GLOBAL_BATCH:-16}                    # sequences per optimizer step, all ranks
MICRO_BATCH=${MICRO_BATCH:-1}                       # sequences per rank in one forward of the draft
LOG_STEPS=${LOG_STEPS:-50}
SAVE_MINUTES=${SAVE_MINUTES:-30}                    # between two checkpoints
REPORT_TO=${REPORT_TO:-tensorboard}
PROMPTS=${PROMPTS:-$OUTPUT/data}                    # of the evaluation: validation rows; mt_bench, humaneval, a file
NUM_PROMPTS=${NUM_PROMPTS:-32}                      # of the evaluation, which loads the target on one GPU; 0: none
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-256}
SERVE_GPUS=${SERVE_GPUS:-$TP_SIZE}                  # GPUs that serve the target
STAGES=${STAGES:-1 2 3 4}

if [[ $STAGES == *1* ]]; then
    echo "=== 1. data: conversations to tokens and loss mask"
    START=python
    OWN_REPLIES=()
    if [ -n "$REGENERATE" ]; then
        START=$LAUNCHER
        OWN_REPLIES=(--regenerate "$REGENERATE" --regenerate_max_tokens "$REGENERATE_MAX_TOKENS")
    fi
    $START prepare_data.py --dataset "$DATASET" ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} "${OWN_REPLIES[@]}" \
        --target_model_path "$TARGET" --chat_template "$CHAT_TEMPLATE" --max_length "$MAX_LENGTH" \
        ${NUM_SAMPLES:+--num_samples "$NUM_SAMPLES"} --validation_ratio "$VALIDATION_RATIO" --output_path "$OUTPUT/data"
fi

MAPPING=()
[ -z "$DRAFT_VOCAB_SIZE" ] ||
    MAPPING=(--d2t_path "$OUTPUT/vocab_mapping/d2t.npy" --t2d_path "$OUTPUT/vocab_mapping/t2d.npy")

if [[ $STAGES == *2* && -n $DRAFT_VOCAB_SIZE ]]; then
    echo "=== 2. the draft's vocabulary"
    python build_vocab_mapping.py --token_freq_path "$OUTPUT/data/token_freq.pt" \
        --draft_vocab_size "$DRAFT_VOCAB_SIZE" --target_model_path "$TARGET" --output_path "$OUTPUT/vocab_mapping"
fi

if [[ $STAGES == *3* ]]; then
    echo "=== 3. training"
    $LAUNCHER "$TRAINER" \
        --target_model_path "$TARGET" --data_path "$OUTPUT/data" --max_length "$MAX_LENGTH" "${MAPPING[@]}" \
        --tp_size "$TP_SIZE" --batch_size "$BATCH_SIZE" ${RECIPE:+--recipe "$RECIPE"} \
        ${TTT_LENGTH:+--ttt_length "$TTT_LENGTH"} --num_epochs "$NUM_EPOCHS" --learning_rate "$LEARNING_RATE" \
        --draft_global_batch_size "$GLOBAL_BATCH" --draft_micro_batch_size "$MICRO_BATCH" \
        --log_steps "$LOG_STEPS" --report_to "$REPORT_TO" \
        --save_best --save_minutes "$SAVE_MINUTES" --save_total_limit 3 --resume \
        --deepspeed_config "$DEEPSPEED_CONFIG" --precision "$PRECISION" \
        --output_dir "$OUTPUT/draft" "$@"
fi

if [[ $STAGES == *4* ]]; then
    echo "=== 4. the best checkpoint: check, evaluation and export"
    # Drafts overfit: the last step is seldom the best one.
    BEST=$OUTPUT/draft/best
    [ ! -f "$BEST" ] || BEST=$OUTPUT/draft/$(cat "$BEST") # on storage without links a file with the checkpoint's name
    [ -e "$BEST" ] || BEST=$OUTPUT/draft/final            # no validation rows
    python export_draft.py --check "$BEST"
    evaluation=()
    if [ "$NUM_PROMPTS" != 0 ]; then
        python evaluate_draft.py --target_model_path "$TARGET" --draft_model_path "$BEST" \
            --prompts "$PROMPTS" --num_prompts "$NUM_PROMPTS" --max_new_tokens "$MAX_NEW_TOKENS" \
            ${NUM_DRAFT_TOKENS:+--num_draft_tokens "$NUM_DRAFT_TOKENS"} --output "$OUTPUT/evaluation"
        evaluation=(--evaluation "$OUTPUT/evaluation")
    fi
    # The draft alone, its model card, and the commands that serve it: a checkpoint has other files as well.
    python export_draft.py "$BEST" --format flat --output "$OUTPUT/served" --tp_size "$SERVE_GPUS" "${evaluation[@]}"
fi
