#!/usr/bin/env bash
# EAGLE-3 draft for SmolLM2-135M-Instruct on a laptop: real conversations, the target's own replies, MT-Bench's
# questions in both turns. No GPU.
#
#   bash examples/run_smollm2_online.sh
#   TARGET=models/SmolLM2-135M-Instruct DATASET=sharegpt.json PROMPTS=mt_bench.jsonl bash examples/run_smollm2_online.sh
#
# Variables, stages and arguments are those of run_llama3_online.sh.
#
# Hardware: two CPU cores, 8 GB of memory; 52 minutes: 15 for 114,102 tokens of replies, 30 for the training, 7 for the
# rest (AMD EPYC, shared, torch 2.13.0, 2026-12-01). Acceptance length with 7 drafts a pass 1.365, and 1.395 with
# --seed 1; by position 0.279 0.063 0.017 0.005 0.001 0.001 0.000, and 0.291 0.077 0.021 0.005 0.001 0.000 0.000.
# Tokens/s 18.7 with the draft, 21.6 without: a CPU takes longer to verify several tokens than one.
set -euo pipefail
cd "$(dirname "$0")/.."

export TARGET=${TARGET:-HuggingFaceTB/SmolLM2-135M-Instruct}
export CHAT_TEMPLATE=${CHAT_TEMPLATE:-qwen} # the markers of ChatML
export OUTPUT=${OUTPUT:-output/smollm2}
export NUM_SAMPLES=${NUM_SAMPLES:-1000}
export REGENERATE=${REGENERATE-local}
export REGENERATE_MAX_TOKENS=${REGENERATE_MAX_TOKENS:-128}
export MAX_LENGTH=${MAX_LENGTH:-512}
export VALIDATION_RATIO=${VALIDATION_RATIO:-0.02}
export DRAFT_VOCAB_SIZE=${DRAFT_VOCAB_SIZE:-8000}
export NUM_GPUS=${NUM_GPUS:-2} # ranks: one a core, with one thread each
export LAUNCHER=${LAUNCHER:-env OMP_NUM_THREADS=1 deepspeed --num_gpus $NUM_GPUS}
export NUM_EPOCHS=${NUM_EPOCHS:-4}
export PRECISION=${PRECISION:-bf16}
export BATCH_SIZE=${BATCH_SIZE:-4}
export GLOBAL_BATCH=${GLOBAL_BATCH:-8}
export MICRO_BATCH=${MICRO_BATCH:-4}
export LOG_STEPS=${LOG_STEPS:-10}
export PROMPTS=${PROMPTS:-mt_bench}
export NUM_PROMPTS=${NUM_PROMPTS:-16} # two of each category, two turns each
export MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-128}

bash examples/run_llama3_online.sh "$@"
