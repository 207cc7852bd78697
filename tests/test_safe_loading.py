"""Nothing that is read runs code, unless the user says so: by the sources, and with files that would run some."""

import ast
import io
import json
import os
import pickle
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import build_vocab_mapping
import prepare_data
from core import (
    claims,
    common,
    conversation_files,
    dataloader,
    draft_files,
    hidden_states,
    prompts,
    ranks,
    target_files,
    target_model,
    vocabulary,
)
from helpers import tiny
from helpers.commands import SCRIPTS, flags_of
from helpers.training import refused

# --- by the sources ---

PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUN_CODE = {"eval", "exec", "compile", "__import__"}
UNSAFE = {  # whatever their arguments are; torch's, NumPy's and transformers' are looked at below
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.package.PackageImporter",
    "pandas.read_pickle", "pd.read_pickle", "importlib.import_module", "runpy.run_path", "os.system",
}  # fmt: skip
TRUST = ("trust_remote_code", "args.trust_remote_code", "False")  # a parameter or a flag: the user's decision; or no
SHARDS = "core/checkpoints.py"  # DeepSpeed unpickles its own shards: only there, and only from an output folder


def unsafe_loads(source, name="x.py"):
    """What in a Python source could run code that comes with a file, one line each."""
    found, own_models = [], name.startswith(("benchmarks/", "examples/"))
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{name}:{node.lineno} imports {module}" for module in modules if module.split(".")[0] in PICKLES]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        last = call.rpartition(".")[2]
        if (
            call in UNSAFE | RUN_CODE
            or (call == "torch.load" and given.get("weights_only") != "True")
            or (call in ("np.load", "numpy.load") and given.get("allow_pickle") != "False")
            or (last == "load_checkpoint" and name != SHARDS)
            or given.get("weights_only") == "False"
            or given.get("allow_pickle") == "True"
            or given.get("shell") == "True"
            or (last == "from_pretrained" and given.get("trust_remote_code", "") not in TRUST and not own_models)
            or given.get("trust_remote_code") == "True"
        ):
            found.append(f"{name}:{node.lineno} {ast.unparse(node)[:80]}")
    return found


def test_no_source_loads_what_could_run_code():
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"],
        cwd=tiny.REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    files = [file for file in files if not file.startswith("tests/") and (tiny.REPOSITORY / file).exists()]
    assert {"export_draft.py", "benchmarks/step.py", "examples/make_tiny_target.py"} <= set(files)
    found = [line for file in files for line in unsafe_loads((tiny.REPOSITORY / file).read_text(), file)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "import dill as pickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(file)",
        "eval(text)",
        "pd.read_pickle(path)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "load_dataset(path, trust_remote_code=True)",
        "engine.load_checkpoint(path)",
    ],
)
def test_each_of_these_would_be_found(line):
    assert len(unsafe_loads(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, map_location='cpu', weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "model.eval()",
        "AutoModel.from_pretrained(path, trust_remote_code=args.trust_remote_code)",
        "json.loads(text)",
    ],
)
def test_none_of_these_would_be_found(line):
    assert unsafe_loads(line) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_code_that_comes_with_a_target_is_not_trusted_unless_asked_to(script):
    flags = flags_of(script)
    if "--trust_remote_code" in flags:
        assert flags["--trust_remote_code"].default is False
    else:
        assert script.__name__ in ("build_vocab_mapping", "export_draft", "compare_runs"), (
            "reads a target's model or tokenizer"
        )


# --- with files that would run some ---


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def boom(tmp_path):
    """The folder that appears if a bomb goes off; it must not be there in the end."""
    yield tmp_path / "boom"
    assert not (tmp_path / "boom").exists(), "code of the file ran"


def armed(content, boom):
    """A pickle with a bomb in it in each form that torch.save has had, and pickle's own: [bytes]"""
    forms = []
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        buffer = io.BytesIO()
        torch.save({**content, "x": Bomb(boom)}, buffer, **options)
        forms.append(buffer.getvalue())
    return [*forms, pickle.dumps({**content, "x": Bomb(boom)}, protocol=2), pickle.dumps(Bomb(boom), protocol=0)]


def test_the_bombs_here_do_go_off(tmp_path):
    for number, data in enumerate(armed({1: 2}, tmp_path / "boom")):
        torch.load(io.BytesIO(data), weights_only=False) if number < 2 else pickle.loads(data)
        (tmp_path / "boom").rmdir()  # fails if it is not there
    np.save(tmp_path / "bomb.npy", np.array([Bomb(tmp_path / "boom")], dtype=object), allow_pickle=True)
    np.load(tmp_path / "bomb.npy", allow_pickle=True)
    assert (tmp_path / "boom").exists()


def test_a_drafts_pickle_does_not_run(boom, tmp_path, capfd):
    folder = tmp_path / "draft"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for data in armed({"fc.weight": torch.ones(2, 6)}, boom):
        (folder / "pytorch_model.bin").write_bytes(data)
        assert "cannot be read: it holds more than tensors" in refused(capfd, draft_files.read_draft, folder)
        assert "cannot be read: it holds more than tensors" in draft_files.check_draft(folder)[0]


def test_token_counts_and_mappings_do_not_run(boom, tmp_path, capfd):

    def build(*argv):
        build_vocab_mapping.main(build_vocab_mapping.parse_args([str(word) for word in argv]))

    flags = ("--draft_vocab_size", 2, "--target_vocab_size", 9, "--output_path", tmp_path / "v")
    for data in armed({3: 4}, boom):
        (tmp_path / "counts.pt").write_bytes(data)
        assert "not a plain dict" in refused(capfd, build, "--token_freq_path", tmp_path / "counts.pt", *flags)
    vocabulary.save_mapping(tmp_path, np.arange(2), np.isin(np.arange(9), [0, 2]))
    for name in ("d2t", "t2d"):
        shutil.copy(tmp_path / f"{name}.npy", tmp_path / "kept.npy")
        np.save(tmp_path / f"{name}.npy", np.array([Bomb(boom)], dtype=object), allow_pickle=True)
        assert f"{name}.npy cannot be read" in refused(
            capfd, vocabulary.load_mapping, tmp_path / "d2t.npy", tmp_path / "t2d.npy"
        )
        (tmp_path / f"{name}.npy").write_bytes(pickle.dumps(Bomb(boom)))
        assert f"{name}.npy cannot be read" in refused(
            capfd, vocabulary.load_mapping, tmp_path / "d2t.npy", tmp_path / "t2d.npy"
        )
        shutil.move(tmp_path / "kept.npy", tmp_path / f"{name}.npy")
    vocabulary.load_mapping(tmp_path / "d2t.npy", tmp_path / "t2d.npy", 9)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny.write_target(tmp_path_factory.mktemp("safe") / "target")


def copy_of(target, folder, **config):
    """A copy of a target with further keys in its config.json."""
    shutil.copytree(target, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    return folder


def test_a_targets_pickle_does_not_run(boom, target, tmp_path):
    """The older format, pytorch_model.bin, read by transformers; without a bomb it is read."""
    folder = copy_of(target, tmp_path / "target")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for data in armed(tensors, boom):
        (folder / "pytorch_model.bin").write_bytes(data)
        for load in (target_model.load, target_model.load_head):
            with pytest.raises((SystemExit, pickle.UnpicklingError)):
                load(folder, "cpu")
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(target_model.load(folder, "cpu").embedding, tensors["model.embed_tokens.weight"])


MODULE = """
import os
os.mkdir({boom!r})
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "strange"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_code_of_a_target_runs_only_when_trusted(target, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    boom = tmp_path / "boom"
    classes = {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}
    folder = copy_of(target, tmp_path / "target", model_type="strange", auto_map=classes)
    (folder / "strange.py").write_text(MODULE.format(boom=str(boom)))
    assert "config.json cannot be read" in refused(capfd, target_files.read_target_config, folder)
    assert "config.json cannot be read" in refused(capfd, target_model.load, folder)
    assert not boom.exists()
    assert target_files.read_target_config(folder, trust_remote_code=True)[0].model_type == "strange"
    boom.rmdir()  # it is there now

    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens |= {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "strange.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    assert "cannot load the tokenizer" in refused(capfd, target_files.load_tokenizer, folder)
    assert not boom.exists()


def test_a_chat_template_runs_in_its_sandbox(boom, target, tmp_path, capfd):
    """A template is a program of the target's; it sees messages and nothing else."""
    escape = "{{ cycler.__init__.__globals__.os.mkdir('" + str(boom) + "') }}{{ messages[0]['content'] }}"
    folder = copy_of(target, tmp_path / "target")
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "chat_template": escape}))
    (folder / "chat_template.jinja").write_text(escape)
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(4))
    assert "SecurityError" in refused(capfd, prompts.read_prompts, rows, target_files.load_tokenizer(folder), 1)
    capfd.readouterr()
    with pytest.raises(SystemExit):
        prepare_data.prepare(rows, tmp_path / "data", folder, chat_template="auto")
    assert "SecurityError" in capfd.readouterr().err


def test_the_token_counts_of_prepared_data_do_not_run(boom, target, tmp_path, capfd):
    """A prepared folder may come from elsewhere, too: Arrow, JSON and one pickle, which the vocabulary is read from."""

    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(4))
    prepare_data.prepare(rows, tmp_path / "data", target, chat_template="llama3")
    for data in armed({3: 4}, boom):
        (tmp_path / "data" / "token_freq.pt").write_bytes(data)
        dataloader.open_data(tmp_path / "data")
        assert "not a plain dict" in refused(
            capfd, vocabulary.choose_mapping, 100, 400, tmp_path / "data" / "token_freq.pt"
        )
    suffixes = {path.suffix for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert suffixes <= {".arrow", ".json", ".jsonl", ".pt"}, "another kind of file to look at"


# --- files of another kind ---

DEEP = "[" * 100_000


def write_header(path, **tensor):
    """A safetensors file whose header names one tensor."""
    header = json.dumps({"x": tensor}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": []},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]},
        {"shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "data_offsets": [0, 8]},
    ],
)
def test_a_header_of_another_kind_is_one_line(tensor, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    write_header(path, **tensor)
    assert "is not a safetensors file" in tiny.fails(capsys, target_files.read_header, path)


@pytest.mark.parametrize(
    "text",
    [DEEP, "[]", '{"dtype": "int4", "shards": {}}', '{"dtype": [], "shards": {}}', '{"dtype": "fp8", "shards": []}'],
)
def test_an_index_of_another_kind_is_one_line(text, tmp_path, capsys):
    (tmp_path / "index.json").write_text(text)
    line = tiny.fails(capsys, hidden_states.Store, tmp_path, {})
    assert "is not a folder of hidden states" in line


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer_config.json", "[]"), ("tokenizer_config.json", DEEP), ("special_tokens_map.json", "[]"),
     ("tokenizer_config.json", '{"tokenizer_class": 5}')],
)  # fmt: skip
def test_a_tokenizer_of_another_kind_is_one_line(name, text, tmp_path, capsys):
    tiny.write_target(tmp_path)
    (tmp_path / name).write_text(text)
    try:
        target_files.load_tokenizer(tmp_path)
    except SystemExit:
        assert f"cannot load the tokenizer in {tmp_path}" in capsys.readouterr().err


def test_a_configuration_nested_too_deep_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(DEEP)
    assert draft_files.read_json(tmp_path / "config.json")[1].startswith("config.json is not JSON")
    assert common.read_object(tmp_path / "config.json")[1].startswith("it is not JSON")


def test_an_index_that_leads_out_of_its_folder_is_not_followed(tmp_path):
    draft = tmp_path / "draft"
    draft.mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (draft / "config.json").write_text("{}")
    index = {"weight_map": {"x": "../other.safetensors"}}
    (draft / "model.safetensors.index.json").write_text(json.dumps(index))
    problems = draft_files.load(draft, strict=True).problems
    assert any("leads out of the folder" in problem for problem in problems)
    state = draft / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "../../etc/passwd"}]}))
    assert conversation_files.list_saved(state) == []


def test_a_write_that_fails_leaves_nothing_behind_and_is_one_line(tmp_path, capsys):
    with tiny.small_disk(tmp_path / "disk", 64) as (disk, _):
        with pytest.raises(OSError):
            common.write_atomic(disk / "big.json", b"x" * 2**20)
        assert list(disk.iterdir()) == []
        line = tiny.fails(capsys, ranks.run_watched, lambda path: common.write_atomic(path, b"x" * 2**20), disk / "a")
        assert line == f"error: {disk / 'a'}: No space left on device\n"


def test_a_writer_whose_folder_was_taken_over_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    ends = []
    monkeypatch.setattr(claims, "lost", lambda writer: ends.append(writer) or stopped.set())
    stopped = threading.Event()
    me = {"host": "a", "pid": 1, "started": 2.0, "beat": 0}
    other = {"host": "b", "pid": 3, "started": 4.0, "beat": 7}
    with (tmp_path / ".writer").open("w+b", buffering=0) as file:
        claims.write(file, me)
        threading.Timer(0.1, lambda: claims.write(file, other)).start()
        claims.beat(file, me, stopped)
    assert ends[0] == other
