"""How a draft is served: the engines' commands, what one of them cannot do, and the checkpoint of a training."""

import json
import shlex

import pytest

from core import draft_files, serving
from helpers import tiny, written_drafts

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
QWEN3 = {"model_type": "qwen3"}
WINDOW = draft_files.window_keys(8, [True])
MIXED = {"num_hidden_layers": 2, **draft_files.window_keys(8, [True, False])}
ONE_STATE = draft_files.with_auxiliary_layers({}, [4])


@pytest.mark.parametrize(
    ("changes", "note", "engines"),  # engines: {engine: its flags for this draft}
    [
        ({}, None, {"vLLM": "", "SGLang": ""}),
        ({"num_hidden_layers": 2}, None, {"vLLM": "", "SGLang": ""}),
        ({"norm_before_residual": True}, "SGLang cannot", {"vLLM": ""}),
        ({"torch_dtype": "float32"}, "float16", {"vLLM": "", "SGLang": "--dtype float32"}),
        ({"hidden_act": "gelu"}, "silu", {}),
        (QWEN3, "SGLang has no such draft", {"vLLM": ""}),
        (WINDOW, "draft-window-size 7", {"vLLM": "", "SGLang": "--speculative-draft-window-size 7"}),
        (MIXED, "SGLang cannot serve this draft", {"vLLM": "--disable-hybrid-kv-cache-manager"}),
        (ONE_STATE, "SGLang leaves out fc", {"vLLM": ""}),
        ({"embed_requires_grad": True}, "SGLang puts the target's table", {"vLLM": ""}),
        # Of a draft with a width of its own SGLang keeps the table.
        ({"embed_requires_grad": True, "target_hidden_size": 20}, None, {"vLLM": "", "SGLang": ""}),
    ],
)
def test_an_engine_that_cannot_serve_a_draft_has_no_command_and_a_note_says_why(changes, note, engines):
    notes = serving.serving_notes(CONFIG | changes)
    assert len(notes) == (note is not None)
    assert not note or note in notes[0]
    plain = serving.serving_commands("draft", CONFIG, "org/target")
    commands = serving.serving_commands("draft", CONFIG | changes, "org/target")
    assert commands == {engine: f"{plain[engine]} {flags}".strip() for engine, flags in engines.items()}


def test_the_commands_are_those_that_a_shell_needs():
    """Names with spaces and quotes arrive as one word; by hand, word for word."""
    folder = "my runs/it's best"
    commands = serving.serving_commands(folder, CONFIG, "/models/a target", tp_size=4, tokens=5)
    speculative = {"method": "eagle3", "model": folder, "num_speculative_tokens": 5}
    words = shlex.split(commands["vLLM"])
    assert words[:-1] == [
        "vllm", "serve", "/models/a target", "--tensor-parallel-size", "4", "--speculative-config",
    ]  # fmt: skip
    assert json.loads(words[-1]) == speculative
    assert shlex.split(commands["SGLang"]) == [
        "python", "-m", "sglang.launch_server", "--model-path", "/models/a target", "--tp-size", "4",
        "--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", folder, "--speculative-num-steps", "5",
        "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "6",
    ]  # fmt: skip
    one = serving.serving_commands("draft", CONFIG, "org/target", is_flat=False)
    assert list(one) == ["vLLM"] and "tensor-parallel" not in one["vLLM"]


DFLASH, DSPARK = written_drafts.DFLASH, written_drafts.DSPARK
WINDOWS = draft_files.window_keys(8, [True, True])
BIDIRECTIONAL = "see the masks behind them: an engine has to draft 3 tokens a pass"


@pytest.mark.parametrize(
    ("config", "notes", "engines"),  # notes: a part of each
    [
        (DFLASH, [BIDIRECTIONAL], {"vLLM", "SGLang"}),
        (DFLASH | {"is_causal": True}, [], {"vLLM", "SGLang"}),
        (DFLASH | WINDOWS, [], {"vLLM", "SGLang"}),  # which are causal
        (DFLASH | WINDOWS | {"is_causal": False}, [BIDIRECTIONAL], {"vLLM", "SGLang"}),
        (DFLASH | {"draft_vocab_size": 12, "is_causal": True}, ["SGLang drafts with the target's head"], {"vLLM"}),
        (DFLASH | MIXED, ["vLLM needs its V2 runner", BIDIRECTIONAL], {"vLLM", "SGLang"}),
        (DSPARK | {"is_causal": True}, ["vLLM needs its V2 runner"], {"vLLM", "SGLang"}),
        (DSPARK, ["vLLM needs its V2 runner", "has to draft 4 tokens a pass"], {"vLLM", "SGLang"}),
    ],
)
def test_what_an_engine_cannot_do_with_a_block_draft(config, notes, engines):
    found = serving.serving_notes(config)
    assert len(found) == len(notes) and all(part in note for part, note in zip(notes, found, strict=True)), found
    assert serving.serving_commands("draft", config, "org/target").keys() == engines


def test_the_commands_of_block_drafts():
    """By hand. A block of 4: DFlash drafts 3 after the anchor, DSpark 4; SGLang counts the verified tokens."""
    for config, method, tokens in ((DFLASH, "dflash", 3), (DSPARK, "dspark", 4)):
        commands = serving.serving_commands("a draft", config | {"torch_dtype": "float32"}, "org/target")
        words = shlex.split(commands["vLLM"])
        speculative = {"method": method, "model": "a draft", "num_speculative_tokens": tokens}
        assert words[:-1] == ["vllm", "serve", "org/target", "--speculative-config"]
        assert json.loads(words[-1]) == speculative
        assert shlex.split(commands["SGLang"]) == [
            "python", "-m", "sglang.launch_server", "--model-path", "org/target", "--speculative-algorithm",
            method.upper(), "--speculative-draft-model-path", "a draft", "--speculative-num-draft-tokens",
            str(tokens + 1), "--dtype", "float32",
        ]  # fmt: skip


ROWS = [("train", 2, 9.0, None), ("validation", 2, 3.0, 1.5), ("validation", 4, 2.0, 2.5), ("validation", 6, 2.5, 2.0)]


@pytest.mark.parametrize(
    ("rows", "best", "metric", "name", "why"),
    [
        (ROWS[:1], None, "loss", "final", "the last step, as no validation rows say which one is the best"),
        (ROWS, None, "loss", "final", "the last step, as no evaluation was finite"),
        (
            ROWS,
            [2.5, 4, "acceptance_length", 2.0],
            "acceptance_length",
            "best",
            "the best checkpoint by acceptance_length, 2.500 at step 4, against 2.000 at the last, 6",
        ),
        (ROWS[:3], [2.0, 4, "loss", 2.0], "loss", "best", "the best checkpoint by loss, 2.000 at step 4, the last"),
        (
            ROWS,
            [2.5, 6, "loss", 2.5],
            "loss",
            "best",
            "the best checkpoint by loss, 2.500 at step 6, the last; step 4 had 2.000 and was not saved, which "
            "--save_best does",
        ),
    ],
)
def test_the_checkpoint_to_serve_and_why(tmp_path, rows, best, metric, name, why):
    rows = [
        {"split": split, "step": step, "loss": loss, "acceptance_length": length} for split, step, loss, length in rows
    ]
    tiny.write_jsonl(tmp_path / "metrics.jsonl", rows)
    if best:
        folder = tmp_path / f"step_{best[1]:08d}"
        folder.mkdir()
        (tmp_path / "best").symlink_to(folder.name)
    assert serving.choose_checkpoint(tmp_path, best, metric) == (tmp_path / name, why)
    if best:  # storage without links
        (tmp_path / "best").unlink()
        (tmp_path / "best").write_text(folder.name)
        assert serving.choose_checkpoint(tmp_path, best, metric) == (folder, why)
