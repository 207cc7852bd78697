#!/usr/bin/env bash
# A complete DFlash training in miniature: run_tiny_online.sh, whose variables and stages these are, with blocks of 8.
#
#   bash examples/run_tiny_dflash.sh
#   bash examples/run_tiny_dflash.sh --algorithm dspark       # arguments go to train_dflash.py
#
# Hardware: two CPU cores, 4 GB of memory; under 10 minutes if they have nothing else to do. Acceptance length 2.195,
# before training 1.000 (x86-64, Python 3.11, torch 2.13.0, 2026-12-01).
set -euo pipefail
cd "$(dirname "$0")/.."

export TRAINER=train_dflash.py
export OUTPUT=${OUTPUT:-output/tiny-dflash}

bash examples/run_tiny_online.sh --num_layers 2 "$@"
