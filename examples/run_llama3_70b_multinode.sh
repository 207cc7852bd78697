#!/usr/bin/env bash
# EAGLE-3 draft for Llama-3.3-70B-Instruct on two nodes of eight GPUs. The eight GPUs of a node share one copy of the
# target (tensor parallel); the draft is data parallel over all sixteen.
#
# Write a hostfile with one line per node, `NAME slots=8`, the first node first. If the first node has pdsh, and reaches
# every node, itself included, by ssh without a password, start this there:
#
#   HOSTFILE=hostfile bash examples/run_llama3_70b_multinode.sh
#
# Without ssh, start it on each node, with the node's line in the hostfile, from 0, and the address of the first node:
#
#   HOSTFILE=hostfile NO_SSH=1 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash examples/run_llama3_70b_multinode.sh
#   HOSTFILE=hostfile NO_SSH=1 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash examples/run_llama3_70b_multinode.sh
#
# This repository, its Python environment and OUTPUT, and DATASET and TARGET if they are paths, have the same path on
# every node; OUTPUT is on a file system that all nodes share. A TARGET from the hub is downloaded once per node
# (141 GB). Other variables and the arguments are those of run_llama3_online.sh.
#
# Hardware: meant for 2 x 8 GPUs with 80 GB (docs/distributed.md has the arithmetic). Runs with two ranks on one
# machine and a small target, both ways.
set -euo pipefail
cd "$(dirname "$0")/.."

export TARGET=${TARGET:-meta-llama/Llama-3.3-70B-Instruct}
export OUTPUT=${OUTPUT:-output/llama3-70b-multinode}
export TP_SIZE=${TP_SIZE:-8}                        # GPUs that share one copy of the target: those of a node
export BATCH_SIZE=${BATCH_SIZE:-1}                  # sequences per rank in one forward of the target: 8 on 8 GPUs
export GLOBAL_BATCH=${GLOBAL_BATCH:-32}             # sequences per optimizer step: a multiple of MICRO_BATCH x 16 ranks
export NUM_PROMPTS=${NUM_PROMPTS:-0}                # the evaluation would hold the complete target on one GPU
HOSTFILE=${HOSTFILE:-hostfile}                      # one line per node: NAME slots=8
NO_SSH=${NO_SSH:-0}                                 # 1: this script is started on each node
NODE_RANK=${NODE_RANK:-0}                           # this node's line in the hostfile, with NO_SSH=1
MASTER_ADDR=${MASTER_ADDR:-}                        # address of the first node; empty: determined over ssh
MASTER_PORT=${MASTER_PORT:-29500}                   # a free port there
WAIT_MINUTES=${WAIT_MINUTES:-120}                   # for the first node's data, with NO_SSH=1
DIST_TIMEOUT=${DIST_TIMEOUT:-60}                    # minutes; loading or downloading the target must fit

if [ ! -f "$HOSTFILE" ]; then # the launcher would use this node alone
    echo "error: no hostfile $HOSTFILE: write one line for each node, NAME slots=GPUS, and set HOSTFILE to its path" >&2
    exit 2
fi
export LAUNCHER="deepspeed --hostfile $HOSTFILE --master_port $MASTER_PORT ${MASTER_ADDR:+--master_addr $MASTER_ADDR}"
if [ "$NO_SSH" = 1 ]; then
    if [ -z "$MASTER_ADDR" ]; then
        echo "error: NO_SSH=1 needs MASTER_ADDR, the address of the first node" >&2
        exit 2
    fi
    if [ -n "${REGENERATE:-}" ]; then # stage 1 would wait for ranks on the other nodes
        echo "error: REGENERATE needs ssh between the nodes: without it, run examples/run_llama3_online.sh with it and" \
            "STAGES=1 on one node, with this TARGET and OUTPUT, and then this recipe with STAGES=\"2 3 4\" instead" >&2
        exit 2
    fi
    LAUNCHER+=" --no_ssh --node_rank $NODE_RANK"
fi

if [ "$NO_SSH" = 1 ] && [ "$NODE_RANK" != 0 ]; then
    echo "=== 1. and 2. are the first node's: waiting for $OUTPUT/vocab_mapping"
    for _ in $(seq $((WAIT_MINUTES * 12))); do
        [ ! -e "$OUTPUT/vocab_mapping/t2d.npy" ] || break # it is written last
        sleep 5
    done
    if [ ! -e "$OUTPUT/vocab_mapping/t2d.npy" ]; then
        echo "error: the first node has not written $OUTPUT/vocab_mapping within $WAIT_MINUTES minutes:" \
            "see its output, and whether $OUTPUT is on a file system that the nodes share" >&2
        exit 2
    fi
    export STAGES=3
fi

exec bash examples/run_llama3_online.sh --dist_timeout "$DIST_TIMEOUT" "$@"
