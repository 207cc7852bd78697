#!/usr/bin/env bash
# EAGLE-3 draft for Llama-3.3-70B-Instruct on one GPU: the target's weights stay in CPU memory, or on an NVMe disk, and
# pass through the GPU layer by layer.
#
#   bash examples/run_llama3_70b_single_gpu.sh
#   TARGET_OFFLOAD=nvme TARGET_OFFLOAD_PATH=/nvme/target bash examples/run_llama3_70b_single_gpu.sh
#
# Each forward of the target moves all of its layers, 137 GB. It should serve many tokens: BATCH_SIZE is the global
# batch, one forward per optimizer step. docs/distributed.md has the arithmetic. Variables, stages and arguments are
# those of run_llama3_online.sh.
#
# Hardware: meant for one GPU with 80 GB and 200 GB of CPU memory (with nvme: 13 GB, and 141 GB on the disk, whose
# files stay there). Runs on a CPU with a small target.
set -euo pipefail
cd "$(dirname "$0")/.."

export TARGET=${TARGET:-meta-llama/Llama-3.3-70B-Instruct}
export OUTPUT=${OUTPUT:-output/llama3-70b-single-gpu}
export NUM_SAMPLES=${NUM_SAMPLES:-8000}             # conversations: about 490 steps an epoch
export VALIDATION_RATIO=${VALIDATION_RATIO:-0.02}
export NUM_EPOCHS=${NUM_EPOCHS:-1}
export GLOBAL_BATCH=${GLOBAL_BATCH:-16}             # sequences per optimizer step
export BATCH_SIZE=${BATCH_SIZE:-$GLOBAL_BATCH}      # sequences in one forward of the target
export LOG_STEPS=${LOG_STEPS:-10}
export NUM_PROMPTS=${NUM_PROMPTS:-0}                # the evaluation would hold the complete target on the GPU
export SERVE_GPUS=${SERVE_GPUS:-2}                  # of 80 GB
export LAUNCHER=${LAUNCHER:-python}
TARGET_OFFLOAD=${TARGET_OFFLOAD:-cpu}               # cpu or nvme
TARGET_OFFLOAD_PATH=${TARGET_OFFLOAD_PATH:-}        # folder on the disk, with nvme

exec bash examples/run_llama3_online.sh --target_sharding zero3 --target_offload "$TARGET_OFFLOAD" \
    ${TARGET_OFFLOAD_PATH:+--target_offload_path "$TARGET_OFFLOAD_PATH"} "$@"
