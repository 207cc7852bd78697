"""The recipe of a laptop, as it is but shorter: a real target, its own replies, questions of two turns."""

import json

import pytest
import torch

from core import draft_files, target_model
from helpers import real, tiny
from helpers.recipes import run

QUESTIONS = [
    {"category": "writing", "turns": ["Write one sentence about the sea.", "Now one about a mountain."]},
    {"category": "math", "turns": ["What is 12 + 30?", "And twice that?"]},
]


@pytest.mark.slow
def test_smollm2_recipe_with_the_real_target(tmp_path):
    target = real.smollm2(tmp_path)
    subjects = ["tea", "rain", "a bicycle", "the moon", "bread", "a library", "the sea", "clocks"]
    rows = []
    for subject in subjects:
        asked = {"role": "user", "content": f"Tell me about {subject}."}
        rows.append({"conversations": [asked, {"role": "assistant", "content": "Not the target's words."}]})
    tiny.write_jsonl(tmp_path / "chats.jsonl", rows)
    tiny.write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    out = tmp_path / "out"
    printed = run(
        "run_smollm2_online.sh",
        1200,
        TARGET=target,
        DATASET=tmp_path / "chats.jsonl",
        PROMPTS=tmp_path / "questions.jsonl",
        OUTPUT=out,
        NUM_SAMPLES=len(rows),
        REGENERATE_MAX_TOKENS=12,
        VALIDATION_RATIO=0.2,
        DRAFT_VOCAB_SIZE=500,
        NUM_EPOCHS=1,
        GLOBAL_BATCH=4,
        MICRO_BATCH=2,
        BATCH_SIZE=2,
        LOG_STEPS=1,
        MAX_NEW_TOKENS=8,
    )
    assert "every text equals the target's own greedy text" in printed and "serve it:" in printed

    # What is trained on are the target's own words.
    answers = [json.loads(line) for line in (out / "data.answers" / "train.jsonl").read_text().splitlines()]
    replies = {row["messages"][1]["content"] for row in answers}
    assert len(answers) == len(replies) == len(rows) and "Not the target's words." not in replies

    figures = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert {name: group["prompts"] for name, group in figures["by_category"].items()} == {"writing": 2, "math": 2}
    assert (out / "served" / "README.md").exists() and draft_files.check_draft(out / "served") == []
    metrics = [json.loads(line) for line in (out / "draft" / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((out / "draft" / "run.json").read_text())["world_size"] == 2 and metrics
    assert target_model.load(target).embedding.dtype == torch.bfloat16
