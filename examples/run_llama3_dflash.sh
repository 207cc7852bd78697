#!/usr/bin/env bash
# DFlash draft for Llama-3.1-8B-Instruct, trained online: five layers, blocks of 8, all tokens of the vocabulary, as
# both engines serve it.
#
#   bash examples/run_llama3_dflash.sh
#   bash examples/run_llama3_dflash.sh --algorithm dspark     # arguments go to train_dflash.py
#
# Variables and stages are those of run_llama3_online.sh.
#
# Hardware: meant for one node of 8 GPUs with 80 GB. Runs on a CPU with a small target.
set -euo pipefail
cd "$(dirname "$0")/.."

export TRAINER=train_dflash.py
export OUTPUT=${OUTPUT:-output/llama3-8b-dflash}
export RECIPE=
export TTT_LENGTH=
export DRAFT_VOCAB_SIZE=${DRAFT_VOCAB_SIZE-}              # a smaller vocabulary is served by vLLM only
export LEARNING_RATE=${LEARNING_RATE:-6e-4}
export NUM_EPOCHS=${NUM_EPOCHS:-6}

bash examples/run_llama3_online.sh "$@"
