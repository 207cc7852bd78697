"""Rows that cannot be used: cases/rejected_rows.jsonl says which files are prepared, and with which line others end.

rows: JSON, text as it stands, or the name of a row of NAMED. rejected, left_out: counts by cause; ends: a part of
the line.
"""

import json
import re

import pytest

import prepare_data
import train_eagle3
from core import dataloader, setup
from helpers import tiny
from helpers.chat_templates import family_tokenizer
from helpers.commands import flags_of

CASES = [json.loads(line) for line in (tiny.REPOSITORY / "tests/cases/rejected_rows.jsonl").read_text().splitlines()]
USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello there"}
CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
NAMED = {
    "good": {"messages": [USER, REPLY]},
    "long": {"messages": [{"role": "user", "content": "hi " * 100}, REPLY]},
    "calls": {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}]},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    family_tokenizer("llama3").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def write(path, rows):
    texts = [NAMED.get(row, row) if isinstance(row, str) else row for row in rows]
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in texts))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_rows_are_counted_by_cause_or_end_the_program(case, target, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    write(path, case["rows"])
    flags = case.get("flags", {})
    listed = tmp_path / "out.rejected.jsonl"
    if "ends" in case:
        with pytest.raises(SystemExit):
            prepare_data.prepare(path, tmp_path / "out", target, num_proc=1, **flags)
        error = capsys.readouterr().err
        assert case["ends"] in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
        known = flags_of(prepare_data).keys() & flags_of(train_eagle3).keys()
        assert set(re.findall(r"--\w+", error)) <= known, "flags of the program that runs"
        if "listed in" in error:
            lines = [json.loads(line)["line"] for line in listed.read_text().splitlines()]
            assert str(listed) in error and lines and lines == sorted(lines)
        return
    listed.write_text("of an earlier start")
    config = prepare_data.prepare(path, tmp_path / "out", target, num_proc=1, **flags)
    parts = config["splits"].values()
    counted = config if "validation_ratio" in flags else config["splits"]["train"]
    assert counted["rejected"] == case.get("rejected", {}) and counted["left_out"] == case.get("left_out", {})
    assert all(not part["rejected"] for part in parts) or "validation_ratio" not in flags
    lost = sum(counted["rejected"].values()) + sum(counted["left_out"].values())
    assert sum(part["rows"] for part in parts) == len(case["rows"]) - lost
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert len(rejected) == lost and not listed.exists()


def test_the_file_of_a_row_is_named_if_there_are_several(target, tmp_path, capsys):
    write(tmp_path / "a.jsonl", ["good", "good"])
    write(tmp_path / "b.jsonl", ["good", "{"])
    with pytest.raises(SystemExit):
        prepare_data.prepare(tmp_path / "*.jsonl", tmp_path / "out", target, num_proc=1)
    assert f"1 not JSON (first: line 2 of {tmp_path}/b.jsonl: " in capsys.readouterr().err


def test_prepared_rows_without_a_slot_end_a_training_at_its_start(target, tmp_path, capsys, monkeypatch):
    """As rows that an earlier version prepared."""
    path = tmp_path / "rows.jsonl"
    write(path, [{"input_ids": [5, 6], "loss_mask": [0, 1]}])
    monkeypatch.setattr(prepare_data.slots, "check_slots", lambda *_: None)
    prepare_data.prepare(path, tmp_path / "out", target, num_proc=1)
    monkeypatch.undo()
    words = ["--target_model_path", str(target), "--data_path", str(tmp_path / "out")]
    data, config = dataloader.open_data(tmp_path / "out")
    with pytest.raises(SystemExit):
        setup.check_data(train_eagle3.parse_args(words), {"vocab_size": 400}, tmp_path / "out", data, config, 1)
    assert f"{tmp_path}/out: nothing to train on" in capsys.readouterr().err


def test_flags_of_conversations_beside_prepared_data_are_refused(tmp_path, capsys):
    for words in (["--max_rejected_ratio", "0.5"], ["--train_split", "b"], ["--response_column", "a"]):
        args = train_eagle3.parse_args(["--target_model_path", "T", "--data_path", str(tmp_path), *words])
        with pytest.raises(SystemExit):
            setup.check_flags(args)
        assert f"{words[0][2:]} is for conversations, data_path is prepared already" in capsys.readouterr().err


def test_the_output_folder_has_a_default(capsys):
    for name, expected in {
        "sharegpt": "data/sharegpt",
        "/some/where/chats.v2.jsonl.gz": "data/chats.v2",
        "org/Chats-1.5": "data/Chats-1.5",
        "a/folder/": "data/folder",
    }.items():
        assert prepare_data.default_output(name) == expected
    with pytest.raises(SystemExit):
        prepare_data.default_output("chats/*.parquet")
    assert "give --output_path" in capsys.readouterr().err
