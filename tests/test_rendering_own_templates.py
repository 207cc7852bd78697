"""Templates for tokenizers that have none: core/templates/NAME.jinja, chosen by --chat_template.

cases/own_templates.json: `chats`, messages and variables of the template, and what the `published` templates of
meta-llama/Llama-3.1-8B-Instruct (plain turns), Qwen/Qwen3-8B, openai/gpt-oss-20b and
deepseek-ai/DeepSeek-R1-Distill-Qwen-32B render them to; TODAY is the date.
"""

import datetime
import json
from argparse import Namespace
from pathlib import Path

import pytest

import prepare_data
from core import conversations, dataloader, prompts, rendering, setup
from helpers import tiny
from helpers.chat_templates import CONVERSATIONS, family_tokenizer, marked

TABLE = json.loads((Path(__file__).parent / "cases" / "own_templates.json").read_text())
NAMES = sorted(TABLE["published"])
FINAL = "<|channel|>final<|message|>"


def bare_tokenizer(family):
    tokenizer = family_tokenizer(family)
    tokenizer.chat_template = None
    return tokenizer


def write_bare(folder, family):
    bare_tokenizer(family).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def chat_of(family, name):
    return prepare_data.make_chat(bare_tokenizer(family), name, 4096, False)


def cause(row, chat):
    with pytest.raises(conversations.Rejected) as rejected:
        prepare_data.tokenise(json.dumps(row).encode(), chat)
    return rejected.value.args


@pytest.mark.parametrize("name", NAMES)
def test_it_renders_what_the_published_template_renders(name):
    tokenizer, missing = rendering.with_own_template(bare_tokenizer(name), name, prepare_data.TEMPLATES[name])
    assert not missing
    for about, chat in TABLE["chats"].items():
        text = rendering.render(tokenizer, chat["messages"], **chat["options"])
        assert text == TABLE["published"][name][about].replace("TODAY", datetime.date.today().isoformat()), about


def test_the_documented_names_have_one():
    assert {path.stem for path in rendering.OWN_TEMPLATES.iterdir()} == {*NAMES}
    assert {"llama3", "qwen", "gpt-oss", "deepseek-r1-distill"} == {*NAMES}


@pytest.mark.parametrize(
    ("name", "supervised"),
    [
        ("llama3", ["hello there<|eot_id|>", "that is all<|eot_id|>"]),
        ("qwen", ["hello there<|im_end|>", "<think>\n\n</think>\n\nthat is all<|im_end|>"]),
        ("gpt-oss", [f"{FINAL}hello there<|end|>", f"{FINAL}that is all<|return|>"]),
        ("deepseek-r1-distill", ["hello there<｜end▁of▁sentence｜>", "that is all<｜end▁of▁sentence｜>"]),
    ],
)
def test_replies_are_supervised_and_tools_refused(name, supervised):
    chat = chat_of(name, name)
    ids, mask, *_ = prepare_data.tokenise(json.dumps(CONVERSATIONS["turns"]).encode(), chat)
    assert [part.split("⟧")[0] for part in marked(ids, mask, chat.tokenizer).split("⟦")[1:]] == supervised
    assert cause(CONVERSATIONS["tools"], chat)[0] == "tools left out"
    assert cause(CONVERSATIONS["a call"], chat)[0] in ("template error", "calls left out")
    turns = CONVERSATIONS["turns"]["messages"]
    output = {"messages": [*turns[:3], {"role": "tool", "content": "out"}, turns[2]]}
    assert cause(output, chat)[0] == "template error"


def test_a_name_that_cannot_be_used_is_rejected_with_what_can():
    row = CONVERSATIONS["turns"]
    none = "no chat template in the tokenizer"
    assert cause(row, chat_of("qwen", "llama3")) == (
        none,
        "and the markers of llama3 do not fit: it has no token <|eot_id|>",
    )
    for name in ("phi3", "auto"):
        given, detail = cause(row, chat_of("phi3", name))
        assert given == none and f"none for {name} in core/templates" in detail and ", ".join(NAMES) in detail
    tokens = {"input_ids": [9, 9], "loss_mask": [0, 1]}  # needs no template
    assert len(prepare_data.tokenise(json.dumps(tokens).encode(), chat_of("phi3", "phi3")).ids) == 2


def test_a_template_of_the_tokenizer_stays():
    tokenizer = family_tokenizer("qwen")
    assert prepare_data.make_chat(tokenizer, "qwen", 4096, False).tokenizer is tokenizer


def test_prepared_data_know_their_template(tmp_path, monkeypatch, capsys):
    target = write_bare(tmp_path / "target", "qwen")
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(4))

    def prepare():
        return prepare_data.prepare(rows, tmp_path / "data", target, chat_template="qwen", num_proc=1)["fingerprint"]

    first = prepare()
    assert "rows are rendered with core/templates/qwen.jinja" in capsys.readouterr().out
    assert prepare() == first and "reused" in capsys.readouterr().out
    changed = tmp_path / "templates"
    changed.mkdir()
    text = (rendering.OWN_TEMPLATES / "qwen.jinja").read_text()
    (changed / "qwen.jinja").write_text(text.replace("<|im_end|>", " <|im_end|>"))
    monkeypatch.setattr(rendering, "OWN_TEMPLATES", changed)
    assert prepare() != first

    data, config = dataloader.open_data(tmp_path / "data")

    def check(name):
        flags = {"target_model_path": str(target), "trust_remote_code": False, "max_length": 2048, "total_seq_len": 0}
        setup.check_data(Namespace(chat_template=name, **flags), {"vocab_size": 400}, "data", data, config, 1)

    for name in (None, "auto", "qwen"):
        check(name)
    for name in ("llama3", "qwen3-instruct", "vicuna"):
        with pytest.raises(SystemExit):
            check(name)
        assert f"data was prepared with --chat_template qwen, not {name}: prepare it again" in capsys.readouterr().err


def test_prompts_of_an_evaluation_take_the_named_template(tmp_path, capsys):
    tokenizer = bare_tokenizer("llama3")
    path = tiny.write_jsonl(tmp_path / "prompts.jsonl", [CONVERSATIONS["turns"]])
    named, _ = rendering.with_own_template(tokenizer, "llama3", prepare_data.TEMPLATES["llama3"])
    (prompt,) = prompts.read_prompts(path, named)
    assert named.decode(prompt.ids).endswith("and?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    with pytest.raises(SystemExit):
        prompts.read_prompts(path, tokenizer)
    assert "no chat template in the tokenizer: name one with --chat_template" in capsys.readouterr().err
