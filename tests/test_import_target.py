"""Targets in other forms become one folder: GGUF files, adapters, templates with names; each line that refuses one."""

import json
import shutil
import socket

import gguf
import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import import_target
import prepare_data
from core import dataloader, target_files, target_model
from helpers import tiny, training
from helpers.training import refused

HEADS = {"attn_q": 4, "attn_k": 2}  # of the tiny Llama, whose rows llama.cpp keeps in another order


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.write_target(tmp_path_factory.mktemp("import") / "target")


def imported(given, output, *flags):
    argv = ["--target_model_path", given, "--output_path", output, *flags]
    import_target.main(import_target.parse_args([str(word) for word in argv]))
    return output


def not_imported(capsys, given, output, *flags):
    """The line that an import ends with; nothing of it is left."""
    line = refused(capsys, imported, given, output, *flags)
    assert not output.exists() and not list(output.parent.glob(f".{output.name}*"))
    return line


def without(monkeypatch, package):
    """The package is not found, as where it is not installed."""
    find = import_target.importlib.util.find_spec
    monkeypatch.setattr(import_target.importlib.util, "find_spec", lambda name: None if name == package else find(name))


# ==================== GGUF ===========================================================================================

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(folder, path, kind=gguf.GGMLQuantizationType.F32):
    """A tiny Llama and its tokenizer as llama.cpp's converter writes them, matrices in the given type of blocks."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    add_tokenizer(writer, AutoTokenizer.from_pretrained(folder), config)
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer, _, part = name.removesuffix(".weight").removeprefix("model.layers.").partition(".")
        in_layer = name.startswith("model.layers.")
        short = NAMES[part if in_layer else name.removesuffix(".weight")]
        values = tensor
        if short in HEADS:  # halves of a head's rows, which rotate together, become pairs
            values = tensor.reshape(HEADS[short], 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        values = values.numpy()
        full_name = f"blk.{layer}.{short}.weight" if in_layer else f"{short}.weight"
        if tensor.dim() == 2:
            writer.add_tensor(full_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(full_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer, tokenizer, config):
    """A tokenizer of byte pairs in a GGUF file's header."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.added_tokens_decoder)
    kinds = [gguf.TokenType.CONTROL if at in special else gguf.TokenType.NORMAL for at in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template(tokenizer.chat_template)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_a_gguf_file_becomes_the_same_model_in_bfloat16(kind, llama, tmp_path, capsys):
    """Against the format's own statement of a dequantised matrix, gguf.quants, on the original's rows."""
    kind = gguf.GGMLQuantizationType[kind]
    path = write_gguf(llama, tmp_path / "tiny.gguf", kind)
    folder = imported(path, tmp_path / "out")
    got = load_file(folder / "model.safetensors")
    originals = load_file(llama / "model.safetensors")
    assert got.keys() == originals.keys()
    for name, tensor in originals.items():
        if tensor.dim() == 2:  # blocks lie within a row, so that the order of rows does not matter
            blocks = gguf.quants.quantize(tensor.numpy(), kind)
            tensor = torch.from_numpy(gguf.quants.dequantize(blocks, kind).astype("float32").copy())
        assert torch.equal(got[name], tensor.bfloat16().view(got[name].shape)), name
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    printed = capsys.readouterr().out
    assert "dequantised" in printed and "--base_model_path" in printed


def test_a_draft_is_trained_for_an_imported_gguf_file(llama, tmp_path, capsys):
    """Out of a folder that holds nothing else, with the tokenizer of the original; the same losses as with it."""
    (tmp_path / "given").mkdir()
    write_gguf(llama, tmp_path / "given" / "tiny.gguf")
    imported(tmp_path / "given", tmp_path / "target", "--base_model_path", llama)
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    original.save_pretrained(tmp_path / "plain" / "target")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "plain" / "target")
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(4))
    flags = ("--dataset_train_split", rows, "--chat_template", "auto", "--total_steps", 1)
    runs = [training.run(work, work / "out", *flags, data=False)[0] for work in (tmp_path, tmp_path / "plain")]
    losses = [{name: value for name, value in row.items() if "loss" in name or "acc" in name} for row in runs]
    assert losses[0] == losses[1] and losses[0]["loss"] > 0


def test_gguf_files_that_cannot_be_read(llama, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    for name in ("a.gguf", "b.gguf", "c-00001-of-00002.gguf"):
        (tmp_path / name).write_bytes(b"GGUF broken")
    assert "holds 3 GGUF files: give the path of one" in not_imported(capsys, tmp_path, output)
    assert "a.gguf cannot be read as GGUF" in not_imported(capsys, tmp_path / "a.gguf", output)
    assert "llama-gguf-split --merge" in not_imported(capsys, tmp_path / "c-00001-of-00002.gguf", output)
    assert "none.gguf does not exist" in not_imported(capsys, tmp_path / "none.gguf", output)
    assert "is a GGUF file: make a folder of it" in refused(capsys, target_files.locate, tmp_path / "a.gguf", ["x"])
    without(monkeypatch, "gguf")
    assert "pip install gguf" in not_imported(capsys, tmp_path / "a.gguf", output)


# ==================== Adapters =======================================================================================


def write_adapter(llama, folder, **options):
    """An adapter with random weights for the tiny Llama, as peft saves it."""
    torch.manual_seed(1)
    options = {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
    } | options
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(**options))
    model.save_pretrained(folder)
    return folder


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / 4**0.5)])
def test_an_adapter_is_merged_into_its_base(rslora, scale, llama, tmp_path):
    adapter = write_adapter(llama, tmp_path / "adapter", use_rslora=rslora)
    parts = load_file(adapter / "adapter_model.safetensors")
    got = load_file(imported(adapter, tmp_path / "out") / "model.safetensors")
    changed = 0
    for name, weight in load_file(llama / "model.safetensors").items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in parts:
            changed += 1
            delta = parts[f"{module}.lora_B.weight"].double() @ parts[f"{module}.lora_A.weight"].double()
            assert delta.norm() > 0.1 * weight.norm(), "an adapter that changes nothing shows nothing"
            assert torch.allclose(got.pop(name).double(), weight.double() + scale * delta, atol=1e-5)
        else:
            assert torch.equal(got.pop(name), weight)
    assert changed == 16 and not got
    tokenizers = [target_files.load_tokenizer(folder) for folder in (llama, tmp_path / "out")]
    assert len({target_files.hash_tokenizer(tokenizer) for tokenizer in tokenizers}) == 1


def test_an_adapter_brings_its_tokenizer_and_its_tables(llama, tmp_path):
    """Tokens were added before it was trained: the tables have more rows than the base's."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>", "<|end_call|>"]})
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(len(tokenizer))
    options = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    trained = peft.get_peft_model(model, options)
    with torch.no_grad():
        trained.get_input_embeddings().weight[-1] = 7.0
    adapter = tmp_path / "adapter"
    trained.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    imported(adapter, tmp_path / "out")
    table = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert table.shape == (402, 64) and (table[-1] == 7).all()
    assert target_files.load_tokenizer(tmp_path / "out").convert_tokens_to_ids("<|end_call|>") == 401
    assert target_model.load(tmp_path / "out").config.vocab_size == 402


def test_adapters_that_cannot_be_merged(llama, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    adapter = write_adapter(llama, tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)

    change_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    assert "names no base model: give it by --base_model_path" in not_imported(capsys, adapter, output)
    base = ("--base_model_path", llama)
    first, *rest = sorted(tensors)
    save_file({name: tensors[name] for name in rest}, weights)
    assert "cannot be merged into its base" in not_imported(capsys, adapter, output, *base)
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, weights)
    assert "cannot be merged into its base" in not_imported(capsys, adapter, output, *base)
    save_file(tensors, weights)
    other = tiny.write_target(tmp_path / "other", hidden_size=32)
    assert "cannot be merged into its base" in not_imported(capsys, adapter, output, "--base_model_path", other)
    quantised = shutil.copytree(llama, tmp_path / "quantised")
    change_json(quantised / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    line = not_imported(capsys, adapter, output, "--base_model_path", quantised)
    assert "is quantised: give the unquantised model by --base_model_path" in line
    shutil.copy(llama / "model.safetensors", adapter)
    assert "both weights and an adapter" in not_imported(capsys, adapter, output)
    (adapter / "model.safetensors").unlink()
    save_file(tensors | {first: tensors[first] * float("nan")}, weights)
    assert "NaNs detected in the merged weights" in not_imported(capsys, adapter, output, *base)
    save_file(tensors, weights)

    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, base_model_name_or_path=str(llama))
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), prompts)
    model.save_pretrained(tmp_path / "prompts")
    assert "peft_type PROMPT_TUNING: it cannot be merged" in not_imported(capsys, tmp_path / "prompts", output)
    without(monkeypatch, "peft")
    assert "pip install peft" in not_imported(capsys, adapter, output, *base)
    output.mkdir()
    (output / "notes.txt").touch()
    assert "is not empty" in refused(capsys, imported, adapter, output)


# ==================== Copies =========================================================================================

ROW = {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "How can I help you?"}]}
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}


def with_named_templates(llama, folder):
    """A copy of the target whose tokenizer has a second template, for rows with tools."""
    shutil.copytree(llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = tokenizer.chat_template
    named = plain.replace("{{- bos_token }}", "{{- bos_token }}{{- 'TOOLS ' + tools | tojson }}")
    assert named != plain
    tokenizer.chat_template = {"default": plain, "tool_use": named}
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    return folder


MODEL = ["config.json", "model.safetensors"]
TOKENIZER = ["*token*", "*template*"]


@pytest.mark.parametrize(
    "layout",
    [
        {".": ["*"]},
        {"some/model": ["*"]},
        {"data/model": MODEL, "data/tokenizer": TOKENIZER},
        {"data/model": ["model.safetensors"], "data/config": ["config.json"], "data/tokenizer": TOKENIZER},
        {"model": MODEL, "components/tokenizer": TOKENIZER},
        {"config": ["config.json", *TOKENIZER], "model": ["model.safetensors"]},
    ],
    ids=" ".join,
)
def test_templates_with_names_come_along(layout, llama, tmp_path, monkeypatch):
    """The copy gives the same tokens as the original, for rows with tools too; so do MLflow's links of two folders."""
    monkeypatch.setattr(target_files.constants, "HF_HOME", str(tmp_path / "cache"))
    source = with_named_templates(llama, tmp_path / "source")
    given = tmp_path / "given"
    for folder, patterns in layout.items():
        (given / folder).mkdir(parents=True, exist_ok=True)
        for path in {path for pattern in patterns for path in source.glob(pattern)}:
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, given / folder / path.name)
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{**ROW, "tools": [TOOL]}, ROW])
    tokens = []
    for number, folder in enumerate((source, imported(given, tmp_path / "copy"), target_files.resolve_target(given))):
        if any(folder.glob("tokenizer.json")):
            prepare_data.prepare(rows, tmp_path / f"data{number}", folder, chat_template="auto", num_proc=1)
            data, _ = dataloader.open_data(tmp_path / f"data{number}")
            tokens.append([row["input_ids"] for row in data["train"]])
    assert all(other == tokens[0] for other in tokens[1:])
    assert len(tokens) > 1 and len(tokens[0][0]) > len(tokens[0][1]), "the tools are to be seen"


def test_what_is_left_of_a_merged_adapter_is_not_copied(llama, tmp_path, monkeypatch):
    """Without peft, as there is nothing to merge."""
    without(monkeypatch, "peft")
    merged = shutil.copytree(llama, tmp_path / "merged")
    (merged / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    )
    copy = imported(merged, tmp_path / "out")
    assert {path.name for path in copy.iterdir()} == {path.name for path in llama.iterdir()}
    assert (copy / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()


def test_a_folder_with_other_weights_is_not_copied_over(llama, tmp_path, capsys):
    """transformers would read the older file, which comes first."""
    sharded = tiny.write_target(tmp_path / "sharded", max_shard_size="200KB")
    assert not (sharded / "model.safetensors").exists()
    copy = imported(llama, tmp_path / "copy")
    line = refused(capsys, imported, sharded, copy)
    assert f"{copy} holds another target's model.safetensors: give another folder" in line
    imported(llama, copy)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_files_of_something_else_are_not_copied_over(name, llama, tmp_path, capsys):
    """Those of another target, or of a project of the user's, which have the same names; weights of the same size."""
    copy = tmp_path / "copy"
    copy.mkdir()
    content = bytearray((llama / name).read_bytes())
    content[-300:-200] = bytes(100)
    (copy / name).write_bytes(content)
    line = refused(capsys, imported, llama, copy)
    assert f"{copy} holds another target's {name}: give another folder" in line
    assert (copy / name).read_bytes() == content and len(list(copy.iterdir())) == 1


@pytest.mark.parametrize("kind", ["copy", "conversion"])
def test_two_imports_of_one_folder_do_not_mix(kind, llama, tmp_path, capsys):
    source = llama if kind == "copy" else write_gguf(llama, tmp_path / "model.gguf")
    claim = (tmp_path / "out", ".writer") if kind == "copy" else (tmp_path, ".out.importing")
    with tiny.other_writer(*claim) as other:
        line = refused(capsys, imported, source, tmp_path / "out")
    assert f"another process writes there (host {socket.gethostname()}, pid {other.pid})" in line
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_base_belongs_to_an_adapter(llama, tmp_path, capsys):
    assert "drop it" in not_imported(capsys, llama, tmp_path / "copy", "--base_model_path", llama)
