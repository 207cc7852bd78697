"""Command lines of other trainers' documentation run as they are written, on a small target."""

import json
import re
import shlex
import shutil
import threading
from pathlib import Path

import pytest
from transformers import LlamaConfig

import build_vocab_mapping
import prepare_data
import prepare_hidden_states
import train_eagle3
from core import draft_files
from helpers import training
from helpers.vllm_server import HEADS, Model, open_server

TEXT = (Path(__file__).parent / "foreign_commands.txt").read_text()
COMMANDS = re.findall(r"^# (then )?(runs|runs twice|refused: .*)\n((?:[^#\n].*\n?)+)", TEXT, re.MULTILINE)
SEQUENCES = []  # lists of (happens, command): one, and those that follow in its folder
for then, *rest in COMMANDS:
    if not then:
        SEQUENCES.append([])
    SEQUENCES[-1].append(rest)
SCRIPTS = {"train": train_eagle3, "train_eagle3": train_eagle3, "build_vocab_mapping": build_vocab_mapping}
SCRIPTS |= {"prepare_data": prepare_data, "prepare_hidden_states": prepare_hidden_states}
SMALL = {"32000": "150", "128256": "400", "100": "1"}  # vocabularies, steps of the warm-up
TARGETS = ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-70B-Instruct", "Qwen/Qwen3-8B")
SIZES = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1, **HEADS}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with everything that the documented commands have been given or have made before."""
    folder = tmp_path_factory.mktemp("world")
    training.write_workspace(folder / "made", **HEADS)
    made = folder / "made"
    for name in TARGETS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(made / "target")
    for name in ("training_data", "new_training_data", "data/llama-3.1-8b_sharegpt/gen", "cache/dataset/prepared"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(made / "data")
    shutil.copy(made / "train.jsonl", folder / "cache" / "dataset" / "sharegpt_train.jsonl")
    shutil.copy(made / "data" / "token_freq.pt", folder / "token_freq.pt")
    config = LlamaConfig(**SIZES).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (folder / "llama_draft_decoder_config.json").write_text(json.dumps(config))
    flat = SIZES | {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "draft_vocab_size": 150}
    (folder / "configs").mkdir()
    (folder / "configs" / "llama3-8B-eagle3.json").write_text(json.dumps(flat))
    mapping = "--token_freq_path {0}/token_freq.pt --draft_vocab_size 150 --target_vocab_size 400 --output_path {0}/{1}"
    argv = mapping.format(folder, "data/llama-3.1-8b_sharegpt").split()
    build_vocab_mapping.main(build_vocab_mapping.parse_args(argv))
    first = training.arguments(made, folder / "first", "--dry_run", "--draft_vocab_size", 150)
    train_eagle3.main(train_eagle3.parse_args(first))
    (folder / "pretrained_speculator").symlink_to(folder / "first" / "step_00000000")
    return folder


@pytest.fixture(scope="module")
def server(world, tmp_path_factory):
    """A stand-in for vLLM that has the target under its documented name."""
    shared = tmp_path_factory.mktemp("shared")
    server = open_server(Model(world / "made" / "target"), TARGETS[0], shared)
    server.max_len = 1024
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def words_of(command, server):
    """(script, its words) of a command line, with small numbers."""
    command = command.replace("\\\n", " ").replace("localhost:8000", f"127.0.0.1:{server.server_port}")
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return SCRIPTS[Path(words[place]).stem], [SMALL.get(word, word) for word in words[place + 1 :]]


def value_of(words, *names, default=None):
    """The value of the first of these flags that is there."""
    return next((words[words.index(name) + 1] for name in names if name in words), default)


@pytest.mark.parametrize("sequence", SEQUENCES, ids=[commands[0][1].split(" \\")[0] for commands in SEQUENCES])
def test_documented_command_lines_run(sequence, world, server, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for number, (happens, command) in enumerate(sequence):
        check(happens, command, server, capfd)
        for path in tmp_path.glob("checkpoints"):
            path.rename(tmp_path / f"before_{number}")


def check(happens, command, server, capfd):
    """A command does what stands above it, in the working folder."""
    script, words = words_of(command, server)
    if script is train_eagle3:
        words += ["--total_steps", "3"]  # one pass over the data

    def run():
        script.main(script.parse_args(words))

    if happens.startswith("refused: "):
        assert happens.removeprefix("refused: ") in training.refused(capfd, run)
        return
    for _ in range(2 if happens == "runs twice" else 1):
        run()
    if script is build_vocab_mapping:
        assert {path.name for path in Path("vocab_mapping").iterdir()} == {"d2t.npy", "t2d.npy"}
        return
    output = Path(value_of(words, "--save-path", "--output-dir", default="output"))
    draft = output / ("step_00000000" if "--dry-run" in words else "final")
    assert draft_files.check_draft(draft) == []
    if "--dry-run" not in words:
        steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert max(steps) == 3
    assert list(server.folder.iterdir()) == [], "what the server wrote is removed"


def test_the_whole_file_is_run():
    """No command line of the file is missed, and the sequences are there."""
    assert len(COMMANDS) == len(re.findall(r"^(?!#).*\w+\.py", TEXT, re.MULTILINE)) >= 18
    assert sorted(map(len, SEQUENCES))[-3:] == [1, 2, 2] and "runs twice" in [happens for _, happens, _ in COMMANDS]
