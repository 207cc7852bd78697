"""From conversations to supervised tokens: forms of rows, templates, masks, rejected rows, the prepared folder."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import processors

import prepare_data
from core import common, conversations, dataloader, target_files, vocabulary
from helpers import tiny
from helpers.chat_templates import FAMILIES, family_tokenizer, names_of

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}
SECOND = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "that is all"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": "x"}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def chat_for(family, name=None, max_length=2048, only_last=False):
    return prepare_data.make_chat(family_tokenizer(family), name or family, max_length, only_last)


def line(row):
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def runs(row, chat):
    """The text of each maximal run of supervised tokens."""
    ids, mask, *_ = prepare_data.tokenise(line(row), chat)
    assert len(ids) == len(mask) <= chat.max_length
    return runs_of(ids, mask, chat.tokenizer)


def runs_of(ids, mask, tokenizer):
    pieces, before = [], 0
    for token, supervised in zip(ids, mask, strict=True):
        if supervised:
            pieces = [*pieces[:-1], [*pieces[-1], token]] if before else [*pieces, [token]]
        before = supervised
    return [tokenizer.decode(piece) for piece in pieces]


def cause(row, chat):
    with pytest.raises(conversations.Rejected) as rejected:
        prepare_data.tokenise(line(row), chat)
    return rejected.value.args[0]


def chat_row(*messages, **fields):
    return {"conversations": list(messages), **fields}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    return write_family(folder, "llama3")


def write_family(folder, family):
    family_tokenizer(family).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


# ---------------------------------------------------------------------------- what is supervised
THOUGHT = {"role": "assistant", "content": "four", "reasoning_content": "two and two"}
TAGGED = {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\nfour"}
CALLING = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "out"},
    REPLY,
]


def test_the_prompt_that_opens_a_thought_is_not_supervised_but_stands_before_it():
    chat = chat_for("deepseek-r1-distill")
    ids, mask, *_ = prepare_data.tokenise(line(chat_row(USER, THOUGHT)), chat)
    assert chat.tokenizer.decode(ids[mask == 0]).endswith("<｜Assistant｜><think>\n")


def test_reasoning_that_the_template_drops_is_put_back_behind_the_generation_prompt():
    tokenizer = family_tokenizer("qwen")
    tokenizer.chat_template = tokenizer.chat_template.replace("(loop.last or reasoning)", "false")
    chat = prepare_data.make_chat(tokenizer, "qwen", 2048, False)
    ids, mask, *_ = prepare_data.tokenise(line(chat_row(USER, TAGGED)), chat)
    assert runs_of(ids, mask, tokenizer) == ["<think>\ntwo and two\n</think>\n\nfour<|im_end|>"]
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\ntwo and two\n</think>\n\nfour<|im_end|>")


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_across_the_start_of_a_reply_is_not_supervised_where_prefixes_encode_differently(trim_offsets):
    tokenizer = family_tokenizer("qwen", ["assistant\n \n five", "a\n \n b\n \n c"] * 50)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    chat = prepare_data.make_chat(tokenizer, "qwen", 2048, False)
    reply = {"role": "assistant", "content": " \n five"}
    ids, mask, *_ = prepare_data.tokenise(line(chat_row(USER, reply, USER, REPLY)), chat)
    text = tokenizer.apply_chat_template([USER, reply, USER, REPLY], tokenize=False)
    prefix = tokenizer(text[: text.index(" \n five")], add_special_tokens=False)["input_ids"]
    assert prefix != ids[: len(prefix)].tolist()  # so that spans from encoded prefixes would be wrong
    assert runs_of(ids, mask, tokenizer)[0] == " five<|im_end|>"


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_characters_of_several_bytes_and_tokens(trim_offsets):
    answer = "naïve 日本語 👩‍👩‍👧 end  \n\n 😀"
    tokenizer = family_tokenizer("qwen")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    chat = prepare_data.make_chat(tokenizer, "qwen", 2048, False)
    row = chat_row({"role": "user", "content": "é😀"}, {"role": "assistant", "content": answer}, USER, REPLY)
    assert runs(row, chat)[0] == answer + "<|im_end|>"


def test_a_token_of_no_characters_at_the_start_of_a_reply_belongs_to_the_prompt():
    encoder = family_tokenizer("qwen").backend_tokenizer
    encoder.post_processor = processors.ByteLevel(trim_offsets=True)  # as some tokenizers report a blank
    offsets = encoder.encode("a  hi").offsets
    assert offsets[1] == (2, 2) and offsets[2][0] == 3
    assert prepare_data.encode("a  hi", [(2, 5)], encoder)[1].tolist() == [0, 0] + [1] * (len(offsets) - 2)
    assert prepare_data.encode("a  hi", [(1, 5)], encoder)[1].tolist() == [0, 1] + [1] * (len(offsets) - 2)


def test_offsets_cover_blanks_even_if_the_tokenizer_trims_them():
    tokenizer = family_tokenizer("qwen")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert tokenizer.backend_tokenizer.encode("a  hi").offsets[1] == (2, 2)
    assert prepare_data.make_chat(tokenizer, "qwen", 2048, False).encoder.encode("a  hi").offsets[1] == (1, 2)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_another_prompt_leaves_the_supervised_tokens_unchanged(family):
    chat, supervised = chat_for(family, names_of(family)[0]), []
    for prompt in ("hi", "Something 😀 else\n\nassistant\n", "<think> user <|system|>"):
        ids, mask, *_ = prepare_data.tokenise(line(chat_row({"role": "user", "content": prompt}, REPLY, *SECOND)), chat)
        supervised.append(ids[mask == 1].tolist())
    assert supervised[0] == supervised[1] == supervised[2]


# ---------------------------------------------------------------------------- forms of rows
def test_every_form_of_a_conversation_gives_the_same_tokens():
    chat = chat_for("qwen")
    system = {"role": "system", "content": "Be brief."}
    messages = [system, USER, REPLY, *SECOND]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[message["role"]], "value": message["content"]} for message in messages]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    forms = [
        {"conversations": messages},
        {"messages": messages},
        {"id": 1, "conversations": shared},
        {"messages": [{"role": "developer", "content": "Be brief."}, *messages[1:]], "tools": []},
        {"messages": [*messages[:-1], {"from": "ChatGPT", "value": "that is all"}], "tools": ""},
        {"messages": parts},
        {"messages": [*messages, {"role": "user", "content": "never answered"}]},
        {"text": chat.tokenizer.apply_chat_template(messages, tokenize=False)},
    ]
    ids, mask, *_ = prepare_data.tokenise(line(forms[0]), chat)
    forms.append({"input_ids": ids.tolist(), "loss_mask": mask.tolist()})
    for form in forms:
        other_ids, other_mask, *_ = prepare_data.tokenise(line(form), chat)
        assert other_ids.tolist() == ids.tolist() and other_mask.tolist() == mask.tolist(), form


def test_rows_that_lose_their_reasoning_are_counted(tmp_path, capsys):
    """Llama's template does not show it."""
    tiny.tokenizer().save_pretrained(tmp_path / "target")
    rows = [chat_row(USER, {**REPLY, "reasoning_content": "they greet"})] * 2 + [chat_row(USER, REPLY)]
    rows.append(chat_row(USER, {**REPLY, "reasoning_content": "an earlier one"}, *SECOND))
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    config = prepare_data.prepare(path, tmp_path / "out", tmp_path / "target", num_proc=1)
    assert config["splits"]["train"]["reasoning_left_out"] == 2
    assert "train: 2 rows without the reasoning of their last reply" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama3", "qwen", "gpt-oss"])
def test_calls_and_tools_of_another_form_are_rejected(name):
    for call in ({"function": "add"}, {"function": None}, {"function": {"arguments": {}}}, {"name": 3}):
        row = chat_row(USER, {"role": "assistant", "content": None, "tool_calls": [call]})
        assert cause(row, chat_for(name)) == "malformed call", call
    for tools in ([None], [1], "[1]", {"name": "add"}):
        assert cause(chat_row(USER, REPLY, tools=tools), chat_for(name)) == "malformed tools", tools


def test_reasoning_fields_and_tools_as_text():
    for field in ("reasoning_content", "thinking", "reasoning"):
        reply = {"role": "assistant", "content": "four", field: "two and two"}
        assert runs(chat_row(USER, reply), chat_for("qwen")) == ["<think>\ntwo and two\n</think>\n\nfour<|im_end|>"]
        assert runs(chat_row(USER, reply), chat_for("gpt-oss"))[0].startswith(
            "<|channel|>analysis<|message|>two and two<|end|>"
        )
    chat = chat_for("qwen")
    as_list, as_text = (
        prepare_data.tokenise(line(chat_row(USER, REPLY, tools=t)), chat)[0] for t in (TOOLS, json.dumps(TOOLS))
    )
    assert as_list.tolist() == as_text.tolist() and "adds" in chat.tokenizer.decode(as_list)


def test_only_the_last_turn():
    messages = [USER, REPLY, *SECOND]
    assert runs(chat_row(*messages), chat_for("llama3", only_last=True)) == ["that is all<|eot_id|>"]
    chat = chat_for("llama3", only_last=True)
    row = {"input_ids": [9, 9, 9, 9, 9, 9], "loss_mask": [1, 1, 0, 1, 1, 0]}
    assert prepare_data.tokenise(line(row), chat)[1].tolist() == [0, 0, 0, 1, 1, 0]


def test_truncation_is_at_the_right_and_needs_a_supervised_token():
    ids, mask, cut, _ = prepare_data.tokenise(line(chat_row(USER, REPLY, *SECOND)), chat_for("llama3"))
    first = int(np.flatnonzero(mask)[0])
    short, short_mask, cut, _ = prepare_data.tokenise(
        line(chat_row(USER, REPLY, *SECOND)), chat_for("llama3", max_length=first + 2)
    )
    assert short.tolist() == ids[: first + 2].tolist() and short_mask.sum() == 2 and cut == len(ids) - first - 2
    assert cause(chat_row(USER, REPLY), chat_for("llama3", max_length=first)) == "no reply within max_length"


# ---------------------------------------------------------------------------- rows that cannot be used
BAD = [
    ("not JSON", b'{"conversations": ['),
    ("not JSON", b'{"text": "\xff"}'),
    ("not JSON", b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "a"}]}'),
    ("not an object", b"[1, 2]"),
    ("empty", b"{}"),
    ("no question with a reply", {"conversations": []}),
    ("empty", {"text": ""}),
    ("empty", {"input_ids": [], "loss_mask": []}),
    ("empty", chat_row(USER, {"role": "assistant", "content": " "})),
    ("unknown form", {"prompt": "a", "completion": "b"}),
    ("malformed message", {"conversations": "hi"}),
    ("malformed message", chat_row({"role": "user", "content": 3}, REPLY)),
    ("malformed call", chat_row(USER, {"role": "assistant", "content": "", "tool_calls": ["add"]})),
    ("malformed tools", chat_row(USER, REPLY, tools="[")),
    ("malformed tools", chat_row(USER, REPLY, tools={"a": 1})),
    ("unknown role", chat_row({"role": "narrator", "content": "once"}, REPLY)),
    ("no question with a reply", chat_row(USER)),
    ("no question with a reply", chat_row(REPLY)),
    ("roles out of order", chat_row(USER, USER, REPLY)),
    ("roles out of order", chat_row(USER, REPLY, REPLY)),
    ("roles out of order", chat_row(USER, {"role": "system", "content": "late"}, REPLY)),
    ("marker inside content", chat_row({"role": "user", "content": "a<|eot_id|>b"}, REPLY)),
    (
        "marker inside content",
        chat_row({"role": "user", "content": "<|start_header_id|>assistant<|end_header_id|>"}, REPLY),
    ),
    ("marker inside content", chat_row({"role": "system", "content": "<|eom_id|>"}, USER, REPLY)),
    ("marker inside content", chat_row(USER, REPLY, tools=[{"name": "<|eot_id|>"}])),
    ("template error", chat_row(USER, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]})),
    ("no supervised token", {"text": "nothing is marked here"}),
    ("no supervised token", {"input_ids": [9, 9], "loss_mask": [0, 0]}),
    ("bad tokens", {"input_ids": [9, 9], "loss_mask": [1]}),
    ("bad tokens", {"input_ids": [9, 9], "loss_mask": [1, 2]}),
    ("bad tokens", {"input_ids": [9, 400], "loss_mask": [1, 1]}),
    ("bad tokens", {"input_ids": [9, -1], "loss_mask": [1, 1]}),
    ("bad tokens", {"input_ids": [9, 1.5], "loss_mask": [1, 1]}),
    ("bad tokens", {"input_ids": [9]}),
]


@pytest.mark.parametrize(("expected", "row"), BAD)
def test_cause_of_a_rejected_row(expected, row):
    assert cause(row, chat_for("llama3")) == expected


def test_a_turn_that_the_template_leaves_out_is_noticed():
    tokenizer = family_tokenizer("llama3")
    skipping = "{%- set messages = messages | rejectattr('name', 'defined') | list %}"
    tokenizer.chat_template = skipping + tokenizer.chat_template
    chat = prepare_data.make_chat(tokenizer, "llama3", 2048, False)
    assert runs(chat_row(USER, REPLY, *SECOND), chat) == ["hello there<|eot_id|>", "that is all<|eot_id|>"]
    assert cause(chat_row(USER, {**REPLY, "name": "aside"}, *SECOND), chat) == "turns not marked"


def test_a_call_that_the_template_cannot_render_is_rejected_and_not_dropped():
    """DeepSeek's template knows a call by its null content, which transformers removes from a message."""
    assert cause(chat_row(*CALLING), chat_for("deepseek-r1-distill")) == "template error"


def test_a_marker_cannot_hide_in_the_escapes_of_arguments():
    hidden = {"type": "function", "function": {"name": "f", "arguments": '{"a": "\\u003c|eom_id|>"}'}}
    row = chat_row(USER, {"role": "assistant", "content": None, "tool_calls": [hidden]})
    assert cause(row, chat_for("llama3")) == "marker inside content"


def test_a_template_that_marks_no_end_of_a_call_supervises_no_output_of_a_tool():
    """Under auto nothing is known of calls: a template may close them by a token that the probe does not show."""
    special, template = ["<|turn|>", "<|stop|>", "<|yield|>"], FAMILIES["round"][1]
    template = template.replace(r"'\n<|stop|>", r"'<|yield|>' if message.tool_calls else '\n<|stop|>")
    template = template.replace("message.content.split", "(message.content or message.tool_calls | tojson).split")
    tokenizer = tiny.train_tokenizer(tiny.TEXTS, 400, special, template, bos_token="<|turn|>", eos_token="<|stop|>")
    chat = prepare_data.make_chat(tokenizer, "auto", 2048, False)
    assert cause(chat_row(*CALLING), chat) == "turns not marked"
    assert runs(chat_row(USER, REPLY), chat) == ["hello there\n<|stop|>"]


def test_rejected_rows_are_named_with_line_and_cause(tmp_path, target):
    lines = [line(chat_row(USER, REPLY))]
    for _, row in BAD:
        lines += [line(row), line(chat_row(USER, REPLY))]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n\n\n")
    config = prepare_data.prepare(path, tmp_path / "out", target, max_rejected_ratio=0.6, num_proc=2)
    rejected = [json.loads(text) for text in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["cause"]) for row in rejected] == [(2 * i + 2, bad[0]) for i, bad in enumerate(BAD)]
    assert {row["file"] for row in rejected} == {str(path)} and set(rejected[0]) == {"line", "file", "cause", "detail"}
    assert config["splits"]["train"]["rows"] == len(BAD) + 1
    assert config["splits"]["train"]["rejected"]["roles out of order"] == 3


# ---------------------------------------------------------------------------- errors that end the program
def test_unusable_files_end_with_one_line(tmp_path, target, capsys):
    def stop(content, **options):
        path = tmp_path / "rows.jsonl"
        if content is not None:
            path.write_bytes(content)
        return tiny.fails(capsys, prepare_data.prepare, path, tmp_path / "out", target, **options)

    assert "no such file" in stop(None)
    assert "is empty" in stop(b"")
    assert "is empty" in stop(b"\n \n")
    error = stop(b"x\n" + line(chat_row(USER)), max_rejected_ratio=1.0)
    assert "none of 2 rows can be used: 1 not JSON (first: line 1: Expecting value" in error
    assert ", 1 no question with a reply (first: line 2: user);" in error
    good = line(chat_row(USER, REPLY)) + b"\n"
    error = stop(good * 18 + b"x\n" + good + b"x\n")
    assert "2 of 21 rows rejected (9.5%, max_rejected_ratio 0.01): 2 not JSON (first: line 19: Expecting value" in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_options_that_make_no_sense(tmp_path, target, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(4))

    def stop(output="out", **options):
        return tiny.fails(capsys, prepare_data.prepare, path, tmp_path / output, target, **options)

    assert "vicuna: known are llama3" in stop(chat_template="vicuna")
    assert "max_rejected_ratio 2 must" in stop(max_rejected_ratio=2)
    assert "validation_ratio 1" in stop(validation_ratio=1)
    assert "leaves none of 4 rows" in stop(validation_ratio=0.9)
    assert "give one of them" in stop(validation_ratio=0.5, validation_dataset=path)
    assert "dataset_path" in stop(dataset_path=tmp_path)
    assert "no validation split" in stop(validation_dataset="pydoc")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years of work")
    assert "not a prepared data set" in stop(output="precious")
    assert (tmp_path / "precious" / "thesis.tex").exists()


def test_template_that_does_not_fit(tmp_path, target, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(4))
    error = tiny.fails(capsys, prepare_data.prepare, path, tmp_path / "out", target, chat_template="qwen")
    assert r"'<|im_start|>assistant\n'" in error and r"<|begin_of_text|><|start_header_id|>user" in error
    assert "--chat_template llama3 or auto" in error


def test_tokenizer_without_a_chat_template(tmp_path, capsys):
    tokenizer = family_tokenizer("llama3")
    text = tokenizer.apply_chat_template([USER, REPLY], tokenize=False)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "llama"}')
    tokens = {"input_ids": [9, 9, 9], "loss_mask": [0, 1, 1]}
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [tokens, chat_row(USER, REPLY)])
    rows = tiny.write_jsonl(tmp_path / "chats.jsonl", [chat_row(USER, REPLY), tokens])
    for name in ("phi3", "auto"):
        error = tiny.fails(capsys, prepare_data.prepare, rows, tmp_path / "out", tmp_path / "bare", chat_template=name)
        assert f"the tokenizer has none, and none for {name} in core/templates: --chat_template deep" in error
    missing = "no chat template in the tokenizer (first: line "
    assert missing + "2: " in tiny.fails(
        capsys, prepare_data.prepare, path, tmp_path / "out", tmp_path / "bare", chat_template="qwen"
    )
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [tokens, {"text": text}])
    assert (
        prepare_data.prepare(path, tmp_path / "out", tmp_path / "bare", chat_template="llama3")["splits"]["train"][
            "supervised_tokens"
        ]
        > 5
    )
    assert missing + "2: " in tiny.fails(
        capsys, prepare_data.prepare, path, tmp_path / "out", tmp_path / "bare", chat_template="auto"
    )
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [tokens])
    assert (
        prepare_data.prepare(path, tmp_path / "out", tmp_path / "bare", chat_template="auto")["splits"]["train"]["rows"]
        == 1
    )


# ---------------------------------------------------------------------------- presets
def test_sharegpt_from_a_local_copy(tmp_path, target):
    human, gpt = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello there"}
    rows = [{"id": f"a_{i}", "conversations": [human, gpt]} for i in range(18)]
    rows += [{"id": "cut", "conversations": [gpt, human, gpt]}, {"id": "odd", "conversations": [human, human, gpt]}]
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "ShareGPT_V4.3_unfiltered_cleaned_split.json").write_text(json.dumps(rows))
    config = prepare_data.prepare("sharegpt", tmp_path / "out", target, dataset_path=folder)
    assert config["splits"]["train"]["rows"] == 19
    data = dataloader.open_data(tmp_path / "out")[0]["train"]
    assert data[18] == data[0]  # the cut conversation, without the turn that was cut off
    rejected = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert rejected["line"] == 20 and rejected["cause"] == "roles out of order" and rejected["file"] == "sharegpt"


@pytest.mark.parametrize(("ratio", "enough"), [(None, True), (0.05, False), (0.0, False), (0.2, True)])
def test_a_given_limit_of_rejected_rows_wins_over_the_presets_own(ratio, enough, tmp_path, target, capsys):
    human, gpt = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello there"}
    chats = [{"id": str(i), "conversations": [human, gpt]} for i in range(18)]
    chats += [{"id": "odd", "conversations": [human, human, gpt]}]
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "ShareGPT_V4.3_unfiltered_cleaned_split.json").write_text(json.dumps(chats))
    words = ["--dataset", "sharegpt", "--dataset_path", tmp_path / "copy", "--target_model_path", target]
    words += ["--output_path", tmp_path / "out"] + ([] if ratio is None else ["--max_rejected_ratio", ratio])
    args = prepare_data.parse_args([str(word) for word in words])
    if enough:
        assert prepare_data.main(args)["splits"]["train"]["rows"] == 18
    else:
        assert f"1 of 19 rows rejected (5.3%, max_rejected_ratio {ratio:g})" in tiny.fails(
            capsys, prepare_data.main, args
        )


def test_ultrachat_from_a_local_copy(tmp_path, target, capsys):
    def part(name, count):
        rows = [{"prompt": "hi", "prompt_id": str(i), "messages": [USER, REPLY, *SECOND]} for i in range(count)]
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "copy" / "data" / name))

    part("train_sft-00000-of-00002-a3ecf92756993583.parquet", 3)
    part("train_sft-00001-of-00002-0a1804bcb6ae68c6.parquet", 2)
    part("train_gen-00000-of-00001-a6c9fb894be3e50b.parquet", 7)
    options = {"dataset_path": tmp_path / "copy"}
    assert "no data/test_sft-" in tiny.fails(
        capsys, prepare_data.prepare, "ultrachat", tmp_path / "out", target, validation_dataset="ultrachat", **options
    )
    part("test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet", 1)
    prepare_data.prepare("ultrachat", tmp_path / "out", target, validation_dataset="ultrachat", **options)
    data, _ = dataloader.open_data(tmp_path / "out")
    assert len(data["train"]) == 5 and len(data["validation"]) == 1


def test_a_preset_without_hub_and_copy_ends_with_one_line(tmp_path, target, capsys):
    assert "--dataset_path" in tiny.fails(capsys, prepare_data.prepare, "ultrachat", tmp_path / "out", target)
    assert "no ShareGPT" in tiny.fails(
        capsys, prepare_data.prepare, "sharegpt", tmp_path / "out", target, dataset_path=tmp_path
    )


def test_pydoc_is_large_partly_of_several_turns_and_always_the_same():
    lines = conversations.pydoc_lines()
    rows = [json.loads(row) for row in lines]
    assert len(rows) > 2000 and sum(len(row["conversations"]) > 2 for row in rows) > 100
    chat = chat_for("llama3")
    assert all(prepare_data.tokenise(row, chat)[1].any() for row in lines[::100])
    answers = " ".join(message["content"] for row in rows for message in row["conversations"])
    assert "collections.OrderedDict" in answers and "Serialize ``obj`` to a JSON" in answers
    code = (
        "import hashlib; from core import conversations;"
        "print(hashlib.sha256(b''.join(conversations.pydoc_lines())).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tiny.REPOSITORY, env=environment, capture_output=True)
    assert result.stdout.decode().strip() == hashlib.sha256(b"".join(lines)).hexdigest()


# ---------------------------------------------------------------------------- the prepared folder
def test_same_data_whatever_the_number_of_processes(tmp_path, target, monkeypatch):
    tokenise = prepare_data.tokenise

    def tokenise_and_note(raw, chat):
        with open(tmp_path / "processes", "a") as file:
            file.write(f"{os.getpid()} ")
        return tokenise(raw, chat)

    def processes():
        return set((tmp_path / "processes").read_text().split()) - {str(os.getpid())}

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(prepare_data, "tokenise", tokenise_and_note)
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(301, turns=2))
    options = {"validation_ratio": 0.1, "num_samples": 250}
    first = prepare_data.prepare(path, tmp_path / "one", target, num_proc=96, **options)
    assert not processes()  # too few rows to start any
    monkeypatch.setattr(prepare_data, "MIN_ROWS_PER_PROCESS", 100)
    second = prepare_data.prepare(path, tmp_path / "two", target, num_proc=96, **options)
    assert len(processes()) == 2
    for config in (first, second):  # how rows lie in files may differ
        config["files"].clear()
    assert first == second
    one, two = (dataloader.open_data(tmp_path / name)[0] for name in ("one", "two"))
    assert len(one["train"]) == 225 and len(one["validation"]) == 25
    for split in one:
        assert one[split].to_dict() == two[split].to_dict()
    assert {name: str(feature) for name, feature in one["train"].features.items()} == {
        "input_ids": "List(Value('int32'))",
        "loss_mask": "List(Value('uint8'))",
        "length": "Value('int32')",
    }


def test_counts_are_of_the_supervised_tokens_of_train(tmp_path, target):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(40, turns=2))
    config = prepare_data.prepare(path, tmp_path / "out", target, validation_ratio=0.25, max_length=199)
    expected, tokens, truncated = {}, 0, 0
    for row in dataloader.open_data(tmp_path / "out")[0]["train"]:
        assert row["length"] == len(row["input_ids"]) == len(row["loss_mask"]) <= 199
        tokens, truncated = tokens + row["length"], truncated + (row["length"] == 199)
        for token, supervised in zip(row["input_ids"], row["loss_mask"], strict=True):
            expected[token] = expected.get(token, 0) + supervised
    expected = {token: count for token, count in expected.items() if count}
    assert vocabulary.read_token_freq(tmp_path / "out" / "token_freq.pt") == expected
    train = config["splits"]["train"]
    assert (train["tokens"], train["supervised_tokens"]) == (tokens, sum(expected.values()))
    assert train["longest"] == 199 and 0 < truncated == train["truncated"] < 30


def test_read_token_freq(tmp_path, capsys):
    torch.save({1: torch.tensor(3)}, tmp_path / "dict.pt")
    assert vocabulary.read_token_freq(tmp_path / "dict.pt") == {1: 3}
    torch.save({1: Path("x")}, tmp_path / "code.pt")
    torch.save({1: -2}, tmp_path / "negative.pt")
    torch.save({}, tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "junk.pt").write_text("junk")
    for name, message in (("code", "not a plain dict"), ("negative", "negative"), ("none", "none in it"),
                          ("list", "not a plain dict"), ("junk", "not a plain dict"),
                          ("absent", "No such file")):  # fmt: skip
        assert message in tiny.fails(capsys, vocabulary.read_token_freq, tmp_path / f"{name}.pt")


def test_fingerprint_follows_every_ingredient(tmp_path, target, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(12, turns=2))
    other = write_family(tmp_path / "other", "llama3")
    tokenizer = target_files.load_tokenizer(other)
    tokenizer.chat_template += "{#- says the same in another way -#}"
    tokenizer.save_pretrained(other)
    seen = []

    def build(**options):
        options = {"dataset": path, "target_model_path": target, **options}
        config = prepare_data.prepare(output_path=tmp_path / "out", **options)
        assert dataloader.open_data(tmp_path / "out")[1] == config
        seen.append(config["fingerprint"])
        return "reused" in capsys.readouterr().out

    assert not build() and build()
    for options in (
        {"max_length": 100},
        {"chat_template": "llama3"},
        {"train_only_last_turn": True},
        {"num_samples": 6},
        {"validation_ratio": 0.5},
        {"validation_dataset": path},
        {"target_model_path": other},
        {"seed": 3},
    ):
        assert not build(**options), options
        assert build(**options), options
    path.write_bytes(path.read_bytes().replace(b"Question 0", b"question 0", 1))
    assert not build() and build()
    assert build(num_proc=1) and len(set(seen)) == 10


def test_a_killed_build_never_looks_complete(tmp_path, target, monkeypatch, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(4))
    prepare_data.prepare(path, tmp_path / "out", target)
    before = dataloader.open_data(tmp_path / "out")[1]
    monkeypatch.setattr(torch, "save", lambda *args: os._exit(9))  # in the middle of the next build
    if (child := os.fork()) == 0:
        prepare_data.prepare(path, tmp_path / "out", target, max_length=64)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert dataloader.open_data(tmp_path / "out")[1] == before
    monkeypatch.undo()
    prepare_data.prepare(path, tmp_path / "out", target, max_length=64)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "rows.jsonl"]


@pytest.mark.parametrize("name", ["data_config.json", "dataset_dict.json", "token_freq.pt", "train"])
def test_open_data_names_what_is_missing(name, tmp_path, target, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(2))
    prepare_data.prepare(path, tmp_path / "out", target)
    (tmp_path / "out" / name).rename(tmp_path / "elsewhere")
    assert f"{name} is missing" in tiny.fails(capsys, dataloader.open_data, tmp_path / "out")


def test_open_data_refuses_another_version(tmp_path, target, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(2))
    config = prepare_data.prepare(path, tmp_path / "out", target)
    (tmp_path / "out" / "data_config.json").write_text(json.dumps({**config, "format_version": 0}))
    assert "format version 0" in tiny.fails(capsys, dataloader.open_data, tmp_path / "out")
    (tmp_path / "out" / "data_config.json").write_text(json.dumps(config))
    assert "has no checksums, an earlier version" in tiny.fails(capsys, dataloader.open_data, tmp_path / "out")


def test_data_that_are_not_as_they_were_written_are_one_line_and_are_prepared_again(tmp_path, target, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(2))
    out = tmp_path / "out"
    prepare_data.prepare(path, out, target)

    def check():
        data, config = dataloader.open_data(out)
        dataloader.check_files(out, config)
        return data["train"][0]

    row = check()
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        content = file.read_bytes()
        middle = len(content) // 2
        flipped = bytes(byte ^ 1 for byte in content[middle : middle + 1])
        several = content[:middle] + flipped + content[middle + 1 :], content[:middle], b"", content + b"x", None
        for damaged in (one for one in several if one != content):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            line = tiny.fails(capsys, check)
            assert str(out) in line and "prepare_data.py" in line, file
            file.write_bytes(content)
    assert check() == row
    arrow = next((out / "train").glob("*.arrow"))
    content = arrow.read_bytes()
    arrow.write_bytes(content[:-1] + b"x")
    prepare_data.prepare(path, out, target)
    assert arrow.read_bytes() == content and check() == row


def test_an_empty_volume_is_filled_from_inside(tmp_path, target, capsys):
    """A mount point cannot be renamed; a fresh file system has lost+found."""
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(2))
    with tiny.small_disk(tmp_path / "volume", 4096) as (volume, _):
        (volume / "lost+found").mkdir()
        (volume / ".volume.building" / "new").mkdir(parents=True)  # of a program that was killed, as the next one
        (volume / "train").mkdir()
        (volume / "train" / "half").touch()
        prepare_data.prepare(path, volume, target)
        assert sorted(path.name for path in volume.iterdir()) == [
            "data_config.json", "dataset_dict.json", "lost+found", "rejected.jsonl", "token_freq.pt", "train",
        ]  # fmt: skip
        dataloader.check_files(volume, dataloader.open_data(volume)[1])
        prepare_data.prepare(path, volume, target)
        assert "reused" in capsys.readouterr().out
        line = tiny.fails(capsys, prepare_data.prepare, path, volume, target, max_length=64)
        assert "is a mount point with other data" in line


def test_complete_data_stay_if_they_cannot_be_renamed(tmp_path, target, monkeypatch, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(2))
    rename = Path.rename

    def busy(source, goal):
        if Path(goal).name == "out":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(source, goal)

    monkeypatch.setattr(Path, "rename", busy)
    line = tiny.fails(capsys, prepare_data.prepare, path, tmp_path / "out", target).rstrip()
    new = tmp_path / ".out.building" / "new"
    assert f"the complete data are in {new}, and the same command tries again" in line
    dataloader.check_files(new, dataloader.open_data(new)[1])
    monkeypatch.undo()
    monkeypatch.setattr(prepare_data, "build", None)  # nothing is built again
    prepare_data.prepare(path, tmp_path / "out", target)
    dataloader.check_files(tmp_path / "out", dataloader.open_data(tmp_path / "out")[1])
    assert not new.exists()


def test_earlier_data_are_put_back_if_new_ones_cannot_take_their_place(tmp_path, target, monkeypatch, capsys):
    """At once, or by the next start if the program was killed between the two renames."""
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(2))
    out = tmp_path / "out"
    before = prepare_data.prepare(path, out, target)["fingerprint"]
    rename = Path.rename

    def busy(source, goal):
        if source.name == "new":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(source, goal)

    monkeypatch.setattr(Path, "rename", busy)
    tiny.fails(capsys, prepare_data.prepare, path, out, target, max_length=64)
    assert dataloader.open_data(out)[1]["fingerprint"] == before
    monkeypatch.undo()
    out.rename(tmp_path / ".out.building" / "old")  # as if it was killed
    assert prepare_data.prepare(path, out, target, max_length=64)["fingerprint"] != before
    assert [entry.name for entry in tmp_path.iterdir() if "out" in entry.name] == ["out"]


def test_what_is_not_of_prepared_data_is_not_deleted(tmp_path, target, capsys):
    """A folder beside the data, as others keep hidden states there; a project with a file of that name."""
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(2))
    prepare_data.prepare(path, tmp_path / "out", target)
    (tmp_path / "out" / "hidden_states").mkdir()
    line = tiny.fails(capsys, prepare_data.prepare, path, tmp_path / "out", target, max_length=64)
    assert "holds hidden_states beside prepared data" in line and (tmp_path / "out" / "hidden_states").exists()
    (tmp_path / "project" / "src").mkdir(parents=True)
    (tmp_path / "project" / "data_config.json").write_text("{}")
    assert "holds src beside prepared data" in tiny.fails(
        capsys, prepare_data.prepare, path, tmp_path / "project", target
    )


def test_no_room_for_caches_is_one_line(tmp_path, target, monkeypatch, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(400))
    with tiny.small_disk(tmp_path / "home", 100) as (home, _):
        monkeypatch.setattr(dataloader.huggingface_hub.constants, "HF_HOME", str(home))
        line = tiny.fails(capsys, prepare_data.prepare, path, tmp_path / "out", target)
        assert str(home) in line and "No space left on device" in line
    with tiny.small_disk(tmp_path / "read", 100) as (home, _):
        subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
        monkeypatch.setattr(dataloader.huggingface_hub.constants, "HF_HOME", str(home))
        line = tiny.fails(capsys, prepare_data.prepare, path, tmp_path / "out", target)
        assert f"HF_HOME {home}" in line and "Read-only file system" in line
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["home", "read", "rows.jsonl"]


# ---------------------------------------------------------------------------- command line
def test_flags(capsys):
    argv = common.normalise_argv(["--a-b=c-d", "--x-y", "-1", "--old", "e-f"], {"old": "new"})
    assert argv == ["--a_b=c-d", "--x_y", "-1", "--new", "e-f"]
    required = ["--dataset", "a", "--target-model-path", "b", "--output_path", "c"]
    assert prepare_data.parse_args(required).train_only_last_turn is False
    for words, value in ((["--train-only-last-turn"], True), (["--train_only_last_turn", "False"], False)):
        assert prepare_data.parse_args(required + words).train_only_last_turn is value
    least = prepare_data.parse_args([*required, "--max_length", "2", "--num_samples", "1"])
    assert (least.max_length, least.num_samples, least.num_proc) == (2, 1, None)
    for words, message in (
        ([*required, "--train_only_last_turn", "maybe"], "'maybe' is neither true nor false"),
        ([*required, "--seed", "x"], "--seed"),
        ([*required, "--unknown"], "--unknown"),
        (["--dataset", "a"], "--target_model_path"),
        ([*required, "--max_length", "1"], "max_length is 1; it must be at least 2"),
        ([*required, "--num_samples", "0"], "num_samples is 0; it must be at least 1"),
        ([*required, "--num_proc", "-1"], "num_proc is -1; it must be at least 1"),
    ):
        assert message in tiny.fails(capsys, prepare_data.parse_args, words)


def test_write_atomic_replaces_the_whole_file(tmp_path):
    common.write_atomic(tmp_path / "a", "long text")
    common.write_atomic(tmp_path / "a", b"b")
    assert (tmp_path / "a").read_bytes() == b"b" and len(list(tmp_path.iterdir())) == 1
    assert common.hash_file(tmp_path / "a").startswith("3e23e816")


def test_command_line(tmp_path, target):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(20, turns=2))
    command = [sys.executable, "prepare_data.py", "--dataset", path, "--target-model-path", target]
    command += ["--output_path", tmp_path / "out", "--validation_ratio=0.2"]
    result = subprocess.run(command, cwd=tiny.REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "train: 16 rows" in result.stdout and "validation: 4 rows" in result.stdout
    assert "⟦" in result.stdout and "<|eot_id|>⟧" in result.stdout and "rejected: none" in result.stdout
    command[3] = tmp_path / "absent.jsonl"
    result = subprocess.run(command, cwd=tiny.REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1


def test_a_tokenizer_that_has_only_tiktokens_file_is_refused(tmp_path, capsys):
    """As in Kimi's repositories, of which transformers would make another tokenizer or none."""
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(b"IQ== 0\n")
    target_files.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert "is a tiktoken.model: add a tokenizer.json" in tiny.fails(capsys, target_files.load_tokenizer, tmp_path)
