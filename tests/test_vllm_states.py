"""Hidden states from a server that speaks vLLM's protocol and from the files of vLLM's extractor."""

import json
import os
import subprocess
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import train_dflash
from core import dataloader, draft_files, slots, states, target_model, vllm_states
from helpers import real_vllm, tiny, training
from helpers.architectures import FAMILIES, SIZES, write_model
from helpers.vllm_server import HEADS, LAYERS, Model, open_server


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny target, the prepared data, what training with the target in memory gives, and a Model."""
    train = tiny.conversations(7, 1) + tiny.conversations(2, 3)
    folder = training.write_workspace(tmp_path_factory.mktemp("vllm"), train, tiny.conversations(3, 2), **HEADS)
    expected = run(folder, folder / "memory")
    return SimpleNamespace(folder=folder, expected=expected, model=Model(folder / "target"))


@pytest.fixture
def server(work, tmp_path):
    """It has the layers of the default draft; its `model` may be set to another one."""
    (tmp_path / "shared").mkdir()
    server = open_server(work.model, work.folder / "target", tmp_path / "shared")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    server.server_close()


FLAGS = ("--batch_size", 1, "--draft_global_batch_size", 4, "--num_epochs", 2, "--num_workers", 1,
         "--learning_rate", 1e-3)  # fmt: skip


def arguments(folder, output, *flags):
    return training.arguments(folder, output, *FLAGS, *flags)


def run(folder, output, *flags):
    return training.run(folder, output, *FLAGS, *flags)


def same(rows, expected):
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in row:
            if name.startswith(("loss", "acc", "chain")):
                assert row[name] == pytest.approx(other[name], rel=1e-6), (row["step"], name)


def refused(capsys, work, output, *flags):
    return training.refused(capsys, run, work.folder, output, *flags)


# --- training ---


@pytest.mark.parametrize("kept", [False, True])
def test_training_through_a_server_equals_the_target_in_memory(work, server, tmp_path, monkeypatch, kept):
    monkeypatch.setattr(target_model, "load", lambda *_, **__: pytest.fail("the target was loaded"))
    server.delay = 0.01
    store = ("--on_generate", "cache", "--hidden_states_dtype", "float32", "--hidden_states_path", tmp_path / "store")
    rows = run(work.folder, tmp_path / "out", "--vllm_endpoint", server.url, *(store if kept else ()))
    same(rows, work.expected)
    assert len(server.requests) == 12 * (1 if kept else 2), "each row once, or once an epoch"
    assert server.most > 1 and server.busy == 0
    assert list(server.folder.iterdir()) == [], "files of the server are left behind"
    if kept:
        same(run(work.folder, tmp_path / "again", "--on_missing", "raise", *store[-2:]), work.expected)
        assert len(server.requests) == 12


FIVE = [1, 2, 4, 5, 7]
BLOCKS = ("--num_layers", 2, "--block_size", 4, "--mask_token_id", 3, "--target_layer_ids", *FIVE)


def run_blocks(folder, output, *flags):
    """A training of a DFlash draft that reads five layers."""
    argv = ["--target_model_path", folder / "target", "--data_path", folder / "data", "--output_dir", output]
    argv = [str(word) for word in (*argv, "--log_steps", 1, *FLAGS, *BLOCKS, *flags)]
    train_dflash.main(train_dflash.parse_args(argv))
    return training.metrics(output)


def test_a_block_draft_trains_from_five_layers_of_a_server(work, server, tmp_path, monkeypatch):
    expected = run_blocks(work.folder, tmp_path / "memory")
    server.model = Model(work.folder / "target", FIVE)
    monkeypatch.setattr(target_model, "load", lambda *_, **__: pytest.fail("the target was loaded"))
    same(run_blocks(work.folder, tmp_path / "out", "--vllm_endpoint", server.url), expected)
    assert len(server.requests) == 12 * 2


def test_requests_of_the_next_step_are_sent_before_this_one_is_given():
    asked, given = [], []
    source = states.Stored.__new__(states.Stored)
    source.vllm = SimpleNamespace(ask=lambda row, ids: asked.append((row, ids)))
    data = SimpleNamespace(name="train", row=lambda row: (row, torch.tensor([row]), None))
    fetched = states.Fetched("train", problems=["missing", ""])
    steps = [[SimpleNamespace(rows=[2 * step, 2 * step + 1], states=fetched)] for step in range(3)]
    for batches in source.ask_ahead(iter(steps), data):
        given.append(batches)
        assert asked == [(f"train/{2 * n}", [2 * n]) for n in range(min(len(given) + 1, 3))]
    assert given == steps


@pytest.mark.parametrize("batch", [2, pytest.param(9, marks=pytest.mark.slow)])
def test_a_row_may_be_under_way_twice(work, server, tmp_path, batch):
    """Nine rows in steps of at most nine: the last of an epoch may come first in the next one."""
    flags = ("--num_epochs", 5, "--eval_interval", 5, "--draft_global_batch_size", batch)
    run(work.folder, tmp_path / "out", "--vllm_endpoint", server.url, *flags)
    assert len(server.requests) == 5 * 9 + 3


@pytest.mark.slow
def test_two_ranks_each_ask_for_their_own_rows(work, server, tmp_path):
    launch = ["torchrun", "--standalone", "--nproc_per_node", "2", tiny.LAUNCH_MANY]
    runs = [
        arguments(work.folder, tmp_path / "out", "--vllm_endpoint", server.url),
        arguments(work.folder, tmp_path / "dies", "--vllm_endpoint", server.url, "--max_retries", 0, "--num_epochs", 9),
    ]
    server.lives = 24 + 30
    result = subprocess.run([*launch, json.dumps(runs)], capture_output=True, text=True, timeout=300, check=False)
    assert "exit [[0, 2], [0, 2]]" in result.stdout, result.stdout[-2000:] + result.stderr[-3000:]
    same([json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()], work.expected)
    counts = Counter(map(tuple, server.requests[:24]))
    assert len(counts) == 12 and set(counts.values()) == {2}, "each row once an epoch, whichever rank asks"
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and server.url in errors[0], errors
    assert draft_files.check_draft(tmp_path / "dies" / "latest") == []


# --- a server that is another, slow, wrong or gone ---


@pytest.mark.parametrize("save_steps", [0, 1])
def test_server_that_dies_leaves_a_checkpoint(work, server, tmp_path, capsys, waits, save_steps):
    """One that has been saved at this step before, too."""
    server.lives = 9 + 3 + 4  # in the second epoch
    error = refused(
        capsys, work, tmp_path / "out", "--vllm_endpoint", server.url, "--max_retries", 2, "--save_steps", save_steps
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["split"] == "train"]
    assert steps and steps[-1] < 6
    same(rows, work.expected[: len(rows)])
    assert server.url in error and "row train/" in error and "3 times" in error
    assert error.endswith(f"the draft is saved in {tmp_path / 'out' / f'step_{steps[-1]:08d}'}")
    assert waits[:1] == [1] and set(waits) == {1, 2} and waits.count(1) >= waits.count(2)
    assert draft_files.check_draft(tmp_path / "out" / "latest") == []
    assert (tmp_path / "out" / "latest").resolve().name == f"step_{steps[-1]:08d}"
    assert json.loads((tmp_path / "out" / "latest" / "trainer_state.json").read_text())["step"] == steps[-1]


def test_answers_that_fail_now_and_then_are_asked_for_again(work, server, tmp_path, waits):
    server.failures = 3
    same(run(work.folder, tmp_path / "out", "--vllm_endpoint", server.url), work.expected)
    assert len(server.requests) == 24 + 3 and sorted(waits)[:1] == [1]


def test_slow_server_is_waited_for_as_long_as_request_timeout(work, server, tmp_path, capsys, waits):
    server.delay = 0.3
    flags = ("--vllm_endpoint", server.url, "--total_steps", 1, "--eval_interval", 9)
    assert run(work.folder, tmp_path / "out", *flags)[0]["loss"] == pytest.approx(work.expected[0]["loss"], rel=1e-6)
    server.delay = 1
    error = refused(capsys, work, tmp_path / "late", *flags, "--request_timeout", 0.2, "--max_retries", 1)
    assert "2 times" in error and "timed out" in error and waits[:1] == [1]


def test_file_that_stays_locked_is_not_waited_for_longer(work, server, tmp_path, capsys, waits):
    gate = threading.Event()
    states, server.model = server.model.states, SimpleNamespace(states=lambda ids: gate.wait() and states(ids))
    flags = ("--vllm_endpoint", server.url, "--request_timeout", 0.5, "--max_retries", 0)
    error = refused(capsys, work, tmp_path / "out", *flags)
    gate.set()
    assert "is still being written" in error and "times" not in error


def test_other_tokens_are_refused_at_once(work, server, tmp_path, capsys, waits):
    server.shift = 1
    error = refused(capsys, work, tmp_path / "out", "--vllm_endpoint", server.url)
    assert server.url in error and "row train/" in error and "of other tokens" in error
    assert draft_files.check_draft(tmp_path / "out" / "step_00000000") == [] and not waits


@pytest.mark.parametrize("name", ["uv", "weights.safetensors"])
def test_files_that_a_server_names_are_not_removed_unless_they_are_its_answer(
    work, server, tmp_path, capsys, waits, monkeypatch, name
):
    """Whatever it names: a file of the user's and its lock stay."""
    mine = tmp_path / name
    save_file({"mine": torch.zeros(3)}, mine)
    lock = tmp_path / f"{name}.lock"
    lock.write_text("mine")
    answer = {"choices": [{}], "kv_transfer_params": {"hidden_states_path": str(mine)}}
    monkeypatch.setattr(vllm_states, "request", lambda *given: answer)
    error = refused(capsys, work, tmp_path / "out", "--vllm_endpoint", server.url, "--max_retries", 1)
    assert "names no file of hidden states" in error or "is damaged" in error
    assert lock.read_text() == "mine" and load_file(mine)["mine"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("pipe", ["row.safetensors", "row.safetensors.lock"])
def test_a_pipe_that_a_server_names_is_not_waited_for(work, server, tmp_path, capsys, waits, monkeypatch, pipe):
    os.mkfifo(tmp_path / pipe)
    answer = {"choices": [{}], "kv_transfer_params": {"hidden_states_path": str(tmp_path / "row.safetensors")}}
    monkeypatch.setattr(vllm_states, "request", lambda *given: answer)
    error = refused(capsys, work, tmp_path / "out", "--vllm_endpoint", server.url)
    assert f"{tmp_path / pipe}, which its answer names, is not a file" in error


def test_server_of_another_model_or_length_is_refused_before_anything_is_trained(work, server, tmp_path, capsys):
    server.name, server.root = "other", "/models/other"
    error = refused(capsys, work, tmp_path / "a", "--vllm_endpoint", server.url)
    assert "serves other, not the target" in error and "--served-model-name" in error
    server.root, server.max_len = str(work.folder / "target"), 20
    assert "--max-model-len" in refused(capsys, work, tmp_path / "b", "--vllm_endpoint", server.url)
    assert not list(tmp_path.glob("*/step_*")) and server.requests == []
    server.max_len = 512
    run(work.folder, tmp_path / "c", "--vllm_endpoint", server.url.removesuffix("/v1"), "--total_steps", 1)


def test_endpoint_where_nobody_listens(work, tmp_path, capsys, waits):
    error = refused(capsys, work, tmp_path / "out", "--vllm_endpoint", "http://127.0.0.1:9", "--max_retries", 2)
    assert "http://127.0.0.1:9 fails for the list of its models, 3 times" in error and waits == [1, 2]


@pytest.mark.parametrize("models", [[], {}, {"data": None}, {"data": ["name"]}, {"data": [{"name": "x"}]}])
def test_list_of_models_of_another_form_is_one_line(work, server, tmp_path, capsys, waits, models):
    server.models = models
    error = refused(capsys, work, tmp_path / "out", "--vllm_endpoint", server.url, "--max_retries", 1)
    assert f"{server.url} fails for the list of its models, 2 times" in error and waits == [1]


@pytest.mark.parametrize("choices", [[], {}, "text"])
def test_answer_of_another_form_is_one_line(work, server, tmp_path, capsys, waits, choices):
    server.choices = choices
    error = refused(capsys, work, tmp_path / "out", "--vllm_endpoint", server.url, "--max_retries", 1)
    assert f"{server.url} fails for row " in error and ", 2 times" in error and 1 in waits


@pytest.mark.parametrize("on_missing", ["skip", "warn", "raise"])
def test_endpoint_is_for_missing_rows_that_are_generated(work, server, tmp_path, capsys, on_missing):
    error = refused(capsys, work, tmp_path / "out", "--vllm_endpoint", server.url, "--on_missing", on_missing)
    assert f"needs on_missing generate, not {on_missing}" in error and server.requests == []


# --- the extractor's files ---


@pytest.fixture
def extracted(work, tmp_path):
    """A folder as speculators writes it."""
    folder = tmp_path / "extracted"
    data, _ = dataloader.open_data(work.folder / "data")
    for split, below in (("train", ""), ("validation", "validation")):
        (folder / below).mkdir(exist_ok=True)
        for number, row in enumerate(data[split]):
            tensors = {
                "hidden_states": work.model.states(row["input_ids"]),
                "token_ids": torch.tensor(row["input_ids"]),
            }
            save_file(tensors, folder / below / f"hs_{number}.safetensors")
    return folder


def test_files_of_the_extractor_equal_the_target_in_memory(work, extracted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(target_model, "load", lambda *_, **__: pytest.fail("the target was loaded"))
    flags = ("--hidden_states_path", extracted)
    same(run(work.folder, tmp_path / "out", *flags, "--on_missing", "raise"), work.expected)
    assert "12 of 12 rows are there" in capsys.readouterr().out
    for path in (extracted / "validation").iterdir():
        path.unlink()
    error = refused(capsys, work, tmp_path / "lacks", *flags, "--on_missing", "raise")
    assert ": 3 of 12 rows are missing, such as validation/0" in error
    assert "only read" in refused(capsys, work, tmp_path / "cache", *flags, "--on_generate", "cache")
    # Without them, an evaluation would be one of nothing, with a loss of 0.
    flags = (*flags, "--on_missing", "skip", "--save_best", "--best_metric", "loss")
    rows = run(work.folder, tmp_path / "left_out", *flags)
    assert {row["split"] for row in rows} == {"train"} and not (tmp_path / "left_out" / "best").is_symlink()
    assert "no validation row has a slot with hidden states" in capsys.readouterr().out


def test_files_of_the_extractor_that_are_damaged_are_generated(work, extracted, tmp_path):
    data, _ = dataloader.open_data(work.folder / "data")
    files = [extracted / f"hs_{number}.safetensors" for number in range(4)]
    files[0].write_bytes(files[0].read_bytes()[:-100])
    tensors = load_file(files[1])
    save_file({**tensors, "token_ids": tensors["token_ids"] + 1}, files[1])
    save_file({**load_file(files[2]), "hidden_states": torch.zeros(3, 4, 64)}, files[2])
    files[3].unlink()
    store = vllm_states.VllmFiles(extracted, data, (4, 64))
    reasons = [store.read(f"train/{number}")[1] for number in range(5)]
    assert reasons == ["damaged", "of other tokens", "of shape (3, 4, 64)", "missing", ""]
    same(run(work.folder, tmp_path / "out", "--hidden_states_path", extracted), work.expected)


def test_rows_of_the_extractor_hold_what_is_read(work, extracted):
    data, _ = dataloader.open_data(work.folder / "data")
    row = data["validation"][1]
    tensors, _ = vllm_states.VllmFiles(extracted, data, (4, 64)).read("validation/1")
    plain, (count, teachers) = work.model.states(row["input_ids"]), slots.tokens_read(torch.tensor(row["loss_mask"]))
    assert torch.equal(tensors["aux_hidden_states"], torch.cat(plain[:count, :3].unbind(1), dim=-1))
    assert torch.equal(tensors["last_hidden_states"], plain[teachers, 3])
    assert tensors["input_ids"].tolist() == row["input_ids"] and tensors["loss_mask"].tolist() == row["loss_mask"]


# --- the head alone ---


@pytest.mark.parametrize("name", FAMILIES)
def test_head_and_norm_alone_are_those_of_the_whole_target(name, tmp_path):
    kind, options, scaling, _ = FAMILIES[name]
    write_model(tmp_path, getattr(transformers, kind)(**{**SIZES, **options}))
    alone, whole = target_model.load_head(tmp_path, "cpu"), target_model.load(tmp_path)
    assert alone.model is None and (alone.head.scale, alone.head.softcap) == scaling
    assert torch.equal(alone.embedding, whole.embedding) and not alone.embedding.requires_grad
    inputs, last = [], torch.arange(3, 9)
    decoder = whole.decoder
    names = ("norm", "final_layernorm", "final_layer_norm")
    norm = next(part for part in (getattr(decoder, name, None) for name in names) if part is not None)
    norm.register_forward_pre_hook(lambda norm, args: inputs.append(args[0][0]))
    with torch.no_grad():
        logits = whole.model(input_ids=last[None], use_cache=False).logits[0]
        states = alone.norm(inputs[0])
    found = whole.hidden_states(last, [len(last)])[1]  # another forward: its attention may round otherwise
    assert torch.equal(alone.norm(inputs[1]), found)
    torch.testing.assert_close(alone.head.logits(states), logits, rtol=1e-5, atol=1e-5)
    assert isinstance(alone.norm, torch.nn.Module) and not list(alone.norm.parameters())[0].requires_grad


# --- a real server ---


def extracting(folder, layers):
    """Flags of a vLLM that writes the states after these layers, and its last ones, into a folder."""
    draft = {"hf_config": {"eagle_aux_hidden_state_layer_ids": [*layers, 8]}}
    speculative = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": draft}
    transfer = {"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer"}
    transfer["kv_connector_extra_config"] = {"shared_storage_path": str(folder)}
    return "--speculative_config", json.dumps(speculative), "--kv_transfer_config", json.dumps(transfer)


@pytest.mark.slow
def test_a_block_draft_trains_from_five_layers_of_vllm(work, tmp_path):
    (tmp_path / "shared").mkdir()
    expected = run_blocks(work.folder, tmp_path / "memory")
    with real_vllm.serve(work.folder / "target", tmp_path, *extracting(tmp_path / "shared", FIVE)) as server:
        same(run_blocks(work.folder, tmp_path / "out", "--vllm_endpoint", server.url), expected)


@pytest.mark.slow
def test_training_through_vllm_equals_the_target_in_memory(work, tmp_path, capsys):
    (tmp_path / "shared").mkdir()
    with real_vllm.serve(work.folder / "target", tmp_path, *extracting(tmp_path / "shared", LAYERS)) as server:
        same(run(work.folder, tmp_path / "out", "--vllm_endpoint", server.url), work.expected)
        assert list((tmp_path / "shared").iterdir()) == []
        stop = threading.Timer(10, server.terminate)
        stop.start()
        long = ("--max_retries", 1, "--num_epochs", 5000, "--eval_interval", 5000, "--save_interval", 5000)
        error = refused(capsys, work, tmp_path / "dies", "--vllm_endpoint", server.url, *long)
        assert server.url in error and draft_files.check_draft(tmp_path / "dies" / "latest") == []
