"""However ranks share the target and the prompts of an evaluation, texts, passes and figures are those of one rank."""

import collections
import json

import pytest
import torch

import evaluate_draft
from core import target_model
from helpers import drafts, tiny

VARIANTS = {
    "chain": ("--num_draft_tokens", "3"),
    "tree": ("--tree", "dynamic", "--topk", "4", "--depth", "3", "--num_draft_tokens", "12"),
}
VARIANTS["sampled"] = (*VARIANTS["tree"], "--temperature", "0.8")
LENGTH = 12
ZERO3 = ("--target_sharding", "zero3")
TP = ("--tp_size", "2")
RUNS = [("tree", TP), ("tree", ZERO3), ("sampled", TP), ("sampled", ())]  # on two ranks


def command(work, variant, output, *flags):
    given = {"target_model_path": "target", "draft_model_path": "draft", "prompts": "prompts.jsonl"}
    words = [word for name, path in given.items() for word in (f"--{name}", str(work / path))]
    return [*words, "--max_new_tokens", str(LENGTH), "--output", str(work / output), *VARIANTS[variant], *flags]


def outcome(folder):
    figures = json.loads((folder / "evaluation.json").read_text())
    names = ("acceptance_length", "accepted_by_position", "passes", "prompts", "new_tokens")
    rows = [json.loads(line) for line in (folder / "generations.jsonl").open()]
    return {name: figures[name] for name in names}, [(row["prompt"], row["input_ids"], row["passes"]) for row in rows]


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path):
    folder = tiny.write_target(tmp_path / "target", vocab_size=300)
    target = target_model.load(folder)
    texts = tiny.TEXTS[:3]
    asked = [tiny.tokenizer(300)(text)["input_ids"] for text in texts]
    counts = collections.Counter(token for prompt in asked for token in drafts.own_greedy(target, prompt, LENGTH))
    ids = torch.tensor(sorted(token for token, _ in counts.most_common(12)))
    draft, _ = drafts.random_draft(folder, target, len(ids))
    drafts.save_draft(tmp_path / "draft", draft, ids - torch.arange(len(ids)))
    tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts])
    for variant in VARIANTS:
        evaluate_draft.main(evaluate_draft.parse_args(command(tmp_path, variant, variant)))
    several = [command(tmp_path, variant, str(number), *flags) for number, (variant, flags) in enumerate(RUNS)]
    result = tiny.launch_many(2, several, "evaluate_draft")
    assert result.stdout.count("acceptance_length") == len(RUNS), "the main rank alone prints"
    for number, (variant, flags) in enumerate(RUNS):
        expected = outcome(tmp_path / variant)
        assert expected[0]["acceptance_length"] > 1
        assert outcome(tmp_path / str(number)) == expected, (variant, flags)
