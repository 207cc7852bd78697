"""The configuration of a draft as it is given: each form, keys that are read, left out or refused, and where it is."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import LlamaConfig

import prepare_data
import train_eagle3
from core import draft_config, draft_files, draft_keys, ranks, setup, states, target_files
from helpers import tiny
from helpers.training import arguments

CASES = Path(__file__).parent / "cases"
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
FORMS = {
    "empty": {},
    "specforge": {
        "architectures": ["LlamaForCausalLMEagle3"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "draft_vocab_size": 150, "eos_token_id": 4, "head_dim": 16, "hidden_act": "silu",
        "initializer_range": 0.02, "intermediate_size": 80, "max_position_embeddings": 128, "max_window_layers": 48,
        "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1e6,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.53.2", "use_cache": True, "use_sliding_window": False, "vocab_size": 400, **SIZES,
    },
    "eagle": {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 0, "eos_token_id": 4, "hidden_act": "silu",
        "initializer_range": 0.02, "intermediate_size": 80, "max_position_embeddings": 2048, "model_type": "llama",
        "pad_token_id": 0, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.28.1", "use_cache": True, "vocab_size": 400, "draft_vocab_size": 150, **SIZES,
    },
}  # fmt: skip
LAYER = LlamaConfig(
    vocab_size=400, intermediate_size=72, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, **SIZES
)
FORMS["decoder"] = LAYER.to_dict() | {
    "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "dtype": "float16",
}  # fmt: skip
FORMS["speculators"] = {
    "architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3", "draft_vocab_size": 150,
    "norm_before_fc": True, "eagle_aux_hidden_state_layer_ids": [2, 5, 8], "target_hidden_size": None,
    "speculators_config": {"algorithm": "eagle3"}, "transformer_layer_config": LAYER.to_dict(),
}  # fmt: skip


def table(name):
    """The rows of a file of tests/cases/, cells by |."""
    lines = (CASES / name).read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines if line and not line.startswith("#")]


def outcome(capsys, call):
    """(what a call returns, "") or (None, the line of its error); and what it prints."""
    capsys.readouterr()
    try:
        value = call()
    except SystemExit as stop:
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert stop.code == 2 and len(lines) == 1 and "[Errno" not in lines[0], printed.err
        return None, lines[0], printed.out
    return value, "", capsys.readouterr().out


@pytest.mark.parametrize(("form", "keys", "says", "config"), table("draft_configs.txt"))
def test_every_configuration_is_trained_as_served_or_refused(work, tmp_path, capsys, form, keys, says, config):
    path = tmp_path / "draft.json"
    path.write_text(json.dumps(FORMS[form] | json.loads(keys)))
    args = train_eagle3.parse_args(arguments(work, tmp_path / "out"))
    target = work / "target"
    configs = target_files.read_target_config(target)

    def configure():
        found = draft_config.configure_draft(args, target, *configs, None, str(path))
        draft_config.check_shape(args, found[0])
        setup.say_notes(found[0], configs[0])
        return found

    found, error, printed = outcome(capsys, configure)
    kind, _, text = says.partition(": ")
    assert bool(error) == (kind == "refused"), error
    assert text in error + printed and (not error or "draft.json" in error or "ttt_length" in error), error + printed
    if error:
        return
    written, _ = found
    for key, value in json.loads(config).items():
        assert written.get(key) == value, (key, written.get(key))
    # Nothing that an engine could read is there beside what is trained.
    assert written.keys() <= draft_config.READ - draft_keys.NEUTRAL.keys()
    assert draft_files.check_config(written) == []


def test_a_speculators_configuration_of_several_qwen3_layers(work, tmp_path, capsys):
    """In which vLLM reads no use_sliding_window, which our own form needs."""
    layer = LAYER.to_dict() | {"model_type": "qwen3", "num_hidden_layers": 2, "intermediate_size": 72}
    layer |= {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FORMS["speculators"] | {"transformer_layer_config": layer}))
    args = train_eagle3.parse_args(arguments(work, tmp_path / "out", "--draft_model_config", str(path)))
    target = work / "target"
    configs = target_files.read_target_config(target)
    where = (target, *configs, None, str(path))
    (config, _), error, _ = outcome(capsys, lambda: draft_config.configure_draft(args, *where))
    assert not error and draft_files.check_config(config) == []
    assert (config["num_hidden_layers"], config["model_type"]) == (2, "qwen3")
    assert draft_files.windows(config) == [0, 16] and config["use_sliding_window"] is True


# --- flags ---


@pytest.mark.parametrize(("given", "flags", "says", "config"), table("draft_flags.txt"))
def test_flags_shape_a_draft_as_keys_do(work, tmp_path, capsys, given, flags, says, config):
    """`given`: keys of --draft_model_config, or "weights": of a checkpoint with these keys, whose weights are read."""
    argv = flags.split()
    args = train_eagle3.parse_args(arguments(work, tmp_path / "out", *argv))
    target = work / "target"
    configs = target_files.read_target_config(target)
    is_checkpoint = given.startswith("weights")
    keys = json.loads(given.removeprefix("weights"))
    path = tmp_path / "draft"
    path.mkdir()
    if is_checkpoint:
        complete = draft_config.configure(*configs, keys, "a draft")[0]
        shapes = draft_files.expected_tensors(complete)
        draft_files.write_draft(path, complete, {name: torch.ones(shape) for name, shape in shapes.items()})
    elif keys:
        (path / "config.json").write_text(json.dumps(keys))

    def configure():
        setup.check_flags(args)
        draft_config.check_flags(args, vars(args))
        where = (str(path), None) if is_checkpoint else (None, str(path) if keys else None)
        found = draft_config.configure_draft(args, target, *configs, *where)
        draft_config.check_shape(args, found[0])
        setup.say_notes(found[0], configs[0])
        return found

    found, error, printed = outcome(capsys, configure)
    kind, _, text = says.partition(": ")
    assert bool(error) == (kind == "refused"), error
    assert text in error + printed and draft_config.REMEDY not in error  # which is about keys without a flag
    if not error:
        assert draft_files.check_config(found[0]) == []
        assert {key: found[0].get(key) for key in json.loads(config)} == json.loads(config)


def test_a_target_whose_layers_all_have_a_window_hands_it_to_its_draft(capsys):
    """In vLLM, to a draft's layer without one of its own."""
    for keys, window, says in (
        ({"sliding_window": 64}, 0, True),
        ({"sliding_window": 64}, 64, False),
        ({"sliding_window": 64, "layer_types": ["sliding_attention"] * 8}, 0, True),
        ({"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"] * 4}, 0, False),
        ({}, 0, False),
    ):
        text = LlamaConfig(vocab_size=400, **{**SIZES, "num_hidden_layers": 8}, **keys)
        config, _ = draft_config.configure(text, text, draft_files.window_keys(window, [True]) if window else {})
        capsys.readouterr()
        setup.say_notes(config, text)
        assert ("train it with --sliding_window 64" in capsys.readouterr().out) == says, (keys, window)


# --- where it is ---


def write_hub(cache, name, files):
    """An entry of the hub's cache with files {name: bytes}."""
    entry = cache / f"models--{name.replace('/', '--')}"
    snapshot = entry / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(snapshot.name)
    for path, content in files.items():
        (snapshot / path).write_bytes(content)


@pytest.fixture(scope="module")
def places(work, tmp_path_factory):
    """The working folder of draft_sources.txt, and in hub/ a cache of the hub."""
    folder = tmp_path_factory.mktemp("places")
    config = json.dumps(FORMS["specforge"])
    (folder / "flat.json").write_text(config)
    (folder / "bom.json").write_text(config, encoding="utf-8-sig")
    for name, text in (("fresh", config), ("spec", json.dumps(FORMS["speculators"] | {
            "transformer_layer_config": LAYER.to_dict() | {"intermediate_size": 80}})), ("draft", config)):  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    for name in re.findall("lost/([\\w.-]+)", (CASES / "draft_sources.txt").read_text()):
        (folder / "lost" / name).mkdir(parents=True, exist_ok=True)
        (folder / "lost" / name / "config.json").write_text(config)
        (folder / "lost" / name / name).write_text("")
    (folder / "nothing").mkdir()
    (folder / "broken.json").write_text('{\n  // sizes\n  "hidden_size": 64}')
    (folder / "list.json").write_text("[1]")
    flat = FORMS["specforge"] | {"draft_vocab_size": 400, "torch_dtype": "float32"}
    (folder / "draft" / "config.json").write_text(json.dumps(flat))
    shapes = draft_files.expected_tensors(flat)
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "draft" / "model.safetensors")
    files = {path.name: path.read_bytes() for path in (folder / "draft").iterdir()}
    write_hub(folder / "hub", "org/draft", files)
    write_hub(folder / "hub", "org/config", {"config.json": config.encode()})
    lost = {"config.json": config.encode(), "pytorch_model-00001-of-00002.bin": b""}
    write_hub(folder / "hub", "org/lost", lost)
    return folder


def prepared(argv):
    ranks.start_distributed(20)
    args = train_eagle3.parse_args(argv)
    default = vars(train_eagle3.parse_args(["--target_model_path", args.target_model_path]))
    return setup.prepare(args, default, train_eagle3.prepare_conversations, draft_config)


@pytest.mark.parametrize(("flags", "happens"), table("draft_sources.txt"))
def test_where_a_draft_may_be(work, places, tmp_path, capsys, monkeypatch, flags, happens):
    monkeypatch.chdir(places)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(places / "hub"))
    argv = arguments(work, tmp_path / "out", *flags.split())
    found, error, printed = outcome(capsys, lambda: prepared(argv))
    kind, _, text = happens.partition(": ")
    assert bool(error) == (kind == "refused"), error
    if error:
        assert text in error and not (tmp_path / "out" / "run.json").exists()
        return
    assert found.draft_config["intermediate_size"] == 80
    says = "has a config.json alone: fresh weights" if happens == "fresh" else f"starts from the {happens}"
    assert ("--from-pretrained" in flags) == (says in printed), printed
    start = found.run.resume_from_checkpoint
    assert start == (happens.removeprefix("weights of ") if happens.startswith("weights") else None)


def test_a_draft_of_the_hub_is_trained_on(work, places, tmp_path, monkeypatch):
    """Its weights, all ones, are what a dry run saves."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(places / "hub"))
    out = tmp_path / "out"
    train_eagle3.main(train_eagle3.parse_args(arguments(work, out, "--from-pretrained", "org/draft", "--dry_run")))
    _, tensors = draft_files.read_draft(out / "step_00000000")
    assert len(tensors) > 10 and all((tensor == 1).all() for tensor in tensors.values())


# --- a training that is continued ---


def test_the_configuration_of_a_continued_training_may_be_given_again(work, places, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--total_steps", 1, "--save_steps", 1, "--draft_model_config"]
    train_eagle3.main(train_eagle3.parse_args(arguments(work, out, *flags, places / "flat.json")))
    again = arguments(work, out, "--resume", *flags)
    assert prepared([*again, str(places / "flat.json")]).state["step"] == 1
    other = tmp_path / "other.json"
    other.write_text(json.dumps(FORMS["specforge"] | {"intermediate_size": 128}))
    _, error, _ = outcome(capsys, lambda: prepared([*again, str(other)]))
    assert "other.json is not the draft of" in error and "intermediate_size 128, there 80: drop it" in error


# --- flags that nothing would read ---


@pytest.fixture(scope="module")
def data(work, tmp_path_factory):
    """The prepared folders of unread_flags.txt, as copies without their rows changed."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(work / "data", folder / "beside")
    (folder / "beside" / "hidden_states").mkdir()
    rows = tiny.write_jsonl(folder / "rows.jsonl", tiny.conversations(4))
    prepare_data.prepare(rows, folder / "alone", work / "target", max_length=512, num_proc=1)
    shutil.copy(work / "data" / "token_freq.pt", folder / "T")
    return folder


@pytest.mark.parametrize(("flags", "happens"), table("unread_flags.txt"))
def test_what_nothing_would_read_is_refused_or_said(work, data, tmp_path, capsys, monkeypatch, flags, happens):
    monkeypatch.chdir(data)
    argv = arguments(work, "out", *flags.split())
    found, error, printed = outcome(capsys, lambda: (prepared(argv), train_eagle3.parse_args(argv)))
    kind, _, text = happens.partition(": ")
    assert bool(error) == (kind == "refused"), error
    if kind in ("refused", "says"):
        assert text in error + printed, error + printed
    elif kind == "silent":
        assert text not in printed
    elif kind.startswith("warms up"):
        assert found[0].run.scheduler_warmup_steps == int(kind.split()[-1])
    else:
        assert str(states.choose_folder(found[1])) == happens.removeprefix("reads ")
