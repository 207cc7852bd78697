"""Prompts of benchmarks: several turns, categories, HumanEval, local copies in the hub's own layout."""

import gzip
import json

import pytest

import evaluate_draft
from core import common, decoding, prompts
from helpers import tiny
from helpers.chat_templates import family_tokenizer

MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Make it shorter."]},
    {"question_id": 82, "category": "writing", "turns": ["Write a letter.", "To whom?"]},
    {"question_id": 101, "category": "math", "turns": ["What is 2 + 2?", "And 3 + 3?"], "reference": ["4", "6"]},
]
HUMANEVAL = [{"task_id": "HumanEval/0", "prompt": "def f(x):\n", "entry_point": "f", "test": "assert f(1)"}]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def asked(tokenizer, *turns):
    """Ids of a conversation of questions and replies in turn, with the header of the next reply."""
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_second_turn_follows_the_given_reply(tmp_path, tokenizer):
    path = tiny.write_jsonl(tmp_path / "mt_bench.jsonl", MT_BENCH)
    first, *_, last = prompts.read_prompts(path, tokenizer)
    assert first.ids == asked(tokenizer, "Write a poem.") and (first.category, first.turn) == ("writing", 1)
    end = tokenizer.eos_token_id
    second = first.following([*tokenizer("Roses are red.", add_special_tokens=False)["input_ids"], end])
    assert second.ids == asked(tokenizer, "Write a poem.", "Roses are red.", "Make it shorter.")
    assert (second.category, second.turn, second.following([end])) == ("writing", 2, None)
    assert last.category == "math" and last.following([end]).ids == asked(tokenizer, "What is 2 + 2?", "", "And 3 + 3?")


def test_a_reply_in_channels_and_one_that_is_cut_inside_a_character(tokenizer):
    renderer = prompts.Renderer(family_tokenizer("gpt-oss"))
    reply = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
    assert renderer.answer(renderer.tokenizer(reply)["input_ids"]) == "Yes."
    renderer = prompts.Renderer(tokenizer)
    ids = tokenizer("so \U0001f30a", add_special_tokens=False)["input_ids"]
    assert renderer.answer(ids) == "so \U0001f30a" and renderer.answer(ids[:-1]) == "so "


def test_a_limit_takes_from_each_category_in_turn(tmp_path, tokenizer):
    path = tiny.write_jsonl(tmp_path / "mt_bench.jsonl", MT_BENCH)
    found = prompts.read_prompts(path, tokenizer, limit=2)
    assert [prompt.category for prompt in found] == ["writing", "math"]
    without = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(4)]
    path = tiny.write_jsonl(tmp_path / "plain.jsonl", without)
    found = prompts.read_prompts(path, tokenizer, limit=2)
    assert [prompt.ids for prompt in found] == [asked(tokenizer, "0"), asked(tokenizer, "1")]


def test_benchmarks_by_name_from_local_copies(tmp_path, tokenizer):
    """The hub's layout, or a file alone."""
    tiny.write_jsonl(tmp_path / "test.jsonl", [{"problem": "1 + 1", "solution": "2", "subject": "Algebra"}])
    found = prompts.read_prompts("math500", tokenizer, dataset_path=str(tmp_path))
    assert [(prompt.ids, prompt.category) for prompt in found] == [(asked(tokenizer, "1 + 1"), "Algebra")]

    (tmp_path / "alpaca_data.json").write_text(
        json.dumps([{"instruction": "Sort.", "input": "b a", "output": "a b"}, {"instruction": "Hi", "input": ""}])
    )
    found = prompts.read_prompts("alpaca", tokenizer, dataset_path=str(tmp_path))
    assert [prompt.ids for prompt in found] == [asked(tokenizer, "Sort.\n\nb a"), asked(tokenizer, "Hi")]

    zipped = tmp_path / "HumanEval.jsonl.gz"
    zipped.write_bytes(gzip.compress(json.dumps(HUMANEVAL[0]).encode() + b"\n"))
    for found in (
        prompts.read_prompts("humaneval", tokenizer, dataset_path=str(tmp_path)),
        prompts.read_prompts("humaneval", tokenizer, dataset_path=str(zipped)),
        prompts.read_prompts(zipped, tokenizer),
    ):
        assert [prompt.ids for prompt in found] == [asked(tokenizer, "def f(x):\n")]

    hub_row = {"prompt": MT_BENCH[0]["turns"], "category": "writing", "prompt_id": 1, "reference": []}
    (tmp_path / "raw").mkdir()
    tiny.write_jsonl(tmp_path / "raw" / "question.jsonl", [hub_row])
    (by_name,) = prompts.read_prompts("mt_bench", tokenizer, dataset_path=str(tmp_path))
    (by_file,) = prompts.read_prompts(tmp_path / "raw" / "question.jsonl", tokenizer)
    assert by_name == by_file and by_name.questions == ["Make it shorter."]


def test_benchmarks_are_downloaded_by_their_hub_ids(tmp_path, tokenizer, monkeypatch):
    asked_for = []

    def download(repository, patterns, kind, *_):
        asked_for.append((repository, kind))
        (tmp_path / "data").mkdir(exist_ok=True)
        tiny.write_jsonl(tmp_path / "question.jsonl", MT_BENCH)
        return tmp_path

    monkeypatch.setattr(common, "download", download)
    assert len(prompts.read_prompts("mt_bench", tokenizer)) == 3
    assert asked_for == [("HuggingFaceH4/mt_bench_prompts", "dataset")]


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("mt_bench", {"prompt_column": "turns"}, "prompt_column turns: mt_bench is a benchmark"),
        ("mt_bench", {"dataset_path": "."}, "preset mt_bench: no data/train-*.parquet or raw/question.jsonl or "),
        ("rows.jsonl", {"dataset_path": "copy"}, "dataset_path copy: rows.jsonl is no benchmark with a name: drop it"),
        ("turns.jsonl", {}, "line 1 of turns.jsonl is not a prompt: malformed questions"),
    ],
)
def test_what_is_no_benchmark_ends_with_one_line(name, flags, words, tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(tmp_path / "rows.jsonl", MT_BENCH)
    tiny.write_jsonl(tmp_path / "turns.jsonl", [{"turns": ["", 3]}])
    with pytest.raises(SystemExit) as stop:
        prompts.read_prompts(name, tokenizer, **flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_every_turn_is_measured_behind_the_targets_own_reply(monkeypatch, tokenizer, tmp_path):
    path = tiny.write_jsonl(tmp_path / "mt_bench.jsonl", MT_BENCH)
    found = prompts.read_prompts(path, tokenizer)
    own = tokenizer("Four.", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(decoding, "generate", lambda *_: own)
    monkeypatch.setattr(decoding, "speculate", lambda *_: (own, [1]))
    args = evaluate_draft.parse_args(["--target_model_path", "t", "--prompts", "mt_bench", "--num_draft_tokens", "7"])
    rows = evaluate_draft.measure(None, None, None, found, args, set())
    assert [(row["category"], row["turn"]) for row in rows] == [
        (category, turn) for category in ("writing", "writing", "math") for turn in (1, 2)
    ]
    assert rows[5]["input_ids"] == asked(tokenizer, "What is 2 + 2?", "Four.", "And 3 + 3?") + own
    figures = evaluate_draft.summarise(rows, args)
    assert {name: group["prompts"] for name, group in figures["by_category"].items()} == {"writing": 4, "math": 2}
    assert {turn: group["prompts"] for turn, group in figures["by_turn"].items()} == {1: 3, 2: 3}
