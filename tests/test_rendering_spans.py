"""What is supervised against a statement of its own: the replies as the row has them, without the program's spans.

The supervised runs are decoded and compared with the replies, stripped as the family's template strips, with the end
marker after them. The conversations are made of pieces that real chats have: blanks at the borders, code, other
languages, emoji, markup, words that look like roles and thoughts.
"""

import functools
import itertools
import json
import random

import pytest

import prepare_data
from helpers.chat_templates import family_tokenizer, names_of


def as_it_is(text):
    return text


def without_first_newlines(text):
    return text.lstrip("\n")


# family: what stands before a reply, before the last one, the end of a reply, of the last one, how it is stripped
FINAL = "<|channel|>final<|message|>"
EOS = "<｜end▁of▁sentence｜>"
FAMILIES = {
    "llama3": ("", "", "<|eot_id|>", "<|eot_id|>", str.strip),
    "llama4": ("", "", "<|eot|>", "<|eot|>", as_it_is),
    "qwen": ("", "<think>\n\n</think>\n\n", "<|im_end|>", "<|im_end|>", without_first_newlines),
    "qwen3-instruct-2507": ("", "", "<|im_end|>", "<|im_end|>", as_it_is),
    "gpt-oss": (FINAL, FINAL, "<|end|>", "<|return|>", as_it_is),
    "deepseek-v3": ("", "", EOS, EOS, as_it_is),
    "deepseek-r1-distill": ("", "", EOS, EOS, as_it_is),
    "gemma-3": ("", "", "<end_of_turn>", "<end_of_turn>", str.strip),
    "phi4": ("", "", "<|im_end|>", "<|im_end|>", as_it_is),
}

PIECES = [
    " ", "\n", "\n\n", "  \t", "assistant\n", "user: ", "</s>", "<br>", "&amp;", "```python\nif x:\n    pass\n```",
    "naïve ", "日本語", "👩‍👩‍👧", "é", "\u00a0", "\u2028", "1. ", "| a | b |", "{{ x }}", "{% if %}", "[INST] ", "###",
    "<thinking>", "the end", "\r\n", "\\n", '"quoted"', "I am. ", "ok",
]  # fmt: skip


def conversations(count):
    """[[question, reply, ...], ...]; no text is blank."""
    dice = random.Random(14)

    def text():
        return "".join(dice.choices(PIECES, k=dice.randint(1, 12))) + dice.choice(["x", "x ", "x\n", "x\r\n\n"])

    return [[text() for _ in range(2 * dice.randint(1, 4))] for _ in range(count)]


@functools.cache
def chat_of(family):
    return prepare_data.make_chat(family_tokenizer(family), names_of(family)[0], 100_000, False)


def supervised_runs(ids, mask, tokenizer):
    runs = []
    for is_supervised, tokens in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        if is_supervised:
            runs.append(tokenizer.decode([token for token, _ in tokens]))
    return runs


@pytest.mark.parametrize("family", FAMILIES)
def test_supervised_runs_are_the_replies(family):
    before, before_last, end, end_of_last, strip = FAMILIES[family]
    chat = chat_of(family)
    for texts in conversations(25):
        turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
        ids, mask, *_ = prepare_data.tokenise(json.dumps({"conversations": turns}).encode(), chat)
        replies = [strip(text) for text in texts[1::2]]
        expected = [before + reply + end for reply in replies[:-1]] + [before_last + replies[-1] + end_of_last]
        assert supervised_runs(ids, mask, chat.tokenizer) == expected
