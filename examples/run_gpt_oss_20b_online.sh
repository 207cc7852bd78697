#!/usr/bin/env bash
# EAGLE-3 draft for gpt-oss-20b, a mixture of experts, trained online. The draft is dense.
#
#   bash examples/run_gpt_oss_20b_online.sh
#   DATASET=answers.jsonl MAX_LENGTH=4096 bash examples/run_gpt_oss_20b_online.sh
#
# Use the target's own answers with their reasoning under `thinking`: with ShareGPT the draft learns the final channel
# only. For smaller GPUs pass --target_sharding zero3; there is no tensor parallelism (docs/targets.md). Variables,
# stages and arguments are those of run_llama3_online.sh.
#
# Hardware: meant for one node of 8 GPUs with 80 GB; each holds the complete target, 42 GB in bfloat16. Runs on a CPU
# with a small target.
set -euo pipefail
cd "$(dirname "$0")/.."

export TARGET=${TARGET:-openai/gpt-oss-20b}
export CHAT_TEMPLATE=${CHAT_TEMPLATE:-gpt-oss}
export OUTPUT=${OUTPUT:-output/gpt-oss-20b-online}

exec bash examples/run_llama3_online.sh "$@"
