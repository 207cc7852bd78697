#!/usr/bin/env bash
# Sets everything up and runs the tests: `bash tests/run.sh`; the slow ones too: `bash tests/run.sh -m ""`.
# Arguments go to pytest. Two tests run at a time, as many start two ranks; WORKERS=0 runs them one by one.
set -euo pipefail
cd "$(dirname "$0")/.."
EAGLE3_REQUIREMENTS=$PWD/tests/requirements.txt
. examples/environment.sh
ruff check .
ruff format --check .
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"
