#!/usr/bin/env bash
# DFlash draft for Qwen3-8B, trained online: run_llama3_dflash.sh for another target.
#
#   bash examples/run_qwen3_8b_dflash.sh
#   CHAT_TEMPLATE=qwen3-thinking bash examples/run_qwen3_8b_dflash.sh
#
# CHAT_TEMPLATE decides whether the target thinks (docs/targets.md).
#
# Hardware: meant for one node of 8 GPUs with 80 GB. Runs on a CPU with a small target.
set -euo pipefail
cd "$(dirname "$0")/.."

export TARGET=${TARGET:-Qwen/Qwen3-8B}
export CHAT_TEMPLATE=${CHAT_TEMPLATE:-qwen3-instruct} # or qwen3-thinking
export OUTPUT=${OUTPUT:-output/qwen3-8b-dflash}

bash examples/run_llama3_dflash.sh "$@"
