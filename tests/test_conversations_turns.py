"""What one row means: which text of it is supervised, or why it is rejected.

cases/turns.jsonl, a row a line: `about`; `supervised`, {family of templates/: the texts of its supervised runs}, or
`cause` and a part of the `detail` for each of the `families`; `prompt`: text that stands there unsupervised; `missing`:
text that does not.
"""

import functools
import json
import random
from pathlib import Path

import pytest

import prepare_data
from core import conversations
from helpers.chat_templates import family_tokenizer, marked, names_of

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases" / "turns.jsonl").read_text().split("\n") if line]


@functools.cache
def chat_of(family, only_last=False):
    return prepare_data.make_chat(family_tokenizer(family), names_of(family)[0], 4096, only_last)


def read(row, chat):
    """(supervised runs, the rest of the text)."""
    ids, mask, *_ = prepare_data.tokenise(json.dumps(row).encode(), chat)
    first, *parts = marked(ids, mask, chat.tokenizer).split("⟦")
    runs, rest = zip(*(part.split("⟧") for part in parts), strict=True)
    return list(runs), "\0".join([first, *rest])


@pytest.mark.parametrize("case", CASES, ids=[case["about"] for case in CASES])
def test_a_row_is_read_as_it_was_meant_or_rejected(case):
    for family in case.get("families", ()):
        with pytest.raises(conversations.Rejected) as rejected:
            read(case["row"], chat_of(family))
        cause, detail = rejected.value.args
        assert cause == case["cause"] and case.get("detail", "") in str(detail), family
    for family, expected in case.get("supervised", {}).items():
        runs, rest = read(case["row"], chat_of(family))
        assert runs == expected, family
        assert case.get("prompt", "") in rest
        assert "missing" not in case or case["missing"] not in rest


def test_every_case_says_what_it_expects():
    assert all(("supervised" in case) != ("cause" in case and bool(case["families"])) for case in CASES)
    assert len(CASES) > 80


def test_only_the_last_reply_which_is_not_to_be_trained():
    rows = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}] * 2
    chat = chat_of("llama3", only_last=True)
    assert read({"messages": rows}, chat)[0] == ["good<|eot_id|>"]
    with pytest.raises(conversations.Rejected, match="not to be trained"):
        read({"messages": [*rows[:3], {**rows[3], "weight": 0}]}, chat)


VALUES = [None, "", " ", "x", "[]", "{}", "null", 0, 1.5, True, [], {}, [1], [{}], ["x"], {"a": 1}, [[{"type": []}]]]


def spoiled(value, dice):
    """The value with something in it replaced, removed or moved."""
    if isinstance(value, dict) and value and dice.random() < 0.8:
        key = dice.choice(list(value))
        if dice.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: spoiled(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.8:
        place = dice.randrange(len(value))
        return [*value[:place], spoiled(value[place], dice), *value[place + 1 :]]
    return dice.choice(VALUES)


def test_a_spoiled_row_is_read_or_rejected_and_never_ends_the_program():
    dice = random.Random(0)
    chat = chat_of("qwen")
    rejected = 0
    for _ in range(1500):
        row = spoiled(dice.choice(CASES)["row"], dice)
        try:
            prepare_data.tokenise(json.dumps(row).encode(), chat)
        except conversations.Rejected as error:
            rejected += 1
            assert all(error.args[:1]) and len(error.args) == 2
    assert 300 < rejected < 1400
