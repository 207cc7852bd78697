"""Run a command line several times in one process per rank: launch_many.py [[argv], ...] [name, or train_eagle3]

Prints one line `exit CODES` on rank 0: the exit codes of all runs, so that a test can start ranks once for many runs.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist

command = importlib.import_module(sys.argv[2] if len(sys.argv) > 2 else "train_eagle3")
codes = []
for argv in json.loads(sys.argv[1]):
    try:
        command.main(command.parse_args(argv))
        codes.append(0)
    except SystemExit as stop:
        codes.append(stop.code)
every = [None] * int(os.environ["WORLD_SIZE"])
dist.all_gather_object(every, codes)
if dist.get_rank() == 0:
    print("exit", json.dumps(every))
dist.destroy_process_group()
