#!/usr/bin/env bash
# EAGLE-3 draft for Llama-3.1-8B-Instruct, trained beside a vLLM server: some GPUs of the node serve the target and write
# its hidden states to a shared folder, the others train the draft on them. Conversations of ShareGPT, a draft vocabulary
# of 32,000 tokens.
#
#   bash examples/run_llama3_vllm.sh
#   SERVER="/opt/vllm/bin/vllm serve" SERVER_GPUS=0,1 TRAIN_GPUS=2,3 bash examples/run_llama3_vllm.sh
#
# Needs vLLM 0.32 or later, best in an environment of its own, as it asks for versions of its own: see SERVER.
# Hardware: meant for one node of 8 GPUs with 80 GB. Time and acceptance length: not measured yet. Seen to run: on a CPU,
# with a small target and the CPU build of vLLM 0.32.0. Written 2026-11-21. Every variable can be overridden from the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh

TARGET=${TARGET:-meta-llama/Llama-3.1-8B-Instruct}  # folder or hub id
DATASET=${DATASET:-sharegpt}                        # preset, or a JSON Lines file of conversations
DATASET_PATH=${DATASET_PATH:-}                      # local copy of the preset's hub repository; empty: download
CHAT_TEMPLATE=${CHAT_TEMPLATE:-llama3}
OUTPUT=${OUTPUT:-output/llama3-8b-vllm}
SERVER=${SERVER:-vllm serve}                        # command that the target and the flags follow
SERVER_GPUS=${SERVER_GPUS:-0,1,2,3}                 # they share the target, tensor parallel
TRAIN_GPUS=${TRAIN_GPUS:-4,5,6,7}
PORT=${PORT:-8000}
SHARED=${SHARED:-}                                  # folder for the server's files; empty: a new one in memory
DEEPSPEED_CONFIG=${DEEPSPEED_CONFIG:-ds_configs/zero2.json}
DRAFT_VOCAB_SIZE=${DRAFT_VOCAB_SIZE:-32000}
MAX_LENGTH=${MAX_LENGTH:-2048}                      # tokens
VALIDATION_RATIO=${VALIDATION_RATIO:-0.005}
NUM_EPOCHS=${NUM_EPOCHS:-2}
TTT_LENGTH=${TTT_LENGTH:-7}
LEARNING_RATE=${LEARNING_RATE:-1e-4}
GLOBAL_BATCH=${GLOBAL_BATCH:-16}                    # sequences per optimizer step, all ranks
MICRO_BATCH=${MICRO_BATCH:-1}                       # sequences per rank in one forward of the draft
ON_GENERATE=${ON_GENERATE:-delete}                  # cache: keep the hidden states, for later epochs and runs
LOG_STEPS=${LOG_STEPS:-50}
SAVE_MINUTES=${SAVE_MINUTES:-30}                    # between two checkpoints; started again, training goes on
REPORT_TO=${REPORT_TO:-tensorboard}
NUM_PROMPTS=${NUM_PROMPTS:-32}                      # of the evaluation
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-256}

echo "=== 1. data: conversations to tokens and loss mask"
python prepare_data.py --dataset "$DATASET" ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
    --target_model_path "$TARGET" --chat_template "$CHAT_TEMPLATE" --max_length "$MAX_LENGTH" \
    --validation_ratio "$VALIDATION_RATIO" --output_path "$OUTPUT/data"

echo "=== 2. the draft's vocabulary"
python build_vocab_mapping.py --token_freq_path "$OUTPUT/data/token_freq.pt" --draft_vocab_size "$DRAFT_VOCAB_SIZE" \
    --target_model_path "$TARGET" --output_path "$OUTPUT/vocab_mapping"

echo "=== 3. the server, with the layers that training reads: three auxiliary ones and the last"
LAYERS=$(python - "$TARGET" <<'PYTHON' | tail -n 1
import sys

from core.target_files import default_layer_ids, read_target_config, resolve_target

layers = read_target_config(resolve_target(sys.argv[1], weights=False))[0].num_hidden_layers
print(*default_layer_ids(layers), layers, sep=",")
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

echo "=== 4. training"
deepspeed --include "localhost:$TRAIN_GPUS" train_eagle3.py \
    --target_model_path "$TARGET" \
    --data_path "$OUTPUT/data" \
    --vllm_endpoint "http://127.0.0.1:$PORT/v1" --on_generate "$ON_GENERATE" \
    --hidden_states_path "$OUTPUT/hidden_states" \
    --d2t_path "$OUTPUT/vocab_mapping/d2t.npy" --t2d_path "$OUTPUT/vocab_mapping/t2d.npy" \
    --max_length "$MAX_LENGTH" --ttt_length "$TTT_LENGTH" --num_epochs "$NUM_EPOCHS" --learning_rate "$LEARNING_RATE" \
    --draft_global_batch_size "$GLOBAL_BATCH" --draft_micro_batch_size "$MICRO_BATCH" \
    --log_steps "$LOG_STEPS" --report_to "$REPORT_TO" \
    --save_minutes "$SAVE_MINUTES" --save_total_limit 3 --resume \
    --deepspeed_config "$DEEPSPEED_CONFIG" \
    --output_dir "$OUTPUT/draft"
stop

echo "=== 5. check and evaluation"
python export_draft.py --check "$OUTPUT/draft/final"
python evaluate_draft.py --target_model_path "$TARGET" --draft_model_path "$OUTPUT/draft/final" \
    --prompts "$OUTPUT/data" --num_prompts "$NUM_PROMPTS" --max_new_tokens "$MAX_NEW_TOKENS" \
    --num_draft_tokens "$TTT_LENGTH" --output "$OUTPUT/evaluation"
