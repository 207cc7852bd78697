"""A target's files as people have them: what each broken folder ends with, and what tells a target from another."""

import importlib.util
import json
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mistral3Config, Mistral3ForConditionalGeneration

import evaluate_draft
import prepare_data
import prepare_hidden_states
from core import dataloader, setup, target_files, target_model
from helpers import tiny, training
from helpers.training import refused

ROWS = [json.loads(line) for line in Path(__file__).with_name("targets.jsonl").read_text().splitlines()]
CONVERSATIONS = 4


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """{tied: folder of a target}, and rows to prepare for them."""
    folder = tmp_path_factory.mktemp("targets")
    tiny.write_jsonl(folder / "train.jsonl", tiny.conversations(CONVERSATIONS))
    return {tied: tiny.write_target(folder / str(tied), tie_word_embeddings=tied) for tied in (False, True)}


# ==================== Making a folder as a row of targets.jsonl says =================================================


def save(tensors, path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def change_config(folder, changes):
    """Set keys of config.json; null removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def put_beside(tensors, pattern, name, shape):
    """A tensor of ones beside each that matches, in its module, or as many modules above it as name has ../"""
    for key in [key for key in tensors if re.search(pattern, key)]:
        modules = key.split(".")[: -1 - name.count("../")]
        tensors[".".join([*modules, name.replace("../", "").replace("/", ".")])] = torch.ones(shape)


def change_tensors(tensors, verb, pattern, *given):
    """The tensors with those that match changed."""
    changed = {}
    for key, tensor in tensors.items():
        if not re.search(pattern, key):
            changed[key] = tensor
        elif verb == "cast":
            changed[key] = tensor.to(getattr(torch, given[0]))
        elif verb == "scale":
            changed[key] = tensor * given[0]
        elif verb == "rename":
            changed[re.sub(pattern, given[0], key)] = tensor
        elif verb == "rows":
            changed[key] = torch.cat([tensor, tensor])[: given[0]]
        elif verb == "fill":
            changed[key] = tensor.clone()
            changed[key][-1, 0] = float(given[0])
        else:
            assert verb == "drop", verb
    return changed


def write_shards(folder, tensors):
    """Two shards and their index, in the place of the single file."""
    names = sorted(tensors)
    index = {name: f"model-{1 + (at >= len(names) // 2)}.safetensors" for at, name in enumerate(names)}
    for file in set(index.values()):
        save({name: tensors[name] for name in names if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "model.safetensors").unlink()


def make(original, folder, steps):
    """A copy of the original, changed by the steps of a row."""
    shutil.copytree(original, folder)
    single = folder / "model.safetensors"
    tensors = load_file(single)
    for verb, *given in steps:
        if verb == "config":
            change_config(folder, *given)
        elif verb == "file":
            (folder / given[0]).write_text(given[1])
        elif verb == "remove":
            (folder / given[0]).unlink()
        elif verb == "link":
            (folder / given[0]).symlink_to(given[1])
        elif verb == "cut":
            single.write_bytes(single.read_bytes()[: given[1]])
        elif verb == "shards":
            write_shards(folder, tensors)
        elif verb == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
            single.unlink()
        elif verb == "pickle":
            torch.save(AutoModelForCausalLM.from_pretrained(original), folder / "pytorch_model.bin")
            single.unlink()
        elif verb == "beside":
            put_beside(tensors, *given)
            save(tensors, single)
        elif verb == "again":
            tensors[given[0]] = tensors[given[1]].clone()
            save(tensors, single)
        elif verb == "whole":
            save(tensors, single)
        else:
            tensors = change_tensors(tensors, verb, *given)
            save(tensors, single)
    return folder


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_a_target_as_people_have_it(row, originals, tmp_path, capsys, monkeypatch):
    """It ends with its line before conversations are prepared, or, where values are wrong, when it loads; or it is read
    as the original.
    """
    if row.get("package") and importlib.util.find_spec(row["package"]):
        pytest.skip(f"{row['package']} is installed")
    original = originals[row.get("tied", False)]
    make(original, tmp_path / "target", row["make"])
    if "ends" not in row or row.get("late"):
        _, config = target_files.read_target_config(tmp_path / "target")
        target_model.check_weights(tmp_path / "target", config)
    if "ends" not in row:
        got, wanted = (target_model.load(folder) for folder in (tmp_path / "target", original))
        rounded = getattr(torch, row.get("head", "float32"))
        assert torch.equal(got.head.weight, wanted.head.weight.to(rounded).float())
        states = [target.hidden_states(torch.arange(20), [20]) for target in (got, wanted)]
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    elif row.get("late"):
        assert re.search(row["ends"], refused(capsys, target_model.load, tmp_path / "target"))
    else:
        monkeypatch.setattr(target_model, "load", lambda *_, **__: pytest.fail("the target is loaded"))
        rows = original.parent / "train.jsonl"
        flags = ("--dataset_train_split", rows, "--chat_template", "auto")
        line = refused(capsys, training.run, tmp_path, tmp_path / "out", *flags, data=False)
        assert re.search(row["ends"], line), line
        assert not (tmp_path / "out" / "data").exists(), "conversations were prepared"


@pytest.fixture(scope="module")
def sighted(tmp_path_factory):
    """A target whose text part has a configuration of its own, without a tokenizer."""
    text = tiny.llama_config(head_dim=16).to_dict() | {"model_type": "mistral"}
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 16}  # fmt: skip
    torch.manual_seed(0)
    model = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    folder = tmp_path_factory.mktemp("sighted") / "target"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", ["", "text_config"])
def test_fp8_with_a_scale_per_block_is_read_as_its_values(part, originals, sighted, tmp_path):
    """As DeepSeek and Qwen publish it: the target is the one in bfloat16 of the blocks times their scales.

    Mistral declares it in its text part alone.
    """
    original = sighted if part else originals[False]
    published, plain = (shutil.copytree(original, tmp_path / name) for name in ("fp8", "plain"))
    in_fp8 = {}
    values = {}
    block = 32
    for name, tensor in load_file(published / "model.safetensors").items():
        values[name] = tensor.bfloat16()
        in_fp8[name] = values[name]
        if name.endswith("proj.weight") and "vision" not in name:
            parts = tensor.view(tensor.shape[0] // block, block, tensor.shape[1] // block, block)
            scales = parts.abs().amax(dim=(1, 3)) / 448
            stored = (parts / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            in_fp8[name] = stored.view(tensor.shape)
            in_fp8[f"{name}_scale_inv"] = scales
            values[name] = (stored.float() * scales[:, None, :, None]).view(tensor.shape).bfloat16()
    save(in_fp8, published / "model.safetensors")
    save(values, plain / "model.safetensors")
    form = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    form["modules_to_not_convert"] = ["vision_tower", "multi_modal_projector", "lm_head"]
    change_config(plain, {"dtype": "bfloat16"})
    if part:
        text = json.loads((published / "config.json").read_text())[part]
        change_config(published, {"dtype": "bfloat16", part: text | {"quantization_config": form}})
    else:
        change_config(published, {"dtype": "bfloat16", "quantization_config": form})
    config = target_files.read_target_config(published)[1]
    target_model.check_weights(published, config)
    assert target_model.quantisation(config) and not target_model.quantisation(
        target_files.read_target_config(plain)[1]
    )
    got, wanted = (target_model.load(folder) for folder in (published, plain))
    states = [target.hidden_states(torch.arange(20), [20]) for target in (got, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


MODULE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "strange"
class Model(LlamaForCausalLM):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        {init}
    def _init_weights(self, module):
        {initialise}
"""


@pytest.mark.parametrize(
    ("init", "initialise"),
    [
        ("self.rates = [rate.item() for rate in torch.linspace(0, 1, 4)]", "pass"),
        ("self.register_buffer('one', torch.ones(1), persistent=False)", "float(next(module.buffers(), 0))"),
    ],
    ids=["numbers in its making", "numbers of a buffer"],
)
def test_code_of_a_target_that_needs_numbers(init, initialise, originals, tmp_path, capsys, monkeypatch):
    """A target that loads is not refused for what is looked at before."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = shutil.copytree(originals[False], tmp_path / "target")
    name = f"needs_{len(init)}"
    classes = {"AutoConfig": f"{name}.Config", "AutoModelForCausalLM": f"{name}.Model"}
    change_config(folder, {"model_type": "strange", "auto_map": classes, "architectures": ["Model"]})
    (folder / f"{name}.py").write_text(MODULE.format(init=init, initialise=initialise))
    loaded = target_model.load(folder, trust_remote_code=True)
    assert torch.equal(loaded.head.weight, target_model.load(originals[False]).head.weight)
    config = target_files.read_target_config(folder, trust_remote_code=True)[1]
    target_model.check_weights(folder, config, trust_remote_code=True)


# ==================== The fingerprint ================================================================================


def test_any_change_of_a_matrix_gives_another_fingerprint(originals, tmp_path):
    folder = shutil.copytree(originals[False], tmp_path / "target")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    seen = [target_files.hash_target(folder)]
    for name in tensors:
        changed = tensors | {name: tensors[name] + 1e-4 * torch.randn(tensors[name].shape)}
        save(changed, path)
        seen.append(target_files.hash_target(folder))
    save({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)
    seen.append(target_files.hash_target(folder))
    save({name.replace("layers.0.", "layers.00."): tensor for name, tensor in tensors.items()}, path)
    seen.append(target_files.hash_target(folder))
    save(tensors, path)
    change_config(folder, {"rms_norm_eps": 1e-5})
    seen.append(target_files.hash_target(folder))
    assert len(set(seen)) == len(tensors) + 4


def test_the_same_weights_have_the_same_fingerprint_wherever_they_lie(originals, tmp_path):
    wanted = target_files.hash_target(originals[False])
    assert (
        target_files.hash_target(make(originals[False], tmp_path / "copy", [["file", "x.bin", "leftover"]])) == wanted
    )
    assert target_files.hash_target(make(originals[False], tmp_path / "shards", [["shards"]])) == wanted


def test_the_fingerprint_of_the_older_format_sees_every_value(originals, tmp_path):
    folder = make(originals[False], tmp_path / "target", [["bin"]])
    path = folder / "pytorch_model.bin"
    assert zipfile.is_zipfile(path)
    tensors = torch.load(path)
    seen = [target_files.hash_target(folder)]
    tensors["model.layers.4.mlp.up_proj.weight"][50, 31] += 1e-3
    torch.save(tensors, path)
    seen.append(target_files.hash_target(folder))
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    seen.append(target_files.hash_target(folder))
    tensors["model.layers.4.mlp.up_proj.weight"][50, 31] += 1e-3
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    seen.append(target_files.hash_target(folder))
    assert len(set(seen)) == 4


# ==================== Tokens that the target does not have ===========================================================


def test_the_largest_token_is_compared_with_the_targets_table(work, capsys):
    data, config = dataloader.open_data(work / "data")
    for split, part in data.items():
        assert config["splits"][split]["largest_token"] == max(max(row) for row in part["input_ids"]), split
    largest = config["splits"]["train"]["largest_token"]
    dataloader.check_tokens("F", data, config, largest + 1)
    line = refused(capsys, dataloader.check_tokens, "F", data, config, largest)
    assert f"F has token {largest} (train split), the target's embedding table {largest} rows" in line


def test_no_command_looks_up_tokens_that_the_target_does_not_have(originals, tmp_path, capsys, monkeypatch):
    """The tokenizer has 400 tokens and the target 390 rows; what is supervised would fit."""
    monkeypatch.setattr(target_model, "load", lambda *_, **__: pytest.fail("the target is loaded"))
    small = [["rows", "embed_tokens|lm_head", 390], ["config", {"vocab_size": 390}]]
    target = str(make(originals[False], tmp_path / "target", small))
    rows = [{"input_ids": [9, 10, 395, 12, 13, 14], "loss_mask": [0, 0, 0, 1, 1, 1]}] * 6
    file = str(tiny.write_jsonl(tmp_path / "rows.jsonl", rows))
    data = str(tmp_path / "data")
    prepare_data.prepare(file, data, target, chat_template="auto", num_proc=1)
    words = f"{data} has token 395 (train split), the target's embedding table 390 rows"
    for flags in ([], ["--draft_vocab_size", 100]):
        assert words in refused(capsys, training.run, tmp_path, tmp_path / "out", *flags)
    argv = ["--target_model_path", target, "--data_path", data, "--output_path", str(tmp_path / "states")]
    assert words in refused(capsys, prepare_hidden_states.main, prepare_hidden_states.parse_args(argv))
    argv = ["--target_model_path", target, "--draft_model_path", "none", "--prompts"]
    tokenizer = target_files.load_tokenizer(target)
    prompt = tokenizer.decode(range(390, 400))
    largest = max(tokenizer(prompt)["input_ids"])
    assert largest >= 390, "the prompt has to have such a token"
    prompts = str(tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt}]))
    line = refused(capsys, evaluate_draft.main, evaluate_draft.parse_args([*argv, prompts]))
    assert f"{prompts} has token {largest}, the target's embedding table 390 rows" in line


# ==================== States and checkpoints of another target =======================================================


def test_what_an_earlier_version_wrote_is_not_taken_for_another_target(work, tmp_path, capsys):
    """States on disk, and a checkpoint: they have a fingerprint of another kind."""
    target = ["--target_model_path", str(work / "target"), "--data_path", str(work / "data")]
    argv = [*target, "--output_path", str(tmp_path / "states")]
    prepare_hidden_states.main(prepare_hidden_states.parse_args(argv))
    index = tmp_path / "states" / "index.json"
    written = json.loads(index.read_text())
    now = target_files.hash_target(work / "target")
    run = SimpleNamespace(fingerprints={"data": "d", "target": now}, resume_from_checkpoint="out/step_1")
    assert written["target"] == now
    for before, said in (("0123abcd", "was written by an earlier version: "), (now[:-1] + "x", "another target")):
        index.write_text(json.dumps(written | {"target": before}))
        line = refused(capsys, prepare_hidden_states.main, prepare_hidden_states.parse_args(argv))
        assert said in line and str(tmp_path / "states") in line
        data = "d" if said == "another target" else "of an earlier version as well"
        state = {"flags": {"fingerprints": {"data": data, "target": before}}}
        line = refused(capsys, setup.check_resume, {}, run, "data", "target", state)
        assert line.startswith("out/step_1 was ") and said in line
        assert line.endswith("start from its weights without --resume")


def test_states_of_a_target_that_was_changed_in_place_are_refused(work, tmp_path, capsys):
    """An adapter of some layers merged into it: files have the same names and sizes, and end alike."""
    target = shutil.copytree(work / "target", tmp_path / "target")
    argv = ["--target_model_path", target, "--data_path", work / "data", "--output_path", tmp_path / "states"]
    prepare_hidden_states.main(prepare_hidden_states.parse_args([str(word) for word in argv]))
    flags = ("--data_path", work / "data", "--total_steps", 1, "--draft_global_batch_size", 4)
    training.run(tmp_path, tmp_path / "out", *flags, data=False)
    path = target / "model.safetensors"
    size = path.stat().st_size
    tensors = load_file(path)
    for layer in (1, 2, 5, 6):
        change = 0.05 * torch.randn(64, 8) @ torch.randn(8, 64)
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] += change
    save(tensors, path)
    assert path.stat().st_size == size
    states = (*flags, "--hidden_states_path", tmp_path / "states", "--on_missing", "raise")
    line = refused(capsys, training.run, tmp_path, tmp_path / "from_states", *states, data=False)
    assert "are of another target" in line
    resume = (*flags, "--resume")
    assert "trained with another target" in refused(
        capsys, training.run, tmp_path, tmp_path / "out", *resume, data=False
    )
