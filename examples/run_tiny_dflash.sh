#!/usr/bin/env bash
# A complete DFlash training in miniature: run_tiny_online.sh, whose variables and stages these are, with blocks of 8.
#
#   bash examples/run_tiny_dflash.sh
#   bash examples/run_tiny_dflash.sh --algorithm dspark       # arguments go to train_dflash.py
#
# Hardware: two CPU cores, 4 GB of memory; under 10 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

export TRAINER=train_dflash.py
export OUTPUT=${OUTPUT:-output/tiny-dflash}

bash examples/run_tiny_online.sh --num_layers 2 "$@"
