"""The recipe that trains through a vLLM server, with a small target and a small server in its place."""

import json
import shlex
import sys
import urllib.request
from pathlib import Path

import pytest

from core import draft_files
from helpers import recipes, tiny, vllm_server
from helpers.vllm_server import HEADS


@pytest.mark.slow
def test_recipe_starts_the_server_trains_and_stops_it(tmp_path):
    tiny.write_target(tmp_path / "target", **HEADS)
    tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.conversations(30, 2))
    variables = {
        "OUTPUT": tmp_path / "out", "TARGET": tmp_path / "target", "DATASET": tmp_path / "chats.jsonl",
        "SERVER": shlex.join([sys.executable, vllm_server.__file__]), "SERVER_GPUS": "0",
        "TRAIN_GPUS": "0", "PORT": tiny.free_port(),
        "DRAFT_VOCAB_SIZE": 200, "VALIDATION_RATIO": 0.1, "NUM_EPOCHS": 1, "TTT_LENGTH": 3, "NUM_PROMPTS": 2,
        "MAX_NEW_TOKENS": 12, "LOG_STEPS": 1, "OMP_NUM_THREADS": 1, "MAX_LENGTH": 511,
    }  # fmt: skip
    printed = recipes.run("run_llama3_vllm.sh", 900, **variables)
    said = (tmp_path / "out" / "server.log").read_text()
    assert draft_files.check_draft(tmp_path / "out" / "draft" / "final") == []
    assert "head and embedding alone" in printed and "complete: " in printed
    line = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert line["layers"] == [2, 4, 5, 8] and line["max_len"] == 512
    assert not Path(line["folder"]).exists()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{variables['PORT']}/health", timeout=5)
