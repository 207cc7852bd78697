"""Data sets as people have them: the forms of files in cases/conversation_files.txt, folders, patterns, hub ids."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import tarfile
import tracemalloc
import zipfile

import datasets
import pyarrow.parquet
import pytest
import torch

import prepare_data
from core import conversation_files, conversations, dataloader, prompts
from helpers import tiny

FOLDER = tiny.REPOSITORY / "tests" / "cases"

# Text of one to four bytes, separators that only some readers take for ends of lines, braces and quotes inside texts.
ROWS = [
    {
        "id": number,
        "messages": [{"role": "user", "content": f"{number}? {text}"}, {"role": "assistant", "content": text}],
    }
    for number, text in enumerate(['plain "quoted" }]', "é 日本 👩‍👩‍👧 \\ [{", "a\u2028b\u0085c, \t[1, 2]"])
]


# --- how files are made: each step makes bytes, the first of the rows, the others of the bytes before ---


def in_memory(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def table(rows=ROWS):
    return datasets.Dataset.from_list(rows).data.table


def lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def spread_out():
    one, two, three = lines().splitlines()
    return b"\n" + one + b"\n \n" + two + b"\n\r\n\t\n" + three + b"\n\n"


def crlf():
    return lines().replace(b"\n", b"\r\n")


def crcrlf():
    return lines().replace(b"\n", b"\r\r\n")


def bom_in_the_middle():
    return lines().replace(b"\n", b"\n\xef\xbb\xbf", 1)


def array():
    return json.dumps(ROWS, indent=2, ensure_ascii=False).encode()


def array_in_a_line():
    return json.dumps(ROWS).encode()


def empty_array():
    return b"[ ]\n"


def broken_array():
    return b"[" + json.dumps(ROWS[0]).encode() + b", {'id': 1}, " + json.dumps(ROWS[2]).encode() * 3 + b"]"


def object():
    return json.dumps({"version": "1", "data": ROWS}, indent=1).encode()


def object_in_a_line():
    return json.dumps({"data": ROWS}).encode()


def first_alone():
    return json.dumps(ROWS[0], indent=4).encode()


def lists_of_turns():
    return lines([row["messages"] for row in ROWS])


def zip_of(files):
    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)

    return in_memory(write)


def zip_of_objects():
    return zip_of({f"chats/{row['id']}.json": json.dumps(row, indent=4) for row in ROWS})


def zip_of_pictures():
    return zip_of({"photos/1.jpg": b"\xff\xd8\xff"})


def parquet():
    return in_memory(lambda file: pyarrow.parquet.write_table(table(), file))


def arrow_file():
    def write(file):
        with pyarrow.ipc.new_file(file, table().schema) as writer:
            writer.write_table(table(), max_chunksize=2)

    return in_memory(write)


def arrow_stream():
    def write(file):
        with pyarrow.ipc.new_stream(file, table().schema) as writer:
            writer.write_table(table(), max_chunksize=2)

    return in_memory(write)


def csv_with(delimiter):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["id", "messages"])
    writer.writerows([row["id"], json.dumps(row["messages"], indent=1)] for row in ROWS)
    return text.getvalue().encode()


def torch_file():
    return in_memory(lambda file: torch.save(ROWS, file))


def old_torch_file():
    return in_memory(lambda file: torch.save(ROWS, file, _use_new_zipfile_serialization=False))


def tar():
    def write(file):
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("rows.jsonl"), io.BytesIO())

    return in_memory(write)


def sqlite():
    connection = sqlite3.connect(":memory:")
    connection.execute("create table rows (a)")
    return connection.serialize()


STEPS = {
    "lines": lines,
    "spread_out": spread_out,
    "crlf": crlf,
    "crcrlf": crcrlf,
    "bom_in_the_middle": bom_in_the_middle,
    "array": array,
    "array_in_a_line": array_in_a_line,
    "empty_array": empty_array,
    "broken_array": broken_array,
    "object": object,
    "object_in_a_line": object_in_a_line,
    "first_alone": first_alone,
    "lists_of_turns": lists_of_turns,
    "zip_of_objects": zip_of_objects,
    "zip_of_pictures": zip_of_pictures,
    "parquet": parquet,
    "arrow_file": arrow_file,
    "arrow_stream": arrow_stream,
    "csv": lambda: csv_with(","),
    "tsv": lambda: csv_with("\t"),
    "nothing": lambda: b"",
    "tokenizer": lambda: json.dumps({"added_tokens": [{"id": 0}], "model": {"vocab": {}}}, indent=2).encode(),
    "sentencepiece": lambda: b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n",
    "pdf": lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "pickled": lambda: pickle.dumps(ROWS),
    "torch_file": torch_file,
    "old_torch_file": old_torch_file,
    "tar": tar,
    "lfs_pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n",
    "web_page": lambda: b"\n<!DOCTYPE html>\n<html>Not Found</html>\n",
    "sqlite": sqlite,
    "bom": lambda data: b"\xef\xbb\xbf" + data,
    "utf16": lambda data: data.decode().encode("utf-16"),
    "twice": lambda data: data + b"\n" + data,
    "more": lambda data: data + b"{}",
    "gz": gzip.compress,
    "gz_in_parts": lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:]),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    "zip": lambda data: zip_of({"__MACOSX/._rows.json": b"\0\5", "rows/rows.json": data}),
    "cut": lambda data: data[:-30],
    "cut_a_bracket": lambda data: data[:-1],
    "encrypted": lambda data: data.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),
    "damage": lambda data: data[:60] + bytes(20) + data[80:],
}


def cases():
    found = []
    for text in (FOLDER / "conversation_files.txt").read_text().splitlines():
        if text and not text.startswith("#"):
            made, _, expected = text.partition(" = ")
            name, _, steps = made.partition(":")
            found.append(pytest.param(name, [step.strip() for step in steps.split("|")], expected, id=name))
    return found


def messages_of(row):
    row = json.loads(row)
    return row if isinstance(row, list) else row["messages"]


def read(name, part="train", **flags):
    return list(conversation_files.open_source(str(name), part, flags).rows())


@pytest.mark.parametrize("chunk", [1 << 20, 7])
@pytest.mark.parametrize(("name", "steps", "expected"), cases())
def test_a_file_gives_its_rows_or_one_line_that_says_what_it_is(
    name, steps, expected, chunk, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(conversation_files, "CHUNK", chunk)  # of an array: rows that end in another chunk
    data = STEPS[steps[0]]()
    for step in steps[1:]:
        data = STEPS[step](data)
    path = tmp_path / name
    path.write_bytes(data)
    if not expected[0].isdigit():
        error = tiny.fails(capsys, read, path)
        assert expected in error and name in error
        return
    rows = read(path)
    assert " ".join(str(number) for number, _ in rows) == expected
    wanted = [row["messages"] for row in ROWS * 2][: len(rows)]
    found = [messages_of(row) for _, row in rows]
    assert [json.loads(turns) if isinstance(turns, str) else turns for turns in found] == wanted


FORMS = ["lines.jsonl", "lines.jsonl.gz", "array.json", "object.json", "table.csv", "utf16.json"]


@pytest.mark.parametrize("form", FORMS)
def test_a_row_too_large_for_memory_is_named(form, tmp_path, capsys, monkeypatch):
    """Few bytes of a compressed file can be a row of gigabytes: it is never read as a whole."""
    monkeypatch.setattr(conversation_files, "LARGEST", 1 << 20)
    monkeypatch.setattr(conversation_files, "CHUNK", 1 << 10)
    rows = [
        ROWS[0],
        {"messages": [{"role": "user", "content": "?" * (3 << 20)}, {"role": "assistant", "content": "!"}]},
    ]
    data = {
        "lines": lines(rows),
        "array": json.dumps(rows).encode(),
        "object": json.dumps({"data": rows}, indent=1).encode(),
        "table": b"prompt,answer\n?,!\n" + b"?" * (3 << 20) + b",!\n",
        "utf16": json.dumps(rows).encode("utf-16"),
    }[form.split(".")[0]]
    path = tmp_path / form
    path.write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    tracemalloc.start()
    error = tiny.fails(capsys, read, path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    number = {"object.json": 20, "utf16.json": 1}.get(form, 2)  # of a line; UTF-16 is read as a whole
    assert f"{path}: row {number} has more than 1 MiB" in error
    assert peak < 14 << 20  # of a mebibyte that is read, and what is made of it


def test_an_archive_in_an_archive_is_refused(tmp_path, capsys):
    """One that holds itself would never end."""
    path = tmp_path / "rows.zip"
    path.write_bytes(zip_of({"rows.zip": zip_of({"rows.jsonl": lines(ROWS)})}))
    assert "another one in it, rows.zip: unpack it" in tiny.fails(capsys, read, path)


def test_every_step_is_used():
    assert {step for case in cases() for step in case.values[1]} == STEPS.keys()


# --- folders, patterns, hub ids ---


def write_rows(path, rows):
    """A file in the form that its name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table(rows), path)
    else:
        path.write_bytes(lines(rows))


def ids(name, part="train", **flags):
    return [json.loads(row)["id"] for _, row in read(name, part, **flags)]


README = """---
configs:
- config_name: chats
  default: true
  data_files:
  - {split: train, path: "data/part-*"}
  - {split: test, path: data/held_out.parquet}
- config_name: other
  data_files:
  - {split: a, path: data/held_out.parquet}
  - {split: b, path: data/part-1.parquet}
---
"""


def test_a_local_copy_of_a_hub_data_set_gives_its_splits(tmp_path, capsys):
    for number, name in enumerate(("part-0", "part-1", "held_out")):
        write_rows(tmp_path / "data" / f"{name}.parquet", [ROWS[number]])
    (tmp_path / "README.md").write_text(README)
    assert ids(tmp_path) == [0, 1]
    assert ids(tmp_path, "validation") == ids(tmp_path, "prompt") == ids(tmp_path, train_split="test") == [2]
    assert ids(tmp_path, "validation", validation_split="train") == [0, 1]
    assert ids(tmp_path, dataset_config="other", train_split="b") == [1]
    error = tiny.fails(capsys, read, tmp_path, dataset_config="other")
    assert "has the splits a, b, none of them is the usual one: choose one by --train_split" in error
    assert "no c: choose one by --prompt_split" in tiny.fails(capsys, read, tmp_path, "prompt", prompt_split="c")
    assert "Available: ['chats', 'other'] (--dataset_config)" in tiny.fails(
        capsys, read, tmp_path, dataset_config="none"
    )
    (tmp_path / "README.md").write_text(README.replace("  default: true\n", ""))
    assert "configs: ['chats', 'other'] (--dataset_config)" in tiny.fails(capsys, read, tmp_path)


def test_a_folder_or_a_pattern_of_files_is_read_in_the_order_of_names(tmp_path, capsys):
    for number, name in enumerate(("a.jsonl", "b.jsonl", "deep/er/c.jsonl")):
        write_rows(tmp_path / "shards [1]" / name, [ROWS[number]])
    (tmp_path / "shards [1]" / "notes.txt").write_text("not of the data")
    assert ids(tmp_path / "shards [1]" / "b.jsonl") == [1]
    (tmp_path / "shards [1]").rename(tmp_path / "shards")
    assert ids(tmp_path / "shards") == ids(f"{tmp_path}/**/*.jsonl") == [0, 1, 2]
    assert ids(f"{tmp_path}/shards/[ab].jsonl") == [0, 1]
    (tmp_path / "link").symlink_to(tmp_path / "shards")
    assert ids(tmp_path / "link") == ids(f"{tmp_path}/link/../shards") == [0, 1, 2]
    assert "no file matches this pattern" in tiny.fails(capsys, read, tmp_path / "*.parquet")
    write_rows(tmp_path / "shards" / "more.parquet", ROWS)
    assert "more.parquet would be left out, as no split has them: name the files" in tiny.fails(
        capsys, read, tmp_path / "shards"
    )
    assert ids(f"{tmp_path}/shards/[ab]*") + ids(f"{tmp_path}/shards/*.parquet") == [0, 1, 0, 1, 2]
    (tmp_path / "shards" / "more.parquet").unlink()
    write_rows(tmp_path / "shards" / "validation.jsonl", [ROWS[1]])
    (tmp_path / "shards" / "a.jsonl").rename(tmp_path / "shards" / "train.jsonl")
    assert "b.jsonl, c.jsonl would be left out" in tiny.fails(capsys, read, tmp_path / "shards")
    (tmp_path / "shards" / "b.jsonl").unlink()
    (tmp_path / "shards" / "deep" / "er" / "c.jsonl").unlink()
    assert (ids(tmp_path / "shards"), ids(tmp_path / "shards", "validation")) == ([0], [1])


def test_a_rejected_row_is_named_by_its_own_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines() + b"x\n")
    (tmp_path / "b.jsonl").write_bytes(b"\n\n")
    (tmp_path / "c.jsonl").write_bytes(lines() + b"\nx\n")
    tiny.tokenizer().save_pretrained(tmp_path / "target")
    config = prepare_data.prepare(
        f"{tmp_path}/?.jsonl", tmp_path / "out", tmp_path / "target", num_proc=1, max_rejected_ratio=0.5
    )
    rejected = [json.loads(text) for text in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rejected] == [
        (str(tmp_path / "a.jsonl"), 5),
        (str(tmp_path / "c.jsonl"), 5),
    ]
    assert config["splits"]["train"]["rows"] == 6


def test_a_saved_folder_of_datasets(tmp_path):
    saved = {"train": datasets.Dataset.from_list(ROWS[:2]), "validation": datasets.Dataset.from_list(ROWS[2:])}
    datasets.disable_progress_bars()
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "both")
    saved["train"].save_to_disk(tmp_path / "one", num_shards=2)
    assert ids(tmp_path / "both") == ids(tmp_path / "one") == [0, 1]
    assert ids(tmp_path / "both", "validation") == [2]
    (tmp_path / "lines" / "saved").mkdir(parents=True)
    (tmp_path / "lines" / "state.json").write_text('{"of another program": 1}')
    (tmp_path / "one").rename(tmp_path / "lines" / "saved" / "deeper")
    write_rows(tmp_path / "lines" / "rows.jsonl", ROWS[2:])
    assert ids(f"{tmp_path}/lines/*.jsonl") == [2]
    assert conversation_files.find_saved(tmp_path / "lines") == {}


def test_types_that_change_between_rows_change_nothing(tmp_path):
    """A table would have one type for all rows of a column, with nulls for what other rows have."""
    calls = [{"a": 1}, {"a": "one"}, {"b": [1]}, "text"]
    rows = [{"messages": [{"role": "assistant", "content": number, "arguments": call}]}
            for number, call in enumerate(calls)]  # fmt: skip
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    table = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    table.to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        found = [json.loads(row)["messages"][0]["arguments"] for _, row in read(tmp_path / name)]
        assert found == calls, name


def test_a_table_gives_no_nulls_of_other_rows_and_texts_that_it_keeps_as_bytes(tmp_path):
    calls = [{"a": 1}, {"b": "x"}]
    rows = [{"messages": [{"role": "assistant", "arguments": call}], "b": b"\xc3\xa9"} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = [json.loads(row) for _, row in read(tmp_path / "rows.parquet")]
    assert [row["messages"][0]["arguments"] for row in found] == calls
    assert [row["b"] for row in found] == ["é", "é"]
    pairs = pyarrow.Table.from_pylist([{"q": "one?", "a": None}, {"q": "two?", "a": "2"}])
    pyarrow.parquet.write_table(pairs, tmp_path / "qa.parquet")
    rows = [json.loads(row) for _, row in read(tmp_path / "qa.parquet", prompt_column="q", response_column="a")]
    assert [row["messages"][1]["content"] for row in rows] == [None, "2"]  # a column is there though its first is null


def test_a_hub_id_is_resolved_and_its_files_are_fetched(tmp_path, monkeypatch):
    """The hub itself is not asked: what datasets and huggingface_hub would answer is given."""
    import types

    write_rows(tmp_path / "data" / "x.parquet", ROWS)
    urls = {"train": ["hf://datasets/org/chats@abc/data/x.parquet"], "test": ["hf://datasets/org/chats@abc/t.parquet"]}
    asked = []

    def load_dataset_builder(name, config):
        asked.append((name, config))
        return types.SimpleNamespace(config=types.SimpleNamespace(data_files=urls))

    def snapshot_download(repo, repo_type, revision, allow_patterns, **_):
        asked.append((repo, repo_type, revision, allow_patterns))
        return tmp_path

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert ids("org/chats", dataset_config="all") == [0, 1, 2]
    assert asked == [("org/chats", "all"), ("org/chats", "dataset", "abc", ["data/x.parquet"])]


def test_names_of_nothing_end_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for name, expected in {
        "absent.jsonl": "no such file or folder, and not one of the presets sharegpt",
        "data/absent.jsonl": "no such file or folder",
        "C:\\chats\\rows.jsonl": "no such file or folder",
        "https://some.where/rows.jsonl": "is a URL: download the file",
        "some/thing": "cannot be read, as a folder or by its id on the hub",
        tmp_path / "empty": "doesn't contain any data files",
        tmp_path / "pipe": "is a pipe or a device: write it to a file, which is read more than once",
        tmp_path / "link.jsonl": "no such file or folder",
    }.items():
        assert expected in tiny.fails(capsys, read, name), name


# --- columns ---


@pytest.mark.parametrize("case", [json.loads(line) for line in (FOLDER / "columns.jsonl").read_text().splitlines()])
def test_a_row_of_columns_is_the_conversation_that_was_meant(case, tmp_path):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [case["row"]])
    ((_, row),) = read(path, prompt_column=case["columns"][0], response_column=case["columns"][1])
    if "rejected" in case:
        with pytest.raises(conversations.Rejected) as rejected:
            conversations.read_conversation(json.loads(row))
        assert ": ".join(rejected.value.args).startswith(case["rejected"])
        return
    messages, tools = conversations.read_conversation(json.loads(row))
    assert [[message["role"], message["content"]] for message in messages] == case["messages"]
    assert messages[-1].get("reasoning") == case.get("reasoning")
    assert [tool["function"]["name"] for tool in tools or []] == case.get("tools", [])


def test_columns_that_are_not_there_end_with_one_line(tmp_path, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"q": "one?", "a": "1", "text": "x"}, {"q": "two?"}])
    tiny.tokenizer().save_pretrained(tmp_path / "target")

    def prepare(**flags):
        return prepare_data.prepare(path, tmp_path / "out", tmp_path / "target", num_proc=1, **flags)

    for flags, expected in (
        ({"prompt_column": "question", "response_column": "a"}, "has no column question, but q, a, text"),
        ({"prompt_column": "q", "response_column": "b"}, "has no column b, but q, a, text"),
        ({"response_column": "a"}, "give --prompt_column as well"),
        ({"prompt_column": "q"}, "give --response_column as well"),
    ):
        assert expected in tiny.fails(capsys, prepare, **flags)
    config = prepare(prompt_column="q", response_column="a", max_rejected_ratio=0.5)
    assert config["splits"]["train"]["rows"] == 1  # the second row has no answer


def test_flags_that_choose_are_refused_where_there_is_no_choice(tmp_path, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", ROWS)
    for name, flag, expected in (
        (path, "train_split", "is a file, which has no splits: drop it"),
        (path, "dataset_config", "is a file, which has no splits: drop it"),
        (f"{tmp_path}/*.jsonl", "train_split", "is a pattern of files, which have no splits: drop it"),
        ("pydoc", "prompt_column", "is a preset, which knows its columns and splits: drop it"),
        ("pydoc", "dataset_config", "is a preset, which knows its columns and splits: drop it"),
    ):
        assert f"{flag} x: {name} {expected}" in tiny.fails(capsys, read, name, **{flag: "x"})
    tiny.tokenizer().save_pretrained(tmp_path / "target")
    given = (path, tmp_path / "out", tmp_path / "target")
    error = tiny.fails(capsys, prepare_data.prepare, *given, validation_split="test")
    assert "validation_split test: give --validation_dataset as well" in error
    prepare_data.prepare(*given, validation_dataset=path, num_proc=1)
    assert "validation_dataset has files of the training data" in capsys.readouterr().out


def test_prompts_are_the_first_rows_that_ask_something(tmp_path, capsys):
    rows = [{"messages": []}, {"prompt": "no turns", "messages": ROWS[0]["messages"]}, {"prompt": "Once"}, ROWS[1]]
    tokenizer = tiny.tokenizer()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines(rows)))
    first, second = prompts.read_prompts(tmp_path / "rows.jsonl.gz", tokenizer, limit=2)
    question = ROWS[0]["messages"][:1]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(first.ids) == text and second.ids == tokenizer("Once")["input_ids"]
    assert "line 1 of" in capsys.readouterr().out
    path = tiny.write_jsonl(tmp_path / "columns.jsonl", [{"q": ["three?", "and then?"], "a": "3"}])
    (prompt,) = prompts.read_prompts(path, tokenizer, prompt_column="q")
    assert "three?" in tokenizer.decode(prompt.ids) and not prompt.questions


# --- rows that others tokenised ---


def test_a_folder_of_speculators_is_named_and_imported(tmp_path, capsys):
    """Its prepared data: a data set of datasets with two columns, and token counts beside it."""
    datasets.disable_progress_bars()
    rows = [{"input_ids": [5, 6, 7, 8], "loss_mask": mask, "seq_len": 4} for mask in ([0, 0, 1, 1], [0, 1, 1, 1])]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "theirs")
    torch.save({7: 2}, tmp_path / "theirs" / "token_freq.pt")
    error = tiny.fails(capsys, dataloader.open_data, tmp_path / "theirs")
    assert f"python prepare_data.py --dataset {tmp_path}/theirs --target_model_path TARGET --output_path" in error
    tiny.tokenizer().save_pretrained(tmp_path / "target")
    prepare_data.prepare(tmp_path / "theirs", tmp_path / "out", tmp_path / "target", num_proc=1)
    data, config = dataloader.open_data(tmp_path / "out")
    assert data["train"]["input_ids"][:] == [row["input_ids"] for row in rows]
    assert data["train"]["loss_mask"][:] == [row["loss_mask"] for row in rows]
    assert config["splits"]["train"]["supervised_tokens"] == 5
    assert "is prepared already" in tiny.fails(capsys, read, tmp_path / "out")
