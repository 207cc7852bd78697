"""Replies of the target in this process: its own greedy text, lengths, faults, interruptions, kills, several ranks."""

import contextlib
import copy
import dataclasses
import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.llama import modeling_llama

import prepare_data
from core import conversations, local_replies, regeneration, rejected_rows, target_files
from helpers import tiny
from helpers.chat_templates import family_tokenizer

LIMIT = 12  # tokens of a reply
CONTEXT = 512  # of the tiny target


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A target, in fp32, whose replies end after a few tokens, some of them."""
    folder = tiny.write_target(tmp_path_factory.mktemp("local") / "target")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][4] *= 1.8
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def chat(target):
    return prepare_data.make_chat(target_files.load_tokenizer(target), "auto", 2048, False)


@pytest.fixture
def asked(monkeypatch):
    """The prompts that the target was asked for, in this process."""
    prompts = []
    original = local_replies.LocalTarget.generate

    def generate(self, ids, max_tokens):
        prompts.append(tuple(ids))
        return original(self, ids, max_tokens)

    monkeypatch.setattr(local_replies.LocalTarget, "generate", generate)
    return prompts


def command(target, path, output, **options):
    options = {"regenerate_temperature": 0, "regenerate_max_tokens": LIMIT, "max_rejected_ratio": 1, **options}
    words = ["--dataset", path, "--target_model_path", target, "--output_path", output, "--regenerate", "local"]
    return [*map(str, words), *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


def prepare(*given, **options):
    return prepare_data.main(prepare_data.parse_args(command(*given, **options)))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(target, chat, rows, path, **options):
    """The rows of the file that one pass over these conversations gives."""
    raw = [json.dumps(row).encode() for row in rows]
    given = {"max_tokens": LIMIT, "temperature": 0.0, "concurrency": 4, **options}
    answers = regeneration.Answers(path.parent, regeneration.Settings(**given), str(target), chat)
    regeneration.answer_rows(list(range(1, len(raw) + 1)), raw.__getitem__, path, answers)
    return read(path)


def last_words(capsys, *given, **options):
    """The line that answering ends with, behind the bar of loading."""
    with pytest.raises(SystemExit) as stop:
        answer(*given, **options)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def long_question(chat, word):
    """A question whose prompt leaves room for less than LIMIT tokens."""
    text = word
    while True:
        messages = [{"role": "user", "content": text}]
        prompt = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if len(prompt) >= CONTEXT - LIMIT // 2:
            return text
        text += f" {word}"


def own_conversation(model, tokenizer, messages):
    """Roles and contents as transformers' plain `generate` gives them, prompt by prompt, until one is cut."""
    said = []
    for message in messages:
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
            options = {"do_sample": False, "max_new_tokens": min(LIMIT, CONTEXT - len(prompt)), "pad_token_id": 4}
            reply = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
            content = tokenizer.decode(reply, skip_special_tokens=True)
            if reply[-1] != 4:
                content = content.rstrip("\ufffd")  # of a character that is cut
            if content.strip():
                said.append({"role": "assistant", "content": content})
            if reply[-1] != 4 or not content.strip():
                break
            continue
        said.append({"role": message["role"], "content": message["content"]})
    while said and said[-1]["role"] != "assistant":
        said.pop()
    return said


def test_answers_are_the_targets_own_greedy_text(target, chat, asked, tmp_path, capsys):
    rows = tiny.conversations(12, turns=3)
    rows[3]["conversations"][0]["content"] = "word " * CONTEXT
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    for word in ("word", "quick", "fox", "dog", "lazy", "what"):  # until it replies with a character
        rows[4]["conversations"][0]["content"] = long_question(chat, word)
        if own_conversation(model, chat.tokenizer, rows[4]["conversations"]):
            break
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    prepare(target, path, tmp_path / "out", regenerate_concurrency=5)
    found = read(tmp_path / "out.answers" / "train.jsonl")
    turns = 0
    for row, answer in zip(rows, found, strict=True):
        if row is rows[3]:
            cause, detail = answer["rejected_for"]
            assert cause == local_replies.TOO_LONG and f"there is room for {CONTEXT}" in detail
            continue
        own = own_conversation(model, chat.tokenizer, row["conversations"])
        given = answer.get("messages", [])
        assert [(message["role"], message["content"]) for message in given] == [
            (message["role"], message["content"]) for message in own
        ]
        turns += len(own) // 2
        if row is rows[4]:
            assert own[-1]["content"] and len(own) == 2
    assert turns > len(rows), "more than one reply in a conversation"
    assert any(row["messages"][-1].get("cut") for row in found if "messages" in row)
    assert len(asked) == len(set(asked)) and "tokens answered in" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "data_config.json").read_text())
    assert config["splits"]["train"]["rejected"][local_replies.TOO_LONG] == 1


def test_what_max_length_would_cut_off_is_not_generated(target, chat, tmp_path, monkeypatch):
    """A conversation ends with the last reply that begins within max_length, and that reply ends there."""
    rows = tiny.conversations(6, turns=3)
    whole = answer(target, chat, rows, tmp_path / "whole.jsonl")
    lengths = [len(chat.tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in whole]
    limit = max(lengths) - LIMIT
    prompts = []
    original = local_replies.LocalTarget.generate

    def generate(self, ids, max_tokens):
        assert len(ids) + max_tokens <= limit
        prompts.append(len(ids))
        return original(self, ids, max_tokens)

    monkeypatch.setattr(local_replies.LocalTarget, "generate", generate)
    short = answer(target, dataclasses.replace(chat, max_length=limit), rows, tmp_path / "short.jsonl")
    for row, complete in zip(short, whole, strict=True):
        said = [message["content"] for message in row["messages"]]
        own = [message["content"] for message in complete["messages"]]
        assert said[:-1] == own[: len(said) - 1] and own[len(said) - 1].startswith(said[-1])
    assert short != whole
    limit = min(prompts)
    none = answer(target, dataclasses.replace(chat, max_length=limit), rows, tmp_path / "none.jsonl")
    assert rejected_rows.BEYOND in {row["rejected_for"][0] for row in none if "rejected_for" in row}


def test_answers_of_other_ranks_that_were_interrupted_count(target, chat, asked, tmp_path):
    rows = tiny.conversations(6)
    undisturbed = answer(target, chat, rows, tmp_path / "one.jsonl")
    for name, numbers in (("train", [1]), ("train.rank1", [3, 2]), ("train.rank12", [6])):
        lines = "".join(json.dumps(undisturbed[number - 1]) + "\n" for number in numbers)
        (tmp_path / f"{name}.jsonl").write_text(lines + '{"row": 4, "mess')
    asked.clear()
    assert answer(target, chat, rows, tmp_path / "train.jsonl") == undisturbed and len(asked) == 2
    assert not list(tmp_path.glob("*rank*"))


def test_rows_are_divided_among_ranks():
    rows = [(number, b"") for number in range(7)]
    shares = regeneration.split_rows(regeneration.Share(None, None, iter(rows), 7), 3)
    assert [share.count for share in shares] == [3, 2, 2]
    assert sorted(row for share in shares for row in share.rows) == rows


def test_share_without_rows_is_done_at_once(tmp_path, capsys):
    """Of a rank, where fewer rows are left than there are ranks."""
    shares = regeneration.split_rows(regeneration.Share(None, None, iter([(1, b"")]), 1), 2)
    assert [share.count for share in shares] == [1, 0]
    answers = SimpleNamespace(open_target=contextlib.nullcontext, settings=regeneration.Settings())
    regeneration.answer_share(dataclasses.replace(shares[1], answers=answers, path=tmp_path / "train.jsonl"), before=3)
    assert "train: 0 tokens answered in 0 s, 0 a second" in capsys.readouterr().out


def test_sampling_is_the_targets_own_unless_a_temperature_is_given(target, chat, tmp_path):
    """With top_k 1 in its generation_config.json, sampling at any temperature says the likeliest."""
    rows = tiny.conversations(4)
    config = target / "generation_config.json"
    stored = json.loads(config.read_text())
    found = {}
    try:
        for top_k in (1, 400):
            config.write_text(json.dumps(stored | {"do_sample": True, "temperature": 9.0, "top_k": top_k}))
            found[top_k] = answer(target, chat, rows, tmp_path / f"{top_k}.jsonl", temperature=None)
    finally:
        config.write_text(json.dumps(stored))
    assert found[1] == answer(target, chat, rows, tmp_path / "greedy.jsonl") != found[400]
    sampling = GenerationConfig(do_sample=True, temperature=9.0, top_k=7, eos_token_id=3)
    for temperature, wanted in ((None, (True, 9.0)), (0.0, (False, 9.0)), (0.5, (True, 0.5))):
        own = copy.deepcopy(sampling)
        local_replies.set_sampling(own, chat.tokenizer, temperature)
        assert (own.do_sample, own.temperature) == wanted and own.top_k == 7
        assert own.eos_token_id == [3, chat.tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("problem", "words"), [(RuntimeError("out of memory\nand more"), "out of memory"), (MemoryError(), "MemoryError")]
)
def test_a_target_that_fails_ends_it_and_what_it_answered_is_kept(
    problem, words, target, chat, tmp_path, monkeypatch, capsys
):
    rows = tiny.conversations(12)
    path = tmp_path / "train.jsonl"
    original = modeling_llama.LlamaModel.forward
    forwards = []

    def forward(self, *args, **options):
        forwards.append(1)
        if len(forwards) > 40:
            raise problem
        return original(self, *args, **options)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    error = last_words(capsys, target, chat, rows, path, concurrency=2)
    assert f"the target does not generate any more: {words};" in error
    count = len(read(path))
    assert f"{count} of 12 rows are there, the same command goes on" in error and 0 < count < 12
    monkeypatch.undo()
    assert len(answer(target, chat, rows, path)) == 12


def test_a_reply_that_fails_alone_is_not_waited_for():
    """transformers may give a request up without an end of the generation."""
    outputs = [SimpleNamespace(request_id="1", error="no room\nat all"), None]
    status = SimpleNamespace(fatal_error=None)
    manager = SimpleNamespace(background_thread_status=status, get_result=lambda timeout: outputs.pop(0))
    future = Future()
    target = SimpleNamespace(closed=Event(), manager=manager, waiting={"1": future})
    future.add_done_callback(lambda _: target.closed.set())
    local_replies.LocalTarget.deliver(target)
    with pytest.raises(local_replies.GenerationFailed, match="does not generate any more: no room$"):
        future.result(0)


def test_a_target_that_cannot_be_batched_is_one_line(target, chat, tmp_path, monkeypatch, capsys):
    given = target, chat, tiny.conversations(1), tmp_path / "a.jsonl"
    error = last_words(capsys, *given, concurrency=10**8)
    assert "error: regenerate local: no memory for the cache of 100000000 conversations" in error
    monkeypatch.setattr(local_replies, "PAGE", 2)  # stands for what transformers refuses
    error = last_words(capsys, *given)
    assert f"transformers cannot batch the target {target}: ValueError: page_size must be" in error


def test_flags_without_effect_and_answers_from_elsewhere_are_refused(target, tmp_path, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(2))
    for options, words in (
        (
            {"regenerate_retries": 2, "regenerate_model": "m"},
            "regenerate_model, regenerate_retries: without effect with",
        ),
        ({"regenerate_endpoint": "http://x"}, "regenerate local and regenerate_endpoint: give one of them"),
    ):
        assert words in tiny.fails(capsys, prepare, target, path, tmp_path / "out", **options)
    assert not (tmp_path / "out.answers").exists()
    prepare(target, path, tmp_path / "out")
    about = tmp_path / "out.answers" / "train.about.json"
    assert json.loads(about.read_text())["regenerate"] == "local"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        prepare(target, path, tmp_path / "out", regenerate_max_tokens=5)
    assert f"max_tokens {LIMIT}, now 5" in capsys.readouterr().err
    served = regeneration.Settings(endpoint="http://x", model=str(target), temperature=0.0, max_tokens=LIMIT)
    inputs = {"train": json.loads(about.read_text())["input"]}
    with pytest.raises(SystemExit):
        regeneration.open_answers(served, target, tmp_path / "out", inputs)
    assert "its answers are of regenerate local, now None" in capsys.readouterr().err


# --- what the text of a reply holds ---


def ask(*given, **options):
    """The choice of `complete`, and the prompt."""
    answer, prompt = answer_of(*given, **options)
    return answer["choices"][0], prompt


def complete(*given):
    return answer_of(*given)[0]


def answer_of(reply, messages, tools=None, cut=0, **options):
    """The chat completion of a Qwen target that says these words but for the last `cut` tokens, and its prompt."""
    tokenizer = family_tokenizer("qwen", **options)
    chat = prepare_data.make_chat(tokenizer, "auto", 2048, False)
    prompts = []

    def generate(ids, max_tokens):
        prompts.append(tokenizer.decode(ids))
        ids = tokenizer(reply)["input_ids"]
        return ids[: len(ids) - cut]

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[end]))
    local = SimpleNamespace(chat=chat, context=CONTEXT, max_tokens=100, manager=ends, generate=generate)
    return local_replies.LocalTarget.ask(local, 1, messages, tools), prompts[0]


USER = {"role": "user", "content": "add"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_calls_in_the_text_are_read_and_those_of_the_history_are_shown():
    choice, prompt = ask(f"Well.\n{CALL}<|im_end|>", [USER], TOOLS)
    assert choice["message"]["content"] == "Well." and choice["finish_reason"] == "stop"
    assert conversations.read_calls(choice["message"])[0]["function"] == {"name": "add", "arguments": {"a": 1}}
    calls = regeneration.to_wire([{"role": "assistant", "content": None, **choice["message"]}])
    _, prompt = ask("2<|im_end|>", [USER, *calls, {"role": "tool", "content": "out", "tool_call_id": "call_0"}], TOOLS)
    assert '"arguments": {"a": 1}' in prompt and "out" in prompt
    for text, tools in (
        (CALL, None),
        ("<tool_call>{no JSON}</tool_call>", TOOLS),
        ("<tool_call>[1]</tool_call>", TOOLS),
    ):
        choice, _ = ask(f"{text}<|im_end|>", [USER], tools)
        assert choice["message"] == {"role": "assistant", "content": text}


def test_a_reply_without_its_end_is_cut():
    choice, _ = ask("and so", [USER])
    assert choice["finish_reason"] == "length"


def test_a_reply_cut_inside_a_character_ends_before_it():
    """The tokens are bytes, of which this character has four."""
    choice, _ = ask("so \U0001f30a", [USER], cut=1)
    assert choice == {"message": {"role": "assistant", "content": "so "}, "finish_reason": "length"}


@pytest.mark.parametrize("name", ["5", '"other"'])
def test_a_call_that_is_not_the_rows_ends_the_conversation(name):
    """Also one without a name: the replies so far are kept."""
    reply = f'<tool_call>{{"name": {name}, "arguments": {{}}}}</tool_call><|im_end|>'
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [USER, {"role": "assistant", "content": "Sure."}, USER, {"role": "assistant", "tool_calls": [call]}]
    row = {
        "messages": [*messages, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "2"}],
        "tools": TOOLS,
    }
    said = iter(["Yes.<|im_end|>", reply])
    answered, _ = regeneration.answer_row(json.dumps(row).encode(), lambda *given: complete(next(said), *given), "keep")
    assert [message["role"] for message in answered["messages"]] == ["user", "assistant"] * 2
    assert answered["messages"][1]["content"] == "Yes."


# --- kill -9, and several ranks ---

ALONE = """
import json, sys
from pathlib import Path
import prepare_data
from core import local_replies, ranks
asked, words = Path(sys.argv[1]), sys.argv[2:]
original = local_replies.LocalTarget.generate

def generate(self, ids, max_tokens):
    with asked.open("a") as file:
        file.write(json.dumps(ids) + chr(10))
    return original(self, ids, max_tokens)

local_replies.LocalTarget.generate = generate
ranks.run_watched(prepare_data.main, prepare_data.parse_args(words))
"""


def start(world, asked, words):
    """The processes of `world` ranks."""
    port = tiny.free_port()
    processes = []
    for rank in range(world):
        own = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = tiny.environment(**(own if world > 1 else {}))
        command = [sys.executable, "-c", ALONE, str(asked), *words]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=tiny.REPOSITORY, env=variables, **pipes))
    return processes


def size(path):
    """Bytes of the answers of all ranks."""
    return sum(file.stat().st_size for file in path.parent.glob("train*.jsonl"))


@pytest.mark.slow
def test_killed_on_one_rank_and_on_two_it_neither_loses_nor_repeats_a_row(target, chat, tmp_path):
    """kill -9 at five moments, four on one rank and one on two; two ranks then finish it."""
    rows = tiny.conversations(60)
    source = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    undisturbed = answer(target, chat, rows, tmp_path / "undisturbed.jsonl")
    asked = tmp_path / "asked"
    path = tmp_path / "out.answers" / "train.jsonl"
    words = command(target, source, tmp_path / "out", regenerate_concurrency=2)
    for world in (1, 1, 1, 1, 2):
        before = size(path)
        processes = start(world, asked, words)
        deadline = time.monotonic() + 200
        while size(path) < before + 400:
            assert time.monotonic() < deadline and processes[0].poll() is None, processes[0].stderr.read()
            time.sleep(0.01)
        for process in processes:
            process.kill()
            process.wait()
    done = size(path)
    processes = start(2, asked, words)
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert done < size(path) and read(path) == undisturbed
    prompts = Counter(asked.read_text().splitlines())
    assert len(prompts) == 60 and sum(prompts.values()) <= 60 + (4 * 1 + 1 * 2) * 2, "at most those under way"
    assert sorted(file.name for file in path.parent.iterdir()) == ["train.about.json", "train.jsonl"]
