"""The model card: what the hub reads, what a person reads, and that it says what is known and nothing else."""

import json
import os

import pytest
import yaml

import export_draft
import train_eagle3
from core import common, draft_files, model_card
from helpers import tiny, written_drafts

TARGET = "org/Target-1B"
DATA = {
    "fingerprint": "f" * 64,
    "ingredients": {"regenerate": {"model": TARGET}},
    "splits": {
        "train": {"rows": 1200, "tokens": 34567, "supervised_tokens": 23456},
        "validation": {"rows": 34, "tokens": 987, "supervised_tokens": 654},
    },
    "dataset": {"train": "sharegpt", "validation": "/home/me/secret/held_out.jsonl"},
}
EVALUATION = {
    "acceptance_length": 2.25,
    "accepted_by_position": [0.75, 0.5],
    "by_category": {
        "writing": {"acceptance_length": 2.0, "accepted_by_position": [0.6, 0.4], "passes": 1100, "prompts": 2},
        "math": {"acceptance_length": 2.5, "accepted_by_position": [0.9], "passes": 134, "prompts": 1},
    },
    "passes": 1234,
    "prompts": 3,
    "tokens_per_second_with_draft": 90.5,
    "tokens_per_second_without": 45.25,
    "speedup": 2.0,
    "date": "2026-01-02",
    "machine": "one H200",
    "settings": {
        "prompts": "/home/me/secret/mt_bench.jsonl",
        "temperature": 0.0,
        "max_new_tokens": 128,
        "num_draft_tokens": 2,
    },
}


def export(*argv):
    export_draft.main(export_draft.parse_args([str(word) for word in argv]))


def write_run(folder, target=TARGET, step=4):
    """A run's folder with one checkpoint, whose draft is random; what it recorded is given here."""
    given = ["--target_model_path", target, "--data_path", str(folder / "prepared"), "--output_dir", str(folder)]
    given += ["--learning_rate", "3e-4", "--recipe", "best", "--ttt_length", "5", "--save_steps", "2"]
    flags = vars(train_eagle3.parse_args(given))
    flags |= {"steps_per_epoch": 5, "total_steps": 10, "scheduler_total_steps": 10}
    versions = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}
    settings = {
        "flags": flags, "versions": versions, "world_size": 2, "device": "NVIDIA H200", "run_id": "x",
        "data_fingerprint": "f" * 64, "started": "2026-01-01T10:00:00+00:00",
    }  # fmt: skip
    draft = written_drafts.write(folder / f"step_{step:08d}")
    state = {"step": step, "seconds": 5400.0, "flags": flags, "world_size": 2, "files": {}, "best": None}
    common.write_sealed(draft / "trainer_state.json", state)
    (folder / "run.json").write_text(json.dumps(settings))
    (folder / "prepared").mkdir()
    (folder / "prepared" / "data_config.json").write_text(json.dumps(DATA))
    rows = [{"split": "validation", "step": n, "loss": 1.0, "acceptance_length": 1 + n / 8} for n in (2, 4, 6)]
    tiny.write_jsonl(folder / "metrics.jsonl", rows)
    return draft


def write_evaluation(folder, **settings):
    folder.mkdir()
    figures = EVALUATION | {"settings": EVALUATION["settings"] | settings}
    (folder / "evaluation.json").write_text(json.dumps(figures))
    return folder


def read_card(folder):
    """(metadata, body) of the card in a folder, by a plain reader of YAML."""
    _, metadata, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), body


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """(metadata, body) of the card of a run's checkpoint, of which everything is known, and the exported folder."""
    folder = tmp_path_factory.mktemp("card")
    draft = write_run(folder / "run")
    evaluation = write_evaluation(folder / "evaluation", draft_model_path=str(draft))
    export(draft, "--format", "flat", "--output", folder / "served", "--evaluation", evaluation, "--license", "mit")
    return *read_card(folder / "served"), folder / "served"


def test_what_the_hub_reads(card):
    metadata, _, _ = card
    assert metadata == {
        "base_model": TARGET,
        "datasets": ["Aeala/ShareGPT_Vicuna_unfiltered"],
        "library_name": "vllm",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["eagle3", "speculative-decoding", "draft-model", "vllm", "sglang"],
    }


def test_what_a_person_reads(card):
    _, body, _ = card
    lines = body.splitlines()
    headings = [line for line in lines if line.startswith("#")]
    assert headings == [f"# EAGLE-3 draft for {TARGET}", "## Serving", "## Acceptance", "## Draft", "## Training"]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[:1] + table[2:] == [
        ["category", "replies", "acceptance length", "1", "2"],
        ["writing", "2", "2.000", "0.600", "0.400"],
        ["math", "1", "2.500", "0.900", "-"],
        ["**all** of mt_bench.jsonl", "3", "2.250", "0.750", "0.500"],
    ]
    assert (
        "Measured on 2026-01-02: 2 tokens drafted a pass, greedy, replies of up to 128 tokens, 1,234 passes of the "
        "target, 90.5 tokens/s with the draft, 45.2 without: 2.00 times, on one H200."
    ) in lines
    assert f"hidden size 16, {written_drafts.PARAMETERS:,} parameters in bfloat16" in body
    training = lines[lines.index("## Training") + 2 :]
    assert training[:3] == [
        "- trained on: sharegpt, 1,200 conversations, 34,567 tokens, 23,456 of them of the assistant",
        "- validation: held_out.jsonl, 34 conversations, 987 tokens, 654 of them of the assistant",
        "- the assistant's replies are the target's own: they were regenerated",
    ]
    assert "- 4 optimizer steps of 8 conversations (0.80 epochs), checkpoint of step 4 of 10" in training
    assert "- 2 ranks on NVIDIA H200, started 2026-01-01; 1.5 hours up to this step" in training
    assert "acceptance length 1.500, " in body, "of step 4, not of the last"


def test_flags_are_those_that_differ_from_the_defaults(card):
    words = card[1].split("```\n")[-2].split()
    expected = {
        "learning_rate": "0.0003", "recipe": "best", "ttt_length": "5", "optimizer": "muon", "fc_norm": "true",
        "norm_output": "true", "freeze_head": "true", "chain_sampling": "true", "total_steps": "10",
    }  # fmt: skip
    found = dict(zip(words[::2], words[1::2], strict=True))
    assert found == {f"--{name}": value for name, value in expected.items()}


def test_nothing_of_this_machine_is_told(card, tmp_path):
    text = card[2].joinpath("README.md").read_text()
    assert "/home" not in text and "secret" not in text and str(tmp_path.parent.parent) not in text


def test_the_folder_is_served_as_it_was(card):
    assert {path.name for path in card[2].iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert draft_files.check_draft(card[2]) == []


def test_a_draft_of_somebody_else_has_a_short_card(tmp_path, capsys):
    """Nothing is known of its target, its data and its training; SGLang cannot serve this one."""
    foreign = written_drafts.write(tmp_path / "foreign", norm_before_residual=True)
    export(foreign, "--format", "flat", "--output", tmp_path / "served")
    metadata, body = read_card(tmp_path / "served")
    assert metadata == {
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "tags": ["eagle3", "speculative-decoding", "draft-model", "vllm"],
    }
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings == ["# EAGLE-3 draft", "## Serving", "## Draft"]
    assert "vllm serve TARGET" in body and "`TARGET` stands for the target" in body
    assert "- norm_before_residual: SGLang cannot serve this draft, vLLM can" in body
    assert "need the target: --target_model_path" in capsys.readouterr().out


def test_a_local_target_is_named_without_its_place_and_is_no_base_model(tmp_path, capsys):
    """The printed commands have its path; --base_model names it for the hub."""
    (tmp_path / "my models" / "Own-1B").mkdir(parents=True)
    draft = write_run(tmp_path / "run", target=str(tmp_path / "my models" / "Own-1B"))
    out = tmp_path / "served here"
    export(draft, "--format", "flat", "--output", out, "--tp_size", 2)
    metadata, body = read_card(out)
    assert "base_model" not in metadata and "vllm serve Own-1B " in body and "my models" not in body
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3] == "serve it:"
    assert printed[-2].startswith(f"  vllm serve '{tmp_path}/my models/Own-1B' --tensor-parallel-size 2 ")
    assert f'"model": "{out}"' in printed[-2] and f"'{out}'" in printed[-1]
    export(draft, "--format", "flat", "--output", out, "--base_model", TARGET)
    metadata, body = read_card(out)
    assert metadata["base_model"] == TARGET and f"vllm serve {TARGET} " in body


def test_the_speculators_form_is_vllms_and_names_the_target_for_others(tmp_path):
    """Its own number of drafted tokens; no folder of this machine in config.json either."""
    target = tiny.write_target(tmp_path / "target", vocab_size=400)
    draft = written_drafts.write(tmp_path / "draft", vocab_size=400, draft_vocab_size=400, hidden_size=64)
    argv = (draft, "--format", "speculators", "--output", tmp_path / "served", "--speculative_tokens", 4)
    export(*argv, "--target_model_path", target, "--base_model", TARGET)
    metadata, body = read_card(tmp_path / "served")
    assert metadata["tags"][3:] == ["vllm"] and "sglang" not in body
    assert '"num_speculative_tokens": 4' in body
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == TARGET
    assert str(tmp_path) not in json.dumps(config)


def test_the_prepared_data_are_told_only_if_they_are_those_of_the_run(tmp_path):
    draft = write_run(tmp_path / "run")
    path = tmp_path / "run" / "prepared" / "data_config.json"
    path.write_text(json.dumps(DATA | {"fingerprint": "e" * 64}))
    export(draft, "--format", "flat", "--output", tmp_path / "served")
    metadata, body = read_card(tmp_path / "served")
    assert "datasets" not in metadata and "34,567" not in body and "fingerprint ffffffffffff" in body


def test_figures_of_a_server_say_so(tmp_path):
    """It knows neither the draft's folder nor its speed without one."""
    evaluation = write_evaluation(tmp_path / "evaluation", server="http://127.0.0.1:8000", draft_model_path=None)
    figures = json.loads((evaluation / "evaluation.json").read_text())
    for name in ("date", "machine", "speedup", "by_category"):
        del figures[name]
    (evaluation / "evaluation.json").write_text(json.dumps(figures))
    os.utime(evaluation / "evaluation.json", (0, 86400 * 365))  # one year after 1970 began
    draft = written_drafts.write(tmp_path / "draft")
    export(draft, "--format", "flat", "--output", tmp_path / "served", "--evaluation", evaluation)
    line = next(line for line in read_card(tmp_path / "served")[1].splitlines() if line.startswith("Measured"))
    assert line == (
        "Measured on 1971-01-01: 2 tokens drafted a pass, by the counters of a running engine, greedy, replies of up "
        "to 128 tokens, 1,234 passes of the target."
    )


def test_a_tree_is_named(tmp_path):
    """As many numbers as it is deep, more tokens."""
    tree = {"tree": "dynamic", "topk": 4, "depth": 2, "num_draft_tokens": 9}
    evaluation = write_evaluation(tmp_path / "evaluation", draft_model_path=None, **tree)
    draft = written_drafts.write(tmp_path / "draft")
    export(draft, "--format", "flat", "--output", tmp_path / "served", "--evaluation", evaluation)
    body = read_card(tmp_path / "served")[1]
    assert ": 9 tokens drafted a pass, as a tree of the 4 best tokens of each node, 2 levels deep, greedy" in body


def test_figures_of_another_draft_are_refused(tmp_path, capsys):
    draft = written_drafts.write(tmp_path / "draft")
    other = written_drafts.write(tmp_path / "other", seed=1)
    evaluation = write_evaluation(tmp_path / "evaluation", draft_model_path=str(other))
    argv = (draft, "--format", "flat", "--output", tmp_path / "served", "--evaluation", evaluation)
    error = tiny.fails(capsys, export, *argv)
    assert f"is of {other}, whose" in error and "differs from this draft's" in error
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("/cache/models--org--a-model/snapshots/abc/", "org/a-model"),
        ("data/chats.jsonl", None),
        ("output/llama/data", None),
        ("tests/helpers", None),  # a folder here
        ("sharegpt", None),
        (None, None),
    ],
)
def test_a_hub_id_is_told_from_a_path(name, expected, monkeypatch):
    monkeypatch.chdir(tiny.REPOSITORY)
    assert model_card.hub_id(name) == expected
