"""The target: states of concatenated sequences, its head, the teacher, and every layout of its folder."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import import_target
from core import dataloader, slots, states, target_files, target_model
from helpers import tiny
from helpers.architectures import FAMILIES, LAYERS, SIZES, VOCABULARY, write_model
from helpers.training import refused

torch.set_num_threads(1)  # the models are so small that threads only wait for each other
LENGTHS = [1, 3, 40, 1, 9]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return tiny.write_target(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(folder, plain model of transformers, expected (scale, soft cap), packs) of each family."""
    name, options, scaling, packs = FAMILIES[request.param]
    config = getattr(transformers, name)(**{**SIZES, **options})
    folder = write_model(tmp_path_factory.mktemp("family"), config)
    return folder, AutoModelForCausalLM.from_pretrained(folder).eval(), scaling, packs


def close(a, b):
    """Equal to rounding, in relation to the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max()) < 2e-5


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights is an error."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))


# ---------------------------------------------------------------------------- hidden states
def test_states_of_concatenated_sequences_equal_transformers_one_by_one(family):
    folder, model, scaling, packs = family
    sequences = torch.randint(3, VOCABULARY, (sum(LENGTHS),)).split(LENGTHS)
    default, custom = target_model.load(folder), target_model.load(folder, layer_ids=[0, 1, LAYERS])
    assert (default.layer_ids, default.packs) == ([2, LAYERS // 2, LAYERS - 3], packs)
    assert (default.head.scale, default.head.softcap) == scaling
    with torch.no_grad():
        outputs = [model(input_ids=ids[None], output_hidden_states=True, use_cache=False) for ids in sequences]
    for target in (default, custom):
        auxiliary, last = target.hidden_states(torch.cat(sequences), LENGTHS)
        decoder = target.decoder
        norm = next(
            getattr(decoder, name) for name in ("norm", "final_layernorm", "final_layer_norm") if hasattr(decoder, name)
        )
        for output, a, h in zip(outputs, auxiliary.split(LENGTHS), last.split(LENGTHS), strict=True):
            parts = a.split(h.shape[1], dim=-1)
            for index, part in zip(target.layer_ids, parts, strict=True):
                if index == LAYERS:  # transformers' last entry is the one after the norm
                    part = norm(part)
                assert close(part, output.hidden_states[index][0]), index
            assert close(h, output.hidden_states[-1][0])
            assert close(target.head.logits(h), output.logits[0])
        alone = [target.hidden_states(ids, [len(ids)]) for ids in sequences]
        assert close(auxiliary, torch.cat([a for a, _ in alone]))
        assert close(last, torch.cat([h for _, h in alone]))


def test_states_see_nothing_of_the_other_sequences(family):
    target = target_model.load(family[0])
    ids = torch.randint(3, VOCABULARY, (30,))
    before = target.hidden_states(ids, [11, 19])
    ids[:11] = ids[:11].flip(0)
    after = target.hidden_states(ids, [11, 19])
    assert all(close(b[11:], a[11:]) for a, b in zip(before, after, strict=True))
    assert not close(before[1][:11], after[1][:11])
    # The comparison can fail: as one sequence, the same change shows behind it.
    whole = [target.hidden_states(x, [30])[1][11:] for x in (ids, torch.cat([ids[:11].flip(0), ids[11:]]))]
    assert not close(*whole)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9])
def test_states_of_batches_whatever_shares_a_forward(llama_folder, batch_size, monkeypatch):
    target, forwards = target_model.load(llama_folder), []
    forward = target.hidden_states
    monkeypatch.setattr(
        target, "hidden_states", lambda ids, n, *mine: forwards.append(n) or forward(ids, n, *mine), raising=False
    )
    lists = [[5, 1, 30], [8], [2, 3]]
    rows = [torch.randint(400, (n,)) for lengths in lists for n in lengths]
    numbers = [[0, 1, 2], [3], [4, 5]]
    source = states.Online(target, batch_size)
    data = SimpleNamespace(rank=0, row=lambda number: (number, rows[number], torch.ones_like(rows[number])))
    batches = []
    for part, forwards_before in source.fetch(data, [numbers]):
        fields = dataloader.concatenate(part)
        batches.append(dataloader.Batch(**fields, plan=None, normaliser=0, states=forwards_before))
    found = list(source.states(batches))
    assert len(found) == 3 and max(map(len, forwards)) == min(batch_size, 6)
    for batch, (auxiliary, last) in zip(batches, found, strict=True):
        expected = [forward(ids, [len(ids)]) for ids in batch.input_ids.split(batch.lengths)]
        assert close(auxiliary, torch.cat([e[0] for e in expected]))
        assert close(last, torch.cat([e[1] for e in expected]))


def test_states_can_be_trained_on_and_leave_out_the_head(llama_folder):
    target = target_model.load(llama_folder)
    target.model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head was run on every token"))
    auxiliary, last = target.hidden_states(torch.arange(12), [7, 5])
    assert not auxiliary.is_inference() and not last.is_inference() and not auxiliary.requires_grad
    linear = torch.nn.Linear(auxiliary.shape[1], last.shape[1])
    (linear(auxiliary) * last).sum().backward()
    assert torch.allclose(linear.weight.grad, last.T @ auxiliary, rtol=1e-4, atol=1e-3)
    assert not any(p.requires_grad for p in target.model.parameters()) and not target.captured


def test_positions_restart():
    assert slots.positions_of([3, 1, 2]).tolist() == [0, 1, 2, 0, 0, 1]


# ---------------------------------------------------------------------------- loading
def arrange(layout, source, root):
    """The model of `source` in one of the layouts of a target's folder; returns what the user would give."""
    weights, tokenizer = ["model.safetensors"], ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    config = ["config.json", "generation_config.json"]
    places = {
        "nested": {"some/where": [*config, *weights, *tokenizer]},
        "mlflow data": {"data/model": [*config, *weights], "data/tokenizer": tokenizer},
        "mlflow data, config apart": {"data/model": weights, "data/tokenizer": tokenizer, "data/config": config},
        "mlflow components": {"model": [*config, *weights], "components/tokenizer": tokenizer},
    }[layout]
    root.mkdir()
    if "mlflow" in layout:
        (root / "MLmodel").write_text("flavors: {}\n")
    for folder, names in places.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            if (source / name).exists():
                shutil.copy(source / name, root / folder / name)
    return root


@pytest.mark.parametrize("layout", ["nested", "mlflow data", "mlflow data, config apart", "mlflow components"])
def test_folder_layouts_give_the_same_target(layout, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    given = arrange(layout, llama_folder, tmp_path / "given")
    model_dir = target_files.resolve_target(given)
    expected, ids = target_model.load(llama_folder), torch.arange(20)
    for got, wanted in zip(
        target_model.load(model_dir).hidden_states(ids, [20]), expected.hidden_states(ids, [20]), strict=True
    ):
        assert torch.equal(got, wanted)
    assert target_files.load_tokenizer(given).get_vocab() == target_files.load_tokenizer(llama_folder).get_vocab()


@pytest.mark.parametrize("layout", ["nested", "mlflow data", "mlflow data, config apart", "mlflow components"])
def test_a_copy_is_one_folder_with_the_same_target(layout, llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    given, copy = arrange(layout, llama_folder, tmp_path / "given"), tmp_path / "copy"
    (given / "optimizer.pt").write_bytes(b"not read")
    import_target.main(import_target.parse_args(["--target_model_path", str(given), "--output_path", str(copy)]))
    assert "copied" in capsys.readouterr().out
    kept = (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    )
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        name: (llama_folder / name).read_bytes() for name in kept if (llama_folder / name).exists()
    }
    assert not any(path.is_symlink() for path in copy.iterdir())
    assert target_files.resolve_target(copy) == copy and target_files.hash_tokenizer(
        target_files.load_tokenizer(copy)
    ) == target_files.hash_tokenizer(target_files.load_tokenizer(given))


def test_a_copy_is_refused_before_the_weights_move(llama_folder, tmp_path, capsys):
    given = arrange("nested", llama_folder, tmp_path / "given")
    (given / "some/where/model.safetensors").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in refused(
        capsys, import_target.copy_target, given, tmp_path / "copy"
    )
    config = json.loads((given / "some/where/config.json").read_text())
    (given / "some/where/config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    (given / "some/where/pytorch_model.bin").touch()
    assert "needs at least 7" in refused(capsys, import_target.copy_target, given, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_what_cannot_be_copied_to_is_one_line_before_anything_is_read(llama_folder, tmp_path, capsys, monkeypatch):
    given = arrange("nested", llama_folder, tmp_path / "given")
    before = {path: path.read_bytes() for path in given.rglob("*") if path.is_file()}
    (tmp_path / "links").mkdir()  # as the hub's cache has them
    for path in (given / "some/where").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    line = refused(capsys, import_target.copy_target, tmp_path / "links", tmp_path / "links")
    assert "holds the target itself" in line and all(path.is_symlink() for path in (tmp_path / "links").iterdir())
    for folder in (given / "some/where", tmp_path / "given/some/../some/where/"):
        assert "holds the target itself: give another folder" in refused(
            capsys, import_target.copy_target, given, folder
        )
    assert before == {path: path.read_bytes() for path in given.rglob("*") if path.is_file()}
    monkeypatch.setattr("core.target_files.resolve_target", lambda *_: pytest.fail("the target is read"))
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "in it"):
        line = refused(capsys, import_target.copy_target, given, folder)
        assert f"output_path {folder} cannot be written: a file is in the way" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_a_copy_of_the_hubs_target_may_have_its_name(llama_folder, tmp_path, monkeypatch):
    """A folder org/name that was made too early would be taken for the target. Links to its files do no harm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("core.common.download", lambda *_: llama_folder)
    import_target.copy_target("org/name", "org/name")
    (tmp_path / "other").mkdir()
    os.link(llama_folder / "model.safetensors", tmp_path / "other" / "model.safetensors")
    import_target.copy_target("org/name", tmp_path / "other")
    for folder in ("org/name", "other"):
        assert (Path(folder) / "model.safetensors").read_bytes() == (llama_folder / "model.safetensors").read_bytes()
        assert not (Path(folder) / "model.safetensors").samefile(llama_folder / "model.safetensors")


def test_a_copy_onto_a_full_disk_is_one_line(llama_folder, tmp_path, capsys):
    with tiny.small_disk(tmp_path / "disk", 64) as (disk, _):
        assert "No space left on device" in refused(capsys, import_target.copy_target, llama_folder, disk / "copy")
        assert not [path for path in disk.rglob("*") if "safetensors" in path.name], "no half of a file"


@pytest.mark.parametrize("tied", [False, True])
def test_single_file_sharded_and_tied_weights(tied, tmp_path):
    config = tiny.llama_config(layers=7, tie_word_embeddings=tied, initializer_range=0.2)
    targets = []
    for name, size in (("single", "5GB"), ("sharded", "100KB")):
        folder = write_model(tmp_path / name, config, max_shard_size=size)
        assert len(list(folder.glob("*.safetensors"))) == 1 if name == "single" else 3
        targets.append(target_model.load(folder))
        embedding = target_files.read_target_tensor(folder, ["absent", "model.embed_tokens.weight"])
        assert torch.equal(embedding, targets[-1].embedding)
    single, sharded = (target.hidden_states(torch.arange(9), [9]) for target in targets)
    assert all(torch.equal(a, b) for a, b in zip(single, sharded, strict=True))
    assert torch.equal(targets[0].head.weight, targets[1].head.weight)
    assert torch.equal(targets[0].head.weight, targets[0].embedding) == tied


def test_read_target_tensor_names_what_is_missing(llama_folder, tmp_path, capsys):
    assert "model.nothing, other" in refused(
        capsys, target_files.read_target_tensor, llama_folder, ["model.nothing", "other"]
    )
    assert "neither model.safetensors nor" in refused(
        capsys, target_files.read_target_tensor, tmp_path, ["model.norm.weight"]
    )


def test_weights_that_are_not_whole_are_refused(llama_folder, tmp_path, capsys):
    folder = shutil.copytree(llama_folder, tmp_path / "target")
    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "do not have model.norm.weight" in refused(capsys, target_model.load, folder)
    save_file(
        tensors | {"model.norm.weight": norm[:3].clone()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    refused(capsys, target_model.load, folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    assert str(folder) in refused(capsys, target_model.load, folder)
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded" in refused(capsys, target_model.load, folder)


def test_bad_targets_are_refused_before_the_weights_load(llama_folder, tmp_path, capsys, no_weights):
    config = json.loads((llama_folder / "config.json").read_text())
    for name, change, words in (
        ("six", {"num_hidden_layers": 6}, "has 6 layers"),
        ("unknown", {"model_type": "never_heard_of"}, "config.json cannot be read"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
        assert words in refused(capsys, target_model.load, tmp_path / name)
    for layers in ([2, 4, 9], [-1, 2, 4], [2, 2, 5]):
        assert str(layers) in refused(capsys, target_model.load, llama_folder, layer_ids=layers)


def test_a_family_with_other_logits_or_other_layers_is_refused(llama_folder, tmp_path, capsys, monkeypatch):
    forward = transformers.LlamaForCausalLM.forward

    def changed(self, *args, **options):
        output = forward(self, *args, **options)
        output.logits = output.logits + 0.01 * output.logits.pow(2)
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", changed)
    assert "this family is not supported" in refused(capsys, target_model.load, llama_folder)
    write_model(tmp_path, transformers.GPT2Config(n_embd=32, n_layer=8, n_head=4, vocab_size=97))
    assert "gpt2" in refused(capsys, target_model.load, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "scale"), [("LlamaConfig", 1.0), ("GraniteConfig", 0.125)])
def test_the_scale_that_fits_best_is_taken(kind, scale, dtype, tmp_path):
    """Llama does not use the scale in its config; logits this small fit every scale within an absolute tolerance."""
    options = {**SIZES, "initializer_range": 5e-4, "logits_scaling": 8.0, "dtype": dtype}
    target = target_model.load(write_model(tmp_path, getattr(transformers, kind)(**options)), dtype=dtype)
    assert (target.head.scale, target.head.softcap, target.head.weight.dtype) == (scale, None, dtype)


# ---------------------------------------------------------------------------- teacher
def full_logits(head, hidden):
    """float64 [N, V], from the definition."""
    logits = hidden.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    logits = logits * head.scale
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"scale": 0.125, "bias": True}])
def test_head_teaches_what_the_full_logits_say(options, dtype):
    torch.manual_seed(0)
    bias = 3 * torch.randn(501) if options.get("bias") else None
    head, hidden = target_model.Head(torch.randn(501, 16), **{**options, "bias": bias}), torch.randn(23, 16)
    full, head.weight = full_logits(head, hidden), head.weight.to(dtype)
    head.bias = None if bias is None else bias.to(dtype)
    for draft_ids in (torch.randperm(501)[:60].sort().values, torch.arange(501)):
        p, mass, argmax = head.teacher(hidden, draft_ids)
        assert p.dtype == mass.dtype == dtype and argmax.dtype == torch.int64
        assert torch.allclose(p.double(), full[:, draft_ids].softmax(-1), atol=1e-6)
        assert torch.allclose(mass.double(), full.softmax(-1)[:, draft_ids].sum(-1), atol=1e-6)
        assert torch.equal(argmax, full.argmax(-1))
    assert head.teacher(hidden.to(torch.bfloat16), draft_ids)[0].dtype == dtype


def test_a_draft_vocabulary_that_the_target_never_says_is_no_division_by_zero():
    head = target_model.Head(torch.tensor([[400.0], [0.0], [1.0]]))
    p, mass, argmax = head.teacher(torch.ones(1, 1), torch.tensor([1, 2]))
    assert (
        torch.allclose(p, torch.tensor([[0.0, 1.0]]).softmax(-1)) and mass.tolist() == [0.0] and argmax.tolist() == [0]
    )


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_head_takes_the_lowest_of_equal_ids(softcap):
    """Equal rows of the head; a soft cap also makes all large logits equal."""
    torch.manual_seed(0)
    weight = torch.randint(-3, 4, (100, 8)).float()  # whole numbers: no rounding
    for ids in ([37, 38], [12, 95], [99], [0, 9, 10]):
        head = target_model.Head(weight.clone(), softcap=softcap)
        head.weight[ids] = torch.full((8,), 4.0)
        argmax = head.teacher(torch.ones(5, 8), torch.arange(3))[2].tolist()
        assert argmax == [int(head.logits(torch.ones(1, 8)).argmax())] * 5
        assert softcap or argmax == [min(ids)] * 5
    saturated = target_model.Head(torch.full((100, 8), 50.0), softcap=0.5)
    saturated.weight[:42] = -50.0
    assert saturated.teacher(torch.ones(2, 8), torch.arange(100))[2].tolist() == [42, 42]


# ---------------------------------------------------------------------------- command line
# ---------------------------------------------------------------------------- where the target is
def lay_out(folder, model, tokenizer, config=None):
    """Empty files of a target in three folders below the given one."""
    for path in (model, tokenizer, config or model):
        (folder / path).mkdir(parents=True, exist_ok=True)
    (folder / model / "model.safetensors").touch()
    (folder / (config or model) / "config.json").write_text('{"model_type": "llama"}')
    (folder / tokenizer / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("model", "tokenizer", "files"),
    [
        (".", ".", {}),
        (".", ".", {"checkpoint/config.json": '{"model_type": "llama"}', "checkpoint/tokenizer.json": ""}),
        ("a/b/nested", "a/b/nested", {"a/config.json": '{"no": "model"}'}),
        ("data/model", "data/tokenizer", {"MLmodel": ""}),
        ("data/model", "data/tokenizer", {"MLmodel": "", "data/config/config.json": '{"model_type": "llama"}'}),
        ("data/model", "data/model", {"data/tokenizer/tokenizer.json": ""}),
        ("model", "components/tokenizer", {"MLmodel": "", "model/checkpoint/config.json": '{"model_type": "llama"}'}),
        ("mlflow_model/data/model", "mlflow_model/data/tokenizer", {"mlflow_model/MLmodel": ""}),
        ("snapshots/abc", "snapshots/abc", {"refs/main": "abc", "snapshots/def/config.json": '{"model_type": "x"}'}),
        ("models--o--n/snapshots/abc", "models--o--n/snapshots/abc", {"models--o--n/refs/main": "abc"}),
    ],
)
def test_target_and_tokenizer_are_found(tmp_path, model, tokenizer, files):
    lay_out(tmp_path, model, tokenizer)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert target_files.resolve_target(tmp_path) == (tmp_path / model).resolve()
    assert target_files.locate(tmp_path, target_files.TOKENIZER_FILES) == (tmp_path / tokenizer).resolve()


def test_config_apart_from_the_weights_is_linked_together(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    lay_out(tmp_path / "ml", "data/model", "data/tokenizer", config="data/config")
    for _ in range(2):
        model = target_files.resolve_target(tmp_path / "ml")
        assert {path.name for path in model.iterdir()} == {"config.json", "model.safetensors"}
        assert (model / "model.safetensors").resolve() == tmp_path / "ml" / "data" / "model" / "model.safetensors"


def test_a_target_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert f"{tmp_path / 'none'}: neither a folder" in refused(capsys, target_files.resolve_target, tmp_path / "none")
    assert "no-one/nothing" in refused(capsys, target_files.resolve_target, "no-one/nothing", weights=False)
    (tmp_path / "file").touch()
    assert "neither a folder" in refused(capsys, target_files.resolve_target, tmp_path / "file")
    assert "0 folders with config.json" in refused(capsys, target_files.resolve_target, tmp_path)
    lay_out(tmp_path, "a", "a")
    lay_out(tmp_path, "b", "b")
    assert "2 folders with config.json in it instead of one: a, b" in refused(
        capsys, target_files.resolve_target, tmp_path
    )
    (tmp_path / "a" / "tokenizer.json").unlink()
    assert "0 folders with tokenizer.json or" in refused(capsys, target_files.load_tokenizer, tmp_path / "a")


def test_the_saved_dtype_is_the_weights_own_where_the_configuration_names_none(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int64), "b": torch.zeros(2).bfloat16()}, tmp_path / "model.safetensors")
    assert target_model.saved_dtype(tmp_path, transformers.LlamaConfig()) == torch.bfloat16
    assert target_model.saved_dtype(tmp_path, transformers.LlamaConfig(dtype="float16")) == torch.float16
