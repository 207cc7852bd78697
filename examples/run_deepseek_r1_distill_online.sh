#!/usr/bin/env bash
# EAGLE-3 draft for DeepSeek-R1-Distill-Llama-8B, trained online. The distillations into Qwen are another TARGET.
#
#   DATASET=answers.jsonl bash examples/run_deepseek_r1_distill_online.sh
#   TARGET=deepseek-ai/DeepSeek-R1-Distill-Qwen-7B DATASET=answers.jsonl bash examples/run_deepseek_r1_distill_online.sh
#
# These targets mostly produce reasoning: use answers with reasoning, best the target's own, one row for each
# (docs/targets.md). With ShareGPT, the default, every stage runs, but expect little of the draft. Variables, stages and
# arguments are those of run_llama3_online.sh.
#
# Hardware: meant for one node of 8 GPUs with 80 GB; each holds the complete target, 16 GB. Runs on a CPU with a small
# target.
set -euo pipefail
cd "$(dirname "$0")/.."

export TARGET=${TARGET:-deepseek-ai/DeepSeek-R1-Distill-Llama-8B}
export CHAT_TEMPLATE=${CHAT_TEMPLATE:-deepseek-r1-distill}
export OUTPUT=${OUTPUT:-output/deepseek-r1-distill-llama-8b-online}
export MAX_LENGTH=${MAX_LENGTH:-8192}
export MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-1024}

exec bash examples/run_llama3_online.sh "$@"
