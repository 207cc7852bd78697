#!/usr/bin/env bash
# EAGLE-3 draft for Qwen3-8B, trained online. Other dense Qwen3 models and Qwen2.5 are another TARGET.
#
#   bash examples/run_qwen3_8b_online.sh
#   CHAT_TEMPLATE=qwen3-thinking DATASET=answers.jsonl MAX_LENGTH=8192 bash examples/run_qwen3_8b_online.sh
#
# CHAT_TEMPLATE decides whether the target thinks (docs/targets.md). Variables, stages and arguments are those of
# run_llama3_online.sh.
#
# Hardware: meant for one node of 8 GPUs with 80 GB; each holds the complete target, 16 GB. Runs on a CPU with a small
# target.
set -euo pipefail
cd "$(dirname "$0")/.."

export TARGET=${TARGET:-Qwen/Qwen3-8B}
export CHAT_TEMPLATE=${CHAT_TEMPLATE:-qwen3-instruct} # or qwen3-thinking
export OUTPUT=${OUTPUT:-output/qwen3-8b-online}

bash examples/run_llama3_online.sh "$@"
[ "$CHAT_TEMPLATE" != qwen3-instruct ] || echo "with \"chat_template_kwargs\": {\"enable_thinking\": false} in" \
    "each request: this draft has learned answers without a thought."
