#!/usr/bin/env bash
# EAGLE-3 draft for Llama-3.1-8B-Instruct, trained beside a vLLM server: some GPUs of the node serve the target and
# write its hidden states to a shared folder, the others train the draft on them (docs/hidden_states.md).
#
#   bash examples/run_llama3_vllm.sh
#   SERVER="/opt/vllm/bin/vllm serve" SERVER_GPUS=0,1 TRAIN_GPUS=2,3 bash examples/run_llama3_vllm.sh
#
# Needs vLLM 0.32 or later, best in its own environment, since it pins its own versions: see SERVER. Other variables and
# the arguments are those of run_llama3_online.sh.
#
# Hardware: meant for one node of 8 GPUs with 80 GB. Runs on a CPU with a small target and the CPU build of vLLM
# 0.32.0.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh

export TARGET=${TARGET:-meta-llama/Llama-3.1-8B-Instruct}
export OUTPUT=${OUTPUT:-output/llama3-8b-vllm}
export MAX_LENGTH=${MAX_LENGTH:-2048}
SERVER=${SERVER:-vllm serve}                        # command, which the target and the flags follow
SERVER_GPUS=${SERVER_GPUS:-0,1,2,3}                 # they share the target, tensor parallel
TRAIN_GPUS=${TRAIN_GPUS:-4,5,6,7}
PORT=${PORT:-8000}
SHARED=${SHARED:-}                                  # folder for the server's files; empty: a new one in memory
ON_GENERATE=${ON_GENERATE:-delete}                  # cache: keep the hidden states, for later epochs and runs

STAGES="1 2" bash examples/run_llama3_online.sh

echo "=== 3a. the server, with the layers that training reads: three auxiliary ones and the last"
LAYERS=$(python - "$TARGET" <<'PYTHON' | tail -n 1
import sys

from core import target_files

model_dir = target_files.resolve_target(sys.argv[1], weights=False)
text_config, *_ = target_files.read_target_config(model_dir)
layers = text_config.num_hidden_layers
print(*target_files.default_layer_ids(layers), layers, sep=",")
PYTHON
)
FOLDER=$SHARED
if [ -z "$SHARED" ]; then
    [ -w /dev/shm ] && FOLDER=$(mktemp -d -p /dev/shm) || FOLDER=$(mktemp -d)
fi
stop() {
    [ -z "${SERVER_PID:-}" ] || { kill "$SERVER_PID" 2>/dev/null && wait "$SERVER_PID"; } || true
    SERVER_PID=
    [ -n "$SHARED" ] || rm -rf "$FOLDER"
}
trap stop EXIT
IFS=, read -r -a gpus <<<"$SERVER_GPUS"
# shellcheck disable=SC2086
CUDA_VISIBLE_DEVICES=$SERVER_GPUS $SERVER "$TARGET" --port "$PORT" --tensor-parallel-size "${#gpus[@]}" \
    --max-model-len "$((MAX_LENGTH + 1))" \
    --speculative_config "{\"method\": \"extract_hidden_states\", \"num_speculative_tokens\": 1, \"draft_model_config\":
        {\"hf_config\": {\"eagle_aux_hidden_state_layer_ids\": [$LAYERS]}}}" \
    --kv_transfer_config "{\"kv_connector\": \"ExampleHiddenStatesConnector\", \"kv_role\": \"kv_producer\",
        \"kv_connector_extra_config\": {\"shared_storage_path\": \"$FOLDER\"}}" >"$OUTPUT/server.log" 2>&1 &
SERVER_PID=$!
until python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$PORT/health', timeout=5)" 2>/dev/null; do
    kill -0 "$SERVER_PID" 2>/dev/null || {
        echo "error: the server ended, see $OUTPUT/server.log" >&2
        exit 1
    }
    sleep 2
done

STAGES=3 LAUNCHER="deepspeed --include localhost:$TRAIN_GPUS" bash examples/run_llama3_online.sh \
    --vllm_endpoint "http://127.0.0.1:$PORT/v1" --on_generate "$ON_GENERATE" \
    --hidden_states_path "$OUTPUT/hidden_states" "$@"
stop

STAGES=4 SERVE_GPUS=${#gpus[@]} bash examples/run_llama3_online.sh
