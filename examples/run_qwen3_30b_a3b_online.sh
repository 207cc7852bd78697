#!/usr/bin/env bash
# EAGLE-3 draft for Qwen3-30B-A3B, a mixture of experts, trained online: TP_SIZE ranks share a copy of the target.
#
#   bash examples/run_qwen3_30b_a3b_online.sh
#   TARGET=Qwen/Qwen3-30B-A3B-Instruct-2507 bash examples/run_qwen3_30b_a3b_online.sh
#
# CHAT_TEMPLATE decides whether the target thinks (docs/targets.md). TP_SIZE must divide the 4 key-value heads. The
# draft is dense. Variables, stages and arguments are those of run_llama3_online.sh.
#
# Hardware: meant for one node of 8 GPUs with 80 GB. By arithmetic the target has 61 GB of weights: two ranks that
# share them hold 31 GB each; the evaluation holds all of them on one GPU. Runs on a CPU with a small target.
set -euo pipefail
cd "$(dirname "$0")/.."

export TARGET=${TARGET:-Qwen/Qwen3-30B-A3B}
export CHAT_TEMPLATE=${CHAT_TEMPLATE:-qwen3-instruct} # or qwen3-thinking
export OUTPUT=${OUTPUT:-output/qwen3-30b-a3b-online}
export TP_SIZE=${TP_SIZE:-2}

bash examples/run_llama3_online.sh "$@"
[ "$CHAT_TEMPLATE" != qwen3-instruct ] || echo "with \"chat_template_kwargs\": {\"enable_thinking\": false} in" \
    "each request: this draft has learned answers without a thought."
