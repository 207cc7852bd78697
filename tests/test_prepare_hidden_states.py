"""Hidden states on disk: what is written against transformers' own, interruptions and damage, training from them."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import prepare_data
import prepare_hidden_states
from core import common, dataloader, hidden_states, states, target_files, target_model
from helpers import statement, tiny, training
from helpers.training import refused, weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": torch.float8_e4m3fn}
LAYERS, WIDTH = [2, 4, 5], 64
SLOW = pytest.mark.slow
RARE = 399  # a token that few rows have
# Runs several command lines in one process per rank, with small shards; prints their exit codes on rank 0.
WRAPPER = f"""
import json, os, sys
sys.path.insert(0, {str(tiny.REPOSITORY)!r})
import torch.distributed as dist
import prepare_hidden_states, train_eagle3
from core import hidden_states
hidden_states.SHARD_BYTES = int(sys.argv[1])
codes = []
for script, argv in json.loads(sys.argv[2]):
    script = {{"write": prepare_hidden_states, "train": train_eagle3}}[script]
    try:
        script.main(script.parse_args(argv))
        codes.append(0)
    except SystemExit as stop:
        codes.append(stop.code)
if dist.get_rank() == 0:
    print("exit", json.dumps(codes), flush=True)
dist.destroy_process_group()
"""


def rows(count, seed=0):
    """Random sequences of one to three replies each; one in six supervises a single token, so nothing of it is read."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        ids, mask = [], []
        for _ in range(1 + number % 3):
            prompt, reply = (int(torch.randint(low, 40, (), generator=generator)) for low in (1, 2))
            ids += torch.randint(30, RARE, (prompt + reply,), generator=generator).tolist()
            mask += [0] * prompt + [1] * reply
        if number % 6 == 5:
            mask = [0] * (len(mask) - 1) + [1]
        if number % 4 == 2:  # a question that nobody answers
            ids, mask = ids + ids[:12], mask + [0] * len(ids[:12])
        if number % 7 == 3:  # at the beginning: all of the row depends on it; or at the end: nothing that is read
            ids[0 if number % 2 else -1] = RARE
            mask[-3:] = [0, 0, 0] if number % 2 == 0 else mask[-3:]
        yield {"input_ids": ids, "loss_mask": mask}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Targets, data, and a store of each dtype written with one row a forward."""
    folder = tmp_path_factory.mktemp("states")
    tiny.write_target(folder / "target")
    tiny.write_jsonl(folder / "train.jsonl", rows(20))
    tiny.write_jsonl(folder / "validation.jsonl", rows(6, seed=1))
    make_data(folder, "data")
    for dtype in DTYPES:
        write(folder, folder / dtype, "--hidden_states_dtype", dtype, "--batch_size", 1)
    return folder


def make_data(folder, name, train="train.jsonl", target="target"):
    prepare_data.prepare(
        folder / train,
        folder / name,
        folder / target,
        validation_dataset=folder / "validation.jsonl",
        num_proc=1,
        max_rejected_ratio=1.0,
    )


def writing(work, output, *flags):
    given = ["--target_model_path", work / "target", "--data_path", work / "data", "--output_path", output, *flags]
    return list(map(str, given))


def write(work, output, *flags):
    """The writer's command line, in this process."""
    prepare_hidden_states.main(prepare_hidden_states.parse_args(writing(work, output, *flags)))
    return output


FLAGS = ("--draft_global_batch_size", 4, "--num_workers", 0, "--num_epochs", 2, "--learning_rate", 1e-3,
         "--batch_size", 1)  # fmt: skip


def arguments(work, output, *flags):
    return training.arguments(work, output, *FLAGS, *flags)


def train(work, output, *flags):
    training.run(work, output, *FLAGS, *flags)
    return outcome(output)


def outcome(output):
    """(rows of metrics.jsonl without times, weights) of a run."""
    return training.timeless(output), weights(Path(output) / "final")


def identical(a, b):
    return a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in (a[1] | b[1]))


def assert_close(a, b, rel):
    assert len(a[0]) == len(b[0])
    for x, y in zip(a[0], b[0], strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=rel)
    for name, tensor in b[1].items():
        assert float((a[1][name].double() - tensor).norm()) <= rel * float(tensor.double().norm()), name


def read_folder(folder):
    """{row: tensors} of all shards; every row must be in one of them only."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        rows = {}
        for name, tensor in load_file(path).items():
            row, name = name.rsplit(".", 1)
            rows.setdefault(row, {})[name] = tensor
        assert not rows.keys() & found.keys(), "a row was written twice"
        found |= rows
    return found


def same(a, b):
    """Whether two folders hold the same bytes for each row."""
    both = [read_folder(folder) for folder in (a, b)]
    a, b = ({row: {k: raw(x) for k, x in part.items()} for row, part in found.items()} for found in both)
    return a == b


def raw(x):
    return x.dtype, x.shape, x.flatten().view(torch.uint8).numpy().tobytes()


def all_rows(data):
    return [f"{split}/{number}" for split in data for number in range(len(data[split]))]


def hidden(path):
    return [name.name for name in Path(path).iterdir() if name.name.startswith(".")]


@pytest.fixture
def no_target(monkeypatch):
    """Loading the target's layers is an error."""
    load = AutoModelForCausalLM.from_pretrained

    def without_layers(*args, config=None, **options):
        assert config is not None and config.num_hidden_layers == 0, "the target was loaded"
        return load(*args, config=config, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", without_layers)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(hidden_states, "SHARD_BYTES", 200_000)


# --- what is written ---


def expected_rows(target, data):
    """{row: (input_ids, loss_mask, auxiliary [n, 3·Ht], last [U, Ht])}: transformers' own states, one row a forward,
    of the tokens that training reads by the slot-by-slot statement."""
    model, found = AutoModelForCausalLM.from_pretrained(target).eval(), {}
    for split in data:
        for number, row in enumerate(data[split]):
            ids, mask = torch.tensor(row["input_ids"]), row["loss_mask"]
            with torch.no_grad():
                output = model(input_ids=ids[None], output_hidden_states=True, use_cache=False)
            states = [x[0] for x in output.hidden_states]
            assert torch.allclose(model.lm_head(states[-1]), output.logits[0], atol=1e-5, equal_nan=True), (
                "not after the final norm"
            )
            live = [(j, i) for j in range(len(mask)) for i in range(7) if statement.supervised(mask, j, i)]
            # A slot sees the keys up to itself; its teacher at step i is the token j + 1 + i.
            count, teachers = 1 + max([j for j, _ in live], default=-1), sorted({j + 1 + i for j, i in live})
            auxiliary = torch.cat([states[index] for index in LAYERS], dim=-1)[:count]
            found[f"{split}/{number}"] = ids, mask, auxiliary, states[-1][teachers]
    return found


def assert_stored(found, expected, dtype):
    """Each row of `found` is `expected` rounded to dtype, and nothing else: no padding, no further token."""
    assert found.keys() == expected.keys()
    for row, (ids, mask, *of_row) in expected.items():
        tensors = dict(found[row])
        assert tensors.pop("input_ids").tolist() == ids.tolist() and tensors.pop("loss_mask").tolist() == list(mask)
        for name, wanted in zip(("aux_hidden_states", "last_hidden_states"), of_row, strict=True):
            got = tensors.pop(name)
            assert got.dtype == DTYPES[dtype] and got.shape == wanted.shape, (row, name)
            if dtype != "fp8":
                assert torch.equal(got, wanted.to(DTYPES[dtype])), (row, name)
                continue
            scale, parts = tensors.pop(f"{name}_scale"), wanted.unflatten(-1, (-1, WIDTH))
            assert scale.dtype == torch.float32 and scale.shape == parts.shape[:2]
            assert torch.allclose(scale, parts.abs().amax(-1) / 448, rtol=1e-6), "a scale per token and layer"
            read = got.float().unflatten(-1, (-1, WIDTH)) * scale[..., None]
            # Three bits of mantissa, rounded: 2^-4; numbers below 2^-6 have steps of 2^-9.
            bound = torch.maximum(parts.abs() * 2**-4, 2**-10 * scale[..., None]) * 1.0001
            assert bool(((read - parts).abs() <= bound).all()), (row, name)
        assert not tensors, tensors.keys()


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_states_are_those_of_transformers(work, dtype):
    data, _ = dataloader.open_data(work / "data")
    expected = expected_rows(work / "target", data)
    assert any(not len(states[2]) for states in expected.values()), "a row of which nothing is read"
    assert any(0 < len(states[2]) < len(states[0]) - 5 for states in expected.values())
    assert_stored(read_folder(work / dtype), expected, dtype)
    assert hidden(work / dtype) == []


@pytest.mark.parametrize(("tied", "size"), [(False, "60KB"), (True, "5GB")])
def test_several_files_and_tied_targets(work, tmp_path, tied, size):
    tiny.write_target(tmp_path / "target", max_shard_size=size, tie_word_embeddings=tied, seed=3)
    assert tied or len(list((tmp_path / "target").glob("*.safetensors"))) > 2
    shutil.copytree(work / "data", tmp_path / "data")
    write(tmp_path, tmp_path / "out", "--hidden_states_dtype", "float32", "--batch_size", 1)
    assert_stored(
        read_folder(tmp_path / "out"),
        expected_rows(tmp_path / "target", dataloader.open_data(work / "data")[0]),
        "float32",
    )


def test_rows_that_share_a_forward_equal_those_alone_to_rounding(work, tmp_path, small_shards):
    write(work, tmp_path / "out", "--hidden_states_dtype", "float32", "--batch_size", 5)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_states_close(tmp_path / "out", work / "float32")


def assert_states_close(folder, other):
    a, b = read_folder(folder), read_folder(other)
    assert a.keys() == b.keys()
    for row, tensors in b.items():
        assert a[row].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert a[row][name].shape == tensor.shape
            gap = float((a[row][name].double() - tensor.double()).norm())
            assert gap <= 1e-5 * float(tensor.double().norm()), (row, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_that_is_printed_before_is_what_is_written(work, tmp_path, capsys, dtype):
    write(work, tmp_path / "out", "--hidden_states_dtype", dtype)
    printed = capsys.readouterr().out
    count, all_of, gigabytes, a_token = re.search(
        r"([\d,]+) of ([\d,]+) rows to write: (\S+) GB, ([\d,]+) bytes a", printed
    ).groups()
    data, _ = dataloader.open_data(work / "data")
    tokens = sum(sum(data[split]["length"]) for split in data)
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert int(count) == int(all_of) == 26
    assert int(a_token.replace(",", "")) * tokens == pytest.approx(written, rel=0.02)
    assert float(gigabytes) == pytest.approx(written / 1e9, abs=6e-4)
    share = float(re.search(r"\((\d+)% of four layers", printed)[1]) / 100
    assert share == pytest.approx(written / (4 * WIDTH * 2 * tokens), abs=0.02)


def test_states_that_are_not_finite_are_reported_and_not_written(work, tmp_path, capsys, monkeypatch):
    """One embedding is nan, for a sum that overflows: rows that read it are left out; those that only shared their
    forward come with the next start."""
    monkeypatch.setattr(target_model, "check_finite", lambda *_: None)
    folder = shutil.copytree(work / "target", tmp_path / "target")
    shutil.copytree(work / "data", tmp_path / "data")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][RARE] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    data, _ = dataloader.open_data(work / "data")
    expected = {}
    for row, (ids, mask, aux, last) in expected_rows(folder, data).items():
        if aux.isfinite().all() and last.isfinite().all():
            expected[row] = ids, mask, aux, last
    assert any(RARE in ids for ids, *_ in expected.values()), "a row whose end alone is nan is good"
    out = tmp_path / "out"
    for size in (4, 1):
        capsys.readouterr()
        write(tmp_path, out, "--hidden_states_dtype", "float32", "--batch_size", size)
        streams, there = capsys.readouterr(), read_folder(out)
        reported = re.findall(r"row (\S+): hidden states are not finite", streams.err)
        assert sorted([*reported, *there]) == sorted(all_rows(data)), "written or reported, every row once"
        assert f"{len(reported)} rows left out" in streams.out
        assert ("--batch_size 1" in streams.out) == (size == 4)
        assert all(x.float().isfinite().all() for part in there.values() for x in part.values())
    assert there.keys() == expected.keys() and 0 < len(reported) < 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_that_is_not_finite_keeps_a_row_out(tmp_path, capsys, dtype):
    """Wherever among the tokens that are read it is."""
    store, generator = hidden_states.Store(tmp_path, {"layers": LAYERS}, create=dtype), torch.Generator().manual_seed(0)
    ids, mask = torch.arange(40), torch.tensor([0] * 10 + [1] * 30)
    for number, wrong in enumerate([0.0, *[float("nan"), float("inf"), -float("inf")] * 20]):
        states = [torch.randn(40, width * WIDTH, generator=generator) for width in (3, 1)]
        part = states[number % 2].flatten()[15 * WIDTH : 35 * WIDTH]  # tokens that are read of either
        part[int(torch.randint(len(part), (), generator=generator))] = wrong
        tensors = hidden_states.to_stored(ids, mask, *states, DTYPES[dtype])
        assert store.add(f"train/{number}", tensors) == (wrong == 0)
        assert (f"row train/{number}: hidden states are not finite" in capsys.readouterr().err) == (wrong != 0)
    nothing = hidden_states.to_stored(ids, 0 * mask, *states, DTYPES[dtype])
    assert store.add("train/none", nothing) and list(store.new) == ["train/0", "train/none"]


def test_overflow_of_float16_is_not_written(work, tmp_path, capsys):
    folder = shutil.copytree(work / "target", tmp_path / "target")
    shutil.copytree(work / "data", tmp_path / "data")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][RARE] *= 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    data, _ = dataloader.open_data(work / "data")
    bad = [row for row, (*_, aux, last) in expected_rows(folder, data).items()
           if max(x.abs().max() if len(x) else 0 for x in (aux, last)) > 65520]  # fmt: skip
    for dtype, lacking in (("float16", bad), ("fp8", [])):
        write(tmp_path, tmp_path / dtype, "--hidden_states_dtype", dtype)
        assert sorted([*read_folder(tmp_path / dtype), *lacking]) == sorted(all_rows(data))
    assert bad and f"row {bad[0]}: hidden states are not finite in float16" in capsys.readouterr().err
    # The training that generates does not keep them either.
    train(
        tmp_path,
        tmp_path / "run",
        "--num_epochs",
        1,
        "--hidden_states_path",
        tmp_path / "cached",
        "--on_generate",
        "cache",
        "--hidden_states_dtype",
        "float16",
    )
    assert sorted([*read_folder(tmp_path / "cached"), *bad]) == sorted(all_rows(data))


# --- interruptions, a full disk, other targets ---


def test_started_again_it_writes_nothing_and_needs_no_target(work, tmp_path, no_target, capsys):
    out = shutil.copytree(work / "bfloat16", tmp_path / "out")
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = out / f".building-{socket.gethostname()}-{ended.pid}-abc"
    lives = out / f".building-{socket.gethostname()}-{os.getpid()}-def"
    elsewhere = out / ".building-node-b-1-ghi"
    for folder in (left, lives, elsewhere):
        folder.mkdir()
        (folder / "1.safetensors").write_bytes(b"half")
    (out / ".index.json.123.tmp").write_text("{")
    os.utime(out / ".index.json.123.tmp", (0, 0))
    before = {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}
    write(work, out)
    assert "0 of 26 rows to write" in capsys.readouterr().out
    assert {path.name for path in out.glob(".*")} == {lives.name, elsewhere.name}, "their writers may live"
    assert {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")} == before


@pytest.mark.parametrize("links", [True, False])
def test_writers_of_one_folder_never_take_each_others_names(work, tmp_path, monkeypatch, links):
    """As trainings that cache into one store do; also on storage without hard links."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *given: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    out = tmp_path / "store"
    shutil.copytree(work / "bfloat16", out, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps(settings | {"shards": {}}))
    names = ("target", "layers", "tokenizer", "data")
    stores = [hidden_states.Store(out, {name: settings[name] for name in names}) for _ in range(3)]
    monkeypatch.setattr(hidden_states.dist, "get_rank", lambda: 0)
    whole = hidden_states.Store(work / "bfloat16", {name: settings[name] for name in names})
    rows = sorted(whole.rows)[:6]
    for number, row in enumerate(rows):
        store = stores[number % 3]
        store.add(row, whole.read(row)[0])
        store.flush()
    for store in stores:
        store.flush(wait=True)
    assert len(list(out.glob("*.safetensors"))) == 6 and not list(out.glob(".building*"))
    found = hidden_states.Store(out, {name: settings[name] for name in names})
    assert sorted(found.rows) == rows and all(found.read(row)[1] == "" for row in rows)


def test_what_is_there_is_not_written_again(work, tmp_path, small_shards, capsys):
    """Without its index and some of its shards: the rows that are gone come back with the same bytes."""
    whole = write(work, tmp_path / "whole", "--batch_size", 3)
    out = shutil.copytree(whole, tmp_path / "out")
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps(index | {"shards": {}}))
    shards = sorted(out.glob("*.safetensors"))
    kept = {path: path.read_bytes() for path in shards[::2]}
    for path in shards[1::2]:
        path.unlink()
    lacking = set(all_rows(dataloader.open_data(work / "data")[0])) - read_folder(out).keys()
    capsys.readouterr()
    write(work, out, "--batch_size", 3)
    assert f"{len(lacking)} of 26 rows to write" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in kept} == kept and same(out, whole)
    rows = [row for shard in json.loads((out / "index.json").read_text())["shards"].values() for row in shard]
    assert sorted(rows) == sorted(all_rows(dataloader.open_data(work / "data")[0]))


def test_max_disk_and_a_disk_that_is_too_small(work, tmp_path, no_target, monkeypatch, capsys):
    line = refused(capsys, write, work, tmp_path / "out", "--max_disk", "0.0001")
    assert "max_disk has room for 0.000 GB, 0.001 GB are to be written" in line
    usage = shutil.disk_usage(tmp_path)._replace(free=2000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert f"the disk of {tmp_path / 'out'} has room for" in refused(capsys, write, work, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.json"]


def test_full_disk_while_writing(work, tmp_path, monkeypatch, capsys):
    """One line; what was written stays; it goes on once there is room. At every size, down to no room for the index."""
    monkeypatch.setattr(hidden_states, "SHARD_BYTES", 60_000)
    whole = write(work, tmp_path / "whole")
    room = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)  # somebody else fills it meanwhile
    need = sum(-(-path.stat().st_size // 4096) * 4 for path in whole.iterdir())
    with tiny.small_disk(tmp_path / "disk", 200) as (disk, resize):
        before = 0
        for size in (200, 400, need - 4):
            resize(size)
            line = refused(capsys, write, work, disk / "out")
            assert "cannot be written" in line and "make room and start again" in line and str(disk) in line
            assert hidden(disk / "out") == []
            assert len(read_folder(disk / "out")) >= before and (before := len(read_folder(disk / "out"))) > 0
        resize(10 * 1024)
        write(work, disk / "out")
        assert same(disk / "out", whole)
        with contextlib.suppress(OSError), (disk / "fill").open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        assert "cannot be written" in refused(capsys, write, work, disk / "other")
        hidden_states.open_shard.cache_clear()  # they are mapped


def test_no_room_for_the_index(work, tmp_path, monkeypatch, capsys):
    """The rows are all there then: the next start writes the index alone."""
    whole, write_atomic = work / "bfloat16", common.write_atomic

    def full(path, text):
        if "train/0" in text:
            raise OSError(28, "No space left on device")
        write_atomic(path, text)

    monkeypatch.setattr(common, "write_atomic", full)
    line = refused(capsys, write, work, tmp_path / "out", "--batch_size", 1)
    assert "No space left" in line and "make room and start again" in line
    monkeypatch.undo()
    write(work, tmp_path / "out", "--batch_size", 1)
    assert same(tmp_path / "out", whole)
    assert (tmp_path / "out" / "index.json").read_text() == (whole / "index.json").read_text()


@SLOW
def test_full_disk_while_training_caches(work, tmp_path, monkeypatch, capsys):
    """The training goes on as if nothing were kept."""
    monkeypatch.setattr(hidden_states, "SHARD_BYTES", 60_000)
    flags = "--num_epochs", 2, "--hidden_states_dtype", "float32"
    with tiny.small_disk(tmp_path / "disk", 200) as (disk, _):
        lines = train(work, tmp_path / "a", *flags, "--hidden_states_path", disk / "out", "--on_generate", "cache")
        assert capsys.readouterr().err.count("hidden states are not kept from here on") == 1
        assert hidden(disk / "out") == [] and 0 < len(read_folder(disk / "out")) < 26
        hidden_states.open_shard.cache_clear()  # they are mapped
    assert identical(lines, train(work, tmp_path / "b", "--num_epochs", 2))


def test_a_folder_of_anything_else_is_refused_by_name(work, tmp_path, no_target, capsys):
    """Before the target is loaded, by the writer and by the training; the folder stays as it is."""
    out = shutil.copytree(work / "float32", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    tiny.write_target(tmp_path / "target", seed=1)
    tiny.write_jsonl(tmp_path / "other.jsonl", rows(20, seed=7))
    make_data(work, tmp_path / "more", tmp_path / "other.jsonl")
    template = shutil.copytree(work / "target", tmp_path / "template")
    (template / "chat_template.jinja").write_text((template / "chat_template.jinja").read_text() + "{# other #}")
    make_data(work, tmp_path / "templated", target=template)
    of_states = {
        "of another target": ("--target_model_path", tmp_path / "target"),
        "of another layers": ("--target_layer_ids", 1, 4, 5),
        "of another data": ("--data_path", tmp_path / "more"),
        "of another tokenizer": ("--target_model_path", template, "--data_path", tmp_path / "templated"),
    }
    for words, flags in of_states.items():
        line = refused(capsys, write, work, out, "--hidden_states_dtype", "float32", *flags)
        assert f"the hidden states in {out} are {words}" in line
        line = refused(capsys, train, work, tmp_path / "run", "--hidden_states_path", out, *flags)
        assert f"the hidden states in {out} are {words}" in line
    line = refused(capsys, write, work, out, "--hidden_states_dtype", "float32", "--target_model_path", template)
    assert "another tokenizer or chat template" in line
    assert "is written in float32: give --hidden_states_dtype float32" in refused(capsys, write, work, out)
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(capsys, write, work, tmp_path / "file")
    for text in ("[1]", "{", '{"format": 1}'):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / "index.json").write_text(text)
        assert str(tmp_path / "broken") in refused(capsys, write, work, tmp_path / "broken")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# --- damage ---


def open_store(work, folder):
    model, (data, config) = work / "target", dataloader.open_data(work / "data")
    return hidden_states.Store(
        folder, hidden_states.store_settings(model, target_files.default_layer_ids(8), config)
    ), all_rows(data)


def test_any_flipped_byte_and_any_truncation_is_noticed(work, tmp_path, small_shards):
    """A row is read as it was written or not at all; rows of other shards are read, and those of the same shard if the
    damage is in a row's own bytes."""
    whole = write(work, tmp_path / "whole", "--hidden_states_dtype", "fp8", "--batch_size", 1)
    expected, choose = read_folder(whole), random.Random(0)
    shards = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(shards) > 1
    victim = whole / shards[1]
    content, (header,) = victim.read_bytes(), [8 + int.from_bytes(victim.read_bytes()[:8], "little")]
    with safe_open(victim, "pt") as file:
        own = {name.rsplit(".", 1)[0] for name in file.keys()}  # noqa: SIM118 (not a dict)
    flips = [*range(0, 8), *(choose.randrange(8, header) for _ in range(60)),
             *(choose.randrange(header, len(content)) for _ in range(40))]  # fmt: skip
    cuts = [0, 4, 8, header - 1, header, *(choose.randrange(header, len(content)) for _ in range(5)), len(content) - 1]
    for indexed in (True, False):
        folder = shutil.copytree(whole, tmp_path / str(indexed))
        if not indexed:
            index = json.loads((folder / "index.json").read_text())
            (folder / "index.json").write_text(json.dumps(index | {"shards": {}}))
        damages = [(at, bytes([content[at] ^ (1 << choose.randrange(8))]), None) for at in flips]
        damages += [(0, b"", end) for end in cuts] + [(0, b"", "gone")]
        for at, byte, end in damages:
            if end is None:
                (folder / victim.name).write_bytes(content[:at] + byte + content[at + 1 :])
            elif end == "gone":
                (folder / victim.name).unlink()
            else:
                (folder / victim.name).write_bytes(content[:end])
            hidden_states.open_shard.cache_clear()
            store, names = open_store(work, folder)
            lost = []
            for row in names:
                tensors, wrong = store.read(row)
                if tensors is None:
                    lost.append(row)
                    assert wrong in ("missing", "damaged") and row in own, (at, end, row)
                else:
                    assert not wrong and tensors.keys() == expected[row].keys()
                    assert all(raw(tensors[name]) == raw(x) for name, x in expected[row].items())
            if end is None and at >= header:
                assert len(lost) == 1, "one row has that byte"
            elif end is not None:
                assert set(lost) == own


# --- several ranks, and ends at any moment ---


def launch(ranks, runs, folder, shard_bytes=200_000, timeout=400):
    """Run several command lines on ranks that are started once; returns (exit codes on rank 0, stdout, stderr)."""
    (folder / "wrapper.py").write_text(WRAPPER)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    result = subprocess.run(
        [*start, folder / "wrapper.py", str(shard_bytes), json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=tiny.environment(),
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(re.search(r"^exit (.*)", result.stdout, re.MULTILINE)[1]), result.stdout, result.stderr


@pytest.mark.slow
def test_two_ranks_write_and_read_the_same(work, tmp_path):
    """However two ranks share rows and target, every row is written once; they train from it as they do online."""
    states, whole = ("--hidden_states_dtype", "float32"), work / "float32"
    shared = {"none": (), "tp": ("--tp_size", 2), "zero3": ("--target_sharding", "zero3")}
    runs = [["write", writing(work, tmp_path / name, *states, "--batch_size", 1, *flags)]
            for name, flags in shared.items()]  # fmt: skip
    damaged = shutil.copytree(whole, tmp_path / "damaged")
    (shard,) = damaged.glob("*.safetensors")
    with shard.open("r+b") as file:  # the last byte: of one row
        file.seek(-1, 2)
        byte = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([byte[0] ^ 1]))
    offline = ("--hidden_states_path", whole, "--on_missing", "raise")
    hybrid = ("--hidden_states_path", tmp_path / "hybrid", "--on_generate", "cache", *states)
    mended = ("--hidden_states_path", damaged, "--on_generate", "cache", "--target_sharding", "zero3")
    for name, flags in (("online", ()), ("offline", offline), ("cached", hybrid), ("mended", mended)):
        runs.append(["train", arguments(work, tmp_path / name, *flags)])
    codes, printed, _ = launch(2, runs, tmp_path)
    assert codes == [0] * len(runs)
    for name in shared:
        assert_states_close(tmp_path / name, whole)
        ranks = {path.name.split("-")[1] for path in (tmp_path / name).glob("*.safetensors")}
        assert len(ranks) == (1 if name == "tp" else 2), "each copy of the target writes"
    assert same(tmp_path / "none", whole)
    online = outcome(tmp_path / "online")
    assert identical(outcome(tmp_path / "offline"), online)
    assert identical(outcome(tmp_path / "cached"), online)
    assert same(tmp_path / "hybrid", whole)
    assert_close(outcome(tmp_path / "mended"), online, rel=1e-5)
    assert "rows damaged 1 (generated)" in printed
    store, names = open_store(work, damaged)
    assert all(store.read(row)[1] == "" for row in names), "the damaged row is kept, and it is what counts"


@SLOW
def test_killed_ten_times_while_writing(work, tmp_path):
    """kill -9 at random moments, started again each time: in the end the same bytes as if nothing had happened."""
    tiny.write_jsonl(tmp_path / "many.jsonl", rows(400))
    make_data(work, tmp_path / "data", tmp_path / "many.jsonl")
    folder, flags = tmp_path / "states", ("--data_path", tmp_path / "data", "--batch_size", 3)
    (tmp_path / "wrapper.py").write_text(WRAPPER)
    variables = tiny.environment()

    def start(output, count=20_000):
        runs = json.dumps([["write", writing(work, output, *flags)]])
        command = [sys.executable, tmp_path / "wrapper.py", str(count), runs]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=variables
        )

    whole = start(tmp_path / "whole")
    assert "exit [0]" in whole.communicate(timeout=300)[0]
    many, moments, progress = len(list((tmp_path / "whole").glob("*.safetensors"))), random.Random(0), [0]
    assert many > 100
    for number in range(10):
        process, goal = start(folder), (number + 1) * many // 11
        until = time.monotonic() + 240
        while len(list(folder.glob("*.safetensors"))) < goal and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(moments.random() * 0.03)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        progress.append(len(read_folder(folder)))
    assert all(a < b for a, b in zip(progress, progress[1:], strict=False)), progress
    assert progress[-1] < len(read_folder(tmp_path / "whole"))
    last = start(folder)
    assert "exit [0]" in last.communicate(timeout=300)[0]
    assert same(folder, tmp_path / "whole") and hidden(folder) == []


# --- training from them ---


@pytest.fixture(scope="module")
def online(work, tmp_path_factory):
    return train(work, tmp_path_factory.mktemp("online") / "run")


def offline(folder, on_missing="raise", *flags):
    return "--hidden_states_path", folder, "--on_missing", on_missing, *flags


def test_offline_in_float32_is_online_bit_by_bit(work, tmp_path, online, no_target):
    """Losses, accuracies, gradient norms, validation and weights; the target's layers are never loaded."""
    assert len([line for line in online[0] if line["split"] == "validation"]) == 2
    found = train(work, tmp_path / "a", *offline(work / "float32"))
    assert found[0] == online[0] and identical(found, online)
    # Whoever reads ahead, and if what is there is complete, on_missing does not matter.
    assert identical(train(work, tmp_path / "b", *offline(work / "float32", "generate"), "--num_workers", 2), online)


@pytest.mark.parametrize("on_missing", ["skip", "warn"])
def test_nothing_to_train_on_is_one_line(work, tmp_path, no_target, capsys, on_missing):
    """A folder without a row, where missing rows are left out."""
    shutil.copytree(work / "float32", tmp_path / "empty")
    for path in (tmp_path / "empty").glob("*.safetensors"):
        path.unlink()
    line = refused(capsys, train, work, tmp_path / "out", *offline(tmp_path / "empty", on_missing))
    assert f"has none of the 26 rows: on_missing {on_missing} would leave out all" in line


@pytest.mark.parametrize(("dtype", "gap"), [("bfloat16", 2e-2), ("fp8", 8e-2)])
def test_other_dtypes_give_the_same_training_to_their_rounding(work, tmp_path, online, no_target, dtype, gap):
    found = train(work, tmp_path / "out", *offline(work / dtype))
    assert_close(found, online, rel=gap)
    assert not identical(found, online)


@SLOW
@pytest.mark.parametrize("batch", [("--draft_micro_batch_size", 2), ("--total_seq_len", 256)])
def test_offline_in_larger_micro_batches(work, tmp_path, no_target, monkeypatch, batch):
    flags = "--num_epochs", 1, *batch
    found = train(work, tmp_path / "a", *offline(work / "float32"), *flags)
    monkeypatch.undo()
    assert_close(found, train(work, tmp_path / "b", *flags, "--batch_size", 2), rel=1e-5)


def test_hybrid_caches_in_the_first_epoch_and_reads_in_the_second(work, tmp_path, online, small_shards, monkeypatch):
    """float32: all equals online. The second epoch generates nothing, though it is a new one of the same run."""
    counts, run = [], states.Stored.handle_missing

    def asked(source, batches, data):
        counts.append((data.name, bool(states.missing_rows(batches))))
        return run(source, batches, data)

    monkeypatch.setattr(states.Stored, "handle_missing", asked)
    flags = "--on_generate", "cache", "--hidden_states_dtype", "float32"
    assert identical(train(work, tmp_path / "a", *offline(tmp_path / "states", "generate", *flags)), online)
    assert counts == [("train", True)] * 5 + [("validation", True)] * 6 + [("train", False)] * 5 + [
        ("validation", False)] * 6  # fmt: skip
    assert same(tmp_path / "states", work / "float32") and hidden(tmp_path / "states") == []


@pytest.mark.parametrize("validation", [True, pytest.param(False, marks=SLOW)])
def test_a_single_epoch_keeps_every_row(work, tmp_path, validation, no_target, monkeypatch):
    """The rows in memory at the end are written too, also of the last evaluation; bfloat16 as the writer's."""
    monkeypatch.undo()
    data = work / "data"
    if not validation:
        prepare_data.prepare(
            work / "train.jsonl", tmp_path / "data", work / "target", num_proc=1, max_rejected_ratio=1.0
        )
        data = tmp_path / "data"
    train(
        work,
        tmp_path / "out",
        *offline(tmp_path / "states", "generate", "--on_generate", "cache"),
        "--num_epochs",
        1,
        "--data_path",
        data,
    )
    there = read_folder(tmp_path / "states")
    assert there.keys() == set(all_rows(dataloader.open_data(data)[0]))
    if validation:
        assert same(tmp_path / "states", work / "bfloat16")
    # Both epochs of a hybrid run are what an offline epoch is, rounding included.
    still = ("--learning_rate", 0, "--data_path", data)
    several = train(work, tmp_path / "hybrid", *offline(tmp_path / "new", "generate", "--on_generate", "cache"), *still)
    again = train(work, tmp_path / "again", *offline(tmp_path / "states"), *still)
    exact = train(work, tmp_path / "exact", *still)
    assert several[0] == again[0] != exact[0]


@SLOW
def test_generated_and_deleted_leaves_nothing(work, tmp_path, online):
    flags = "--on_generate", "delete", "--hidden_states_dtype", "float32"
    assert identical(train(work, tmp_path / "a", *offline(tmp_path / "states", "generate", *flags)), online)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["index.json"]


def without(work, folder, lacking):
    """A copy of the float32 store without some rows."""
    shutil.copytree(work / "float32", folder)
    (shard,) = folder.glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        crc = json.loads(file.metadata()["rows"])
    tensors = {name: x for name, x in load_file(shard).items() if name.rsplit(".", 1)[0] not in lacking}
    save_file(tensors, shard, {"rows": json.dumps({row: x for row, x in crc.items() if row not in lacking})})
    index = json.loads((folder / "index.json").read_text())
    for row in lacking:
        del index["shards"][shard.name][row]
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("there", ["nothing", "a file", "an empty folder"])
def test_a_folder_without_hidden_states(there, work, tmp_path, capsys):
    folder = tmp_path / "states"
    if there == "a file":
        folder.touch()
    if there == "an empty folder":
        folder.mkdir()
    line = refused(capsys, train, work, tmp_path / "out", *offline(folder))
    assert line.startswith(f"{folder} has no hidden states") and "Errno" not in line
    assert "give the folder that prepare_hidden_states.py has written" in line


def test_what_is_missing_is_left_out_generated_or_an_error(work, tmp_path, online, capsys):
    lacking = ["train/2", "train/17", "validation/1"]
    folder, flags = without(work, tmp_path / "states", lacking), ("--draft_global_batch_size", 20, "--num_epochs", 3)
    line = refused(capsys, train, work, tmp_path / "raise", *offline(folder))
    assert f"{folder}: 3 of 26 rows are missing, such as train/2: write them with prepare_hidden_states.py" in line
    skipped = train(work, tmp_path / "skip", *offline(folder, "skip"), *flags)
    streams = capsys.readouterr()
    assert "is missing" not in streams.err and streams.out.count("validation rows missing 1 (left out)") == 3
    assert sum(map(int, re.findall(r"train rows missing (\d+)", streams.out))) == 6
    warned = train(work, tmp_path / "warn", *offline(folder, "warn"), *flags)
    assert identical(skipped, warned)
    err = capsys.readouterr().err
    assert all(err.count(f"row {row} of {folder} is missing: left out") == 3 for row in lacking)
    # One step an epoch on all rows: the same as with data that never had these rows, but for the order of sums.
    for name, gone in (("train", {2, 17}), ("validation", {1})):
        lines = (work / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(x for i, x in enumerate(lines) if i not in gone))
    shutil.copytree(work / "target", tmp_path / "target")
    make_data(tmp_path, "data")
    assert_close(skipped, train(tmp_path, tmp_path / "less", *flags, "--draft_global_batch_size", 18), rel=1e-5)
    assert identical(train(work, tmp_path / "generate", *offline(folder, "generate")), online)
    assert "train rows missing 2 (generated)" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flipped", pytest.param("cut", marks=SLOW), pytest.param("gone", marks=SLOW)])
def test_training_survives_damage(work, tmp_path, online, small_shards, capsys, damage):
    """Each way of dealing with it, named; under generate with cache it is mended, and nothing else is lost."""
    whole = write(work, tmp_path / "whole", "--hidden_states_dtype", "float32", "--batch_size", 1)
    victim = sorted(whole.glob("*.safetensors"))[1]
    with safe_open(victim, "pt") as file:
        own = json.loads(file.metadata()["rows"])
        split, number = next(row for row in own if row.startswith("train/")).split("/")
    content = bytearray(victim.read_bytes())
    if damage == "flipped":
        header = 8 + int.from_bytes(content[:8], "little")
        at = json.loads(content[8:header])[f"train/{number}.input_ids"]["data_offsets"][0]
        content[header + at] ^= 4
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[:-100])
    else:
        victim.unlink()
    wrong = {"flipped": "damaged", "cut": "damaged", "gone": "missing"}[damage]
    hidden_states.open_shard.cache_clear()
    line = refused(capsys, train, work, tmp_path / "raise", *offline(whole))
    if damage == "gone":
        assert f"{whole}: {len(own)} of 26 rows are missing" in line
    else:
        assert str(victim) in line and "is damaged: remove this file, write it with prepare_hidden_states.py" in line
    flags = offline(whole, "skip"), offline(whole, "warn")
    assert identical(*(train(work, tmp_path / mode[3], *mode, "--num_epochs", 1) for mode in flags))
    err = capsys.readouterr().err
    assert re.search(rf"row train/{number} of \S+ is {wrong}: left out", err)
    mended = offline(whole, "generate", "--on_generate", "cache")
    assert identical(train(work, tmp_path / "mend", *mended), online)
    assert re.search(rf"train rows {wrong} \d+.* \(generated\)", capsys.readouterr().out)
    store, names = open_store(work, whole)
    assert all(store.read(row)[1] == "" for row in names)
    assert identical(train(work, tmp_path / "again", *offline(whole)), online)
