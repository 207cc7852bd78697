"""The recipes of other families than Llama, each with a small target of the family."""

import pytest
import torch

from core import dataloader, draft_files
from helpers import tiny
from helpers.families import FAMILIES, publish_in_mxfp4, write_target
from helpers.recipes import SMALL, run, tells_acceptance

# (script, family of its target, variables beside SMALL, what it prints, what the supervised text has; DeepSeek's prompt
# opens the thought)
RECIPES = [
    ("run_qwen3_8b_online.sh", "qwen3", {"CHAT_TEMPLATE": "qwen3-thinking"}, "world 2 = dp 2", "<think>\nBecause "),
    ("run_qwen3_8b_dflash.sh", "qwen3", {"CHAT_TEMPLATE": "qwen3-instruct"}, "blocks of 8", "<|im_end|>"),
    ("run_llama3_dflash.sh", "llama", {"DRAFT_VOCAB_SIZE": ""}, "blocks of 8", "<|eot_id|>"),
    ("run_qwen3_30b_a3b_online.sh", "qwen3 experts", {"TP_SIZE": 2}, "tensor parallel over 2", "<|im_end|>"),
    ("run_gpt_oss_20b_online.sh", "gpt-oss", {}, "target forward 2", "<|channel|>analysis<|message|>Because "),
    ("run_deepseek_r1_distill_online.sh", "r1 llama", {}, "world 2 = dp 2 x tp 1", ".\n</think>\n\n"),
]
R1 = {"r1 llama": FAMILIES["llama"]._replace(tokens=FAMILIES["deepseek"].tokens, template="deepseek-r1-distill")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name", "variables", "expected", "supervised"), RECIPES, ids=[" ".join(row[:2]) for row in RECIPES]
)
def test_recipe_of_a_family_with_a_small_target(script, name, variables, expected, supervised, tmp_path):
    _, tokenizer = write_target(tmp_path / "target", (FAMILIES | R1)[name])
    if name == "gpt-oss":
        publish_in_mxfp4(tmp_path / "target")
    chats = tiny.conversations(40)
    for i, chat in enumerate(chats):
        chat["conversations"][-1]["reasoning_content"] = f"Because {i}."
    tiny.write_jsonl(tmp_path / "chats.jsonl", chats)
    printed = run(
        script,
        900,
        OUTPUT=tmp_path / "out",
        TARGET=tmp_path / "target",
        DATASET=tmp_path / "chats.jsonl",
        NUM_GPUS=2,
        NUM_PROMPTS=2,
        MAX_NEW_TOKENS=12,
        **(SMALL | variables),
    )
    assert expected in printed and "complete: " in printed and tells_acceptance(tmp_path / "out", printed)
    assert draft_files.check_draft(tmp_path / "out" / "draft" / "final") == []
    assert (tmp_path / "out" / "evaluation" / "acceptance.png").exists()
    for row in dataloader.open_data(tmp_path / "out" / "data")[0]["train"]:
        text = tokenizer.decode(torch.tensor(row["input_ids"])[torch.tensor(row["loss_mask"]) == 1])
        assert supervised in text and "Question" not in text
