"""Which tokens of each model family are supervised: templates and hand-marked texts lie in templates/."""

import copy
import functools
import json
import signal

import pytest

import prepare_data
from core import conversations, rendering
from helpers.chat_templates import CONVERSATIONS, FAMILIES, FOLDER, ROWS, expected, family_tokenizer, marked, names_of

# Names with the same markers, so that each fits where the other does.
ALIKE = [{"qwen", "qwen3-thinking", "qwen3-instruct"}, {"deepseek-r1-distill", "deepseek-v3"}]
CASES = [(family, name) for family in FAMILIES for name in names_of(family)]


@functools.cache
def tokenizer_of(family):
    return family_tokenizer(family)


def shown(row, chat):
    """As in templates/FAMILY.txt."""
    try:
        ids, mask, *_ = prepare_data.tokenise(json.dumps(row).encode(), chat)
    except conversations.Rejected as rejected:
        return f"rejected: {rejected.args[0]}"
    text = marked(ids, mask, chat.tokenizer)
    assert ids.tolist() == chat.tokenizer(text.translate({ord("⟦"): None, ord("⟧"): None}))["input_ids"]
    return text


@pytest.mark.parametrize(("family", "name"), CASES)
def test_supervised_tokens_by_hand(family, name):
    chat = prepare_data.make_chat(tokenizer_of(family), name, 4096, False)
    assert {conversation: shown(row, chat) for conversation, row in CONVERSATIONS.items()} == expected(family)


def test_every_name_has_a_family_with_several_turns_thoughts_and_calls():
    assert {name for _, name in CASES} == {*prepare_data.TEMPLATES, "auto"}
    for family in FAMILIES:
        texts = expected(family)
        assert set(texts) == set(CONVERSATIONS)
        assert texts["turns"].count("⟦") == 2 and "rejected" not in texts["thinking"] + texts["thinking in a field"]
    for (
        name
    ) in prepare_data.TEMPLATES:  # Phi 3 and Phi 4 know no tools, and R1's template none that transformers hands over
        texts = [expected(family)["a call"] for family in FAMILIES if name in names_of(family)]
        assert any(text.count("⟦") == 2 for text in texts) or name in ("phi3", "phi4", "deepseek-r1-distill")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_other_names_are_refused_and_the_right_ones_named(family, capsys):
    fitting = set(names_of(family)) - {"auto"}
    fitting = fitting.union(*(names for names in ALIKE if names & fitting))
    for name in prepare_data.TEMPLATES:
        if name in fitting:
            prepare_data.make_chat(tokenizer_of(family), name, 4096, False)
            continue
        with pytest.raises(SystemExit):
            prepare_data.make_chat(tokenizer_of(family), name, 4096, False)
        named = capsys.readouterr().err.rpartition("use --chat_template ")[2].split(" or ")
        assert {word.strip() for word in named} == fitting | {"auto"}


def test_the_name_turns_thinking_on_and_off():
    """A template that thinks on request only: qwen takes it as it is, the other two names ask for what they say."""
    tokenizer = family_tokenizer("qwen")
    asks = "enable_thinking is defined and enable_thinking is false"
    assert asks in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(asks, "not enable_thinking")
    row = CONVERSATIONS["thinking in a field"]
    for name, family in (("qwen", "qwen3-instruct"), ("qwen3-thinking", "qwen3-thinking")):
        assert (
            shown(row, prepare_data.make_chat(tokenizer, name, 4096, False)) == expected(family)["thinking in a field"]
        )


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("tagged", [False, True])
def test_a_thought_that_the_answer_says_again_stays(family, tagged):
    """Of one word, so that nothing else in the text holds it, and of one that stands in the answer."""

    def text(thought):
        fields = {"content": "the answer is four"} | ({} if tagged else {"reasoning_content": thought})
        fields["content"] = (f"<think>\n{thought}\n</think>\n\n" if tagged else "") + fields["content"]
        messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", **fields}]
        ids, mask, _, reasoning_lost = prepare_data.tokenise(json.dumps({"messages": messages}).encode(), chat)
        return marked(ids, mask, chat.tokenizer), reasoning_lost

    chat = prepare_data.make_chat(tokenizer_of(family), names_of(family)[0], 4096, False)
    (alone, reasoning_lost), again = text("zzyzx"), text("four")
    assert reasoning_lost == ("zzyzx" not in alone) and again == (alone.replace("zzyzx", "four"), reasoning_lost)


def test_no_file_of_the_folder_is_without_a_row():
    named = {f"{family}.txt" for family in ROWS} | {row["template"] for row in ROWS.values()}
    assert {path.name for path in FOLDER.iterdir()} == named | {"families.json", "conversations.json"}


def test_a_template_that_does_not_end_is_ended(monkeypatch, capsys):
    """On a plain conversation the program ends; on a row whose text it does not like, that row is rejected."""
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = copy.copy(tokenizer_of("qwen"))
    template = tokenizer.chat_template
    tokenizer.chat_template = endless
    with pytest.raises(SystemExit):
        prepare_data.make_chat(tokenizer, "auto", 4096, False)
    assert "TimeoutError: it takes longer than 0.3 s" in capsys.readouterr().err
    tokenizer.chat_template = "{% if 'slow' in messages[0].content %}" + endless + "{% endif %}" + template
    chat = prepare_data.make_chat(tokenizer, "auto", 4096, False)
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]}
        for text in ("quick", "slow")
    ]
    assert "b<|im_end|>⟧" in shown(rows[0], chat)
    assert shown(rows[1], chat) == "rejected: template error"
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
