"""Replies of the target itself, from a small server that speaks OpenAI's protocol: turns, faults, kills, settings."""

import contextlib
import hashlib
import http.server
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections import Counter

import pytest

import prepare_data
from core import dataloader, regeneration, target_files
from helpers import tiny
from helpers.chat_templates import family_tokenizer, marked

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}
CALL = {"id": "a1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = [
    {"role": "user", "content": "add"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "a1"},
    {"role": "assistant", "content": "it is 2"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "that is all"},
]


def said(messages):
    """What the server says to them: it depends on every one of them."""
    seen = json.dumps([(message["role"], message["content"]) for message in messages])
    return f"answer {len(messages)} {hashlib.sha256(seen.encode()).hexdigest()[:8]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, body, code=200):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        models = {"data": [{"id": "other"}, {"id": "served", "root": self.server.target}]}
        self.answer(models if self.server.models is None else self.server.models)

    def do_POST(self):
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        assert self.path == "/v1/chat/completions"
        with server.counting:
            number = len(server.requests)
            server.requests.append({**body, "key": self.headers["Authorization"]})
            server.busy += 1
            server.most = max(server.most, server.busy)
        time.sleep(server.delay * (1 + number % 3))
        try:
            code, reply = server.reply(number, body)
            if code is None:
                return self.connection.close()
            self.answer(reply, code)
        finally:
            with server.counting:
                server.busy -= 1


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def handle_error(self, *args):
        pass


def completion(content, finish_reason="stop", **fields):
    choice = {"message": {"role": "assistant", "content": content, **fields}, "finish_reason": finish_reason}
    return 200, {"choices": [choice], "usage": {"completion_tokens": 3}}


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Handler)
    vars(server).update(target="none", requests=[], busy=0, most=0, delay=0, counting=threading.Lock())
    server.models = None
    server.reply = lambda number, body: completion(said(body["messages"]))
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    family_tokenizer("qwen").save_pretrained(folder)
    return folder


def settings(server, **options):
    """Those of the flags, the others at their defaults."""
    return regeneration.Settings(**{"endpoint": server.url, "model": "m", "concurrency": 8, **options})


def answer(server, path, messages, **options):
    """The rows of the file that one pass over these conversations gives, row by row, without their number."""
    raw = [json.dumps(row if isinstance(row, dict) else {"messages": row}).encode() for row in messages]
    answers = regeneration.Answers(path.parent, settings(server, **options), "target")
    regeneration.answer_rows(list(range(1, len(raw) + 1)), raw.__getitem__, path, answers)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.pop("row") for row in rows] == list(range(1, len(raw) + 1))
    return rows


def contents(row):
    return [message["content"] for message in row["messages"]]


def command(server, target, path, output, **options):
    words = ["--dataset", path, "--target_model_path", target, "--output_path", output, "--chat_template", "qwen"]
    words += ["--regenerate_endpoint", server.url]
    return [*map(str, words), *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


# ---------------------------------------------------------------------------- one conversation
def test_turn_by_turn_each_reply_follows_the_targets_own(server, tmp_path):
    system = {"role": "system", "content": "Be brief."}
    (row,) = answer(server, tmp_path / "a.jsonl", [[system, USER, REPLY, {"role": "user", "content": "and?"}, REPLY]])
    first = said([system, USER])
    second = said([system, USER, {"role": "assistant", "content": first}, {"role": "user", "content": "and?"}])
    assert contents(row) == ["Be brief.", "hi", first, "and?", second]
    assert [len(request["messages"]) for request in server.requests] == [2, 4]


def test_temperature_length_model_and_key_are_what_the_server_is_told(server, tmp_path, monkeypatch):
    answer(server, tmp_path / "a.jsonl", [[USER, REPLY]])
    sent = server.requests.pop()
    assert "temperature" not in sent and sent["max_tokens"] == 4096 and sent["model"] == "m" and sent["key"] is None
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    answer(server, tmp_path / "b.jsonl", [[USER, REPLY]], temperature=0.0, max_tokens=9)
    sent = server.requests.pop()
    assert (sent["temperature"], sent["max_tokens"], sent["key"]) == (0.0, 9, "Bearer secret")


@pytest.mark.parametrize("tagged", [False, True])
def test_reasoning_is_kept_or_dropped_and_never_sent_back(tagged, server, tmp_path):
    fields = {} if tagged else {"reasoning": "two and two"}
    content = "<think>\ntwo and two\n</think>\n\nfour" if tagged else "four"
    server.reply = lambda number, body: completion(content, **fields)
    (kept,) = answer(server, tmp_path / "a.jsonl", [[USER, REPLY, USER, REPLY]])
    (dropped,) = answer(server, tmp_path / "b.jsonl", [[USER, REPLY, USER, REPLY]], reasoning="drop")
    assert contents(kept)[1::2] == [content] * 2 and contents(dropped)[1::2] == ["four"] * 2
    assert [message.get("reasoning_content") for message in kept["messages"]][1] == (None if tagged else "two and two")
    assert "two and two" not in json.dumps(dropped)
    assert "two and two" not in json.dumps(server.requests) and len(server.requests) == 4


def test_the_same_calls_go_on_with_what_the_tools_gave_and_others_end_the_conversation(server, tmp_path):
    def reply(number, body):
        last = body["messages"][-1]
        if last["role"] == "user" and last["content"] == "add":
            function = {"name": "add", "arguments": '{ "a":1 }' if "same" in str(body["tools"]) else '{"a": 5}'}
            return completion(None, tool_calls=[{"id": "new", "type": "function", "function": function}])
        return completion(said(body["messages"]))

    server.reply = reply
    rows = [{"messages": CALLING, "tools": [{"name": name, "parameters": {}}]} for name in ("same", "other")]
    same, other = answer(server, tmp_path / "a.jsonl", rows)
    assert [message["role"] for message in same["messages"]] == [message["role"] for message in CALLING]
    assert same["messages"][1]["tool_calls"] == [CALL] and contents(same)[3].startswith("answer 3")
    assert [message["role"] for message in other["messages"]] == ["user", "assistant"]
    assert other["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": 5}'
    assert same["tools"] == [{"type": "function", "function": {"name": "same", "parameters": {}}}]
    (history,) = [request["messages"] for request in server.requests if request["messages"][-1]["role"] == "tool"]
    assert history[1]["tool_calls"][0]["id"] == history[2]["tool_call_id"] == "a1"
    assert json.loads(history[1]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}


def test_calls_without_arguments_are_the_same_however_they_are_written(server, tmp_path):
    def reply(number, body):
        if body["messages"][-1]["role"] != "user":
            return completion("done")
        function = {"name": "look", "arguments": body["messages"][-1]["content"]}
        return completion(None, tool_calls=[{"id": "new", "type": "function", "function": function}])

    server.reply = reply
    written = ["", " ", "{}", "null", '"{}"']
    row = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": ""}}]}
    output = {"role": "tool", "content": "out"}
    rows = [[{"role": "user", "content": text}, row, output, REPLY] for text in written]
    assert [contents(found)[1:] for found in answer(server, tmp_path / "a.jsonl", rows)] == [[None, "out", "done"]] * 5


def test_a_row_with_half_a_character_is_rejected_and_the_others_go_on(server, tmp_path):
    """Half a surrogate pair, which JSON can escape but no text can hold."""
    rows = [[USER | {"content": "\ud83d"}, REPLY], [USER, REPLY]]
    rejected, row = answer(server, tmp_path / "a.jsonl", rows)
    assert rejected["rejected_for"][0] == "not JSON" and contents(row) == [USER["content"], said([USER])]


@pytest.mark.parametrize(
    "faulty",
    [
        {"content": "<think>hm"},
        {"content": "<think>hm</think>"},
        {"content": None},
        {"content": ""},
        {"content": 5},
        {"value": "", "reasoning": ["hm"]},
        {"content": [{"type": "image"}]},
    ],
)
def test_faults_of_replies_that_are_replaced_do_not_matter(faulty, server, tmp_path):
    (row,) = answer(server, tmp_path / "a.jsonl", [[USER, {"role": "assistant", **faulty}, USER, REPLY]])
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 2
    assert row["messages"][1]["content"] == said([USER])


def test_rows_that_are_not_to_be_trained_are_not_asked_for(server, tmp_path):
    rows = [{"messages": [USER, REPLY], **mark} for mark in ({"train": False}, {"label": False}, {"label": True})]
    *left, asked = answer(server, tmp_path / "a.jsonl", rows)
    assert [row["rejected_for"] for row in left] == [["not to be trained", "the row says so"]] * 2
    assert len(server.requests) == 1 and asked["messages"][1]["content"] == said([USER])


def test_an_answer_that_is_cut_ends_the_conversation(server, tmp_path):
    server.reply = lambda number, body: completion({1: "hel", 3: "<think>hm"}[len(body["messages"])], "length")
    (row,) = answer(server, tmp_path / "a.jsonl", [[USER, REPLY, USER, REPLY]])
    assert contents(row) == ["hi", "hel"] and row["messages"][1]["cut"] is True
    server.reply = lambda number, body: completion("<think>hm", "length")
    (row,) = answer(server, tmp_path / "b.jsonl", [[USER, REPLY]])
    assert row == {"rejected_for": ["no answer", "cut before there was one, or empty"]}
    server.reply = lambda number, body: completion(*(("ok",) if number % 2 == 0 else (None, "length")), reasoning="hm")
    server.requests.clear()
    (row,) = answer(server, tmp_path / "c.jsonl", [[USER, REPLY, USER, REPLY]])
    assert contents(row) == ["hi", "ok"]


def test_what_was_cut_has_no_end_to_learn(target):
    chat = prepare_data.make_chat(target_files.load_tokenizer(target), "qwen", 2048, False)
    for reply, end in (
        ({"content": "hel"}, "⟦<think>\n\n</think>\n\nhel⟧<|im_end|>\n"),
        (REPLY, "hello there<|im_end|>⟧\n"),
    ):
        row = {"messages": [USER, {"role": "assistant", "cut": reply is not REPLY, **reply}]}
        ids, mask, *_ = prepare_data.tokenise(json.dumps(row).encode(), chat)
        assert marked(ids, mask, chat.tokenizer).endswith(end)


def test_rows_that_cannot_be_answered_are_named(server, tmp_path):
    def reply(number, body):
        return (400, {"error": "too long"}) if body["messages"][0]["content"] == "long" else completion("fine")

    server.reply = reply
    for call in ({"function": "add"}, {"function": None}, {"function": {"name": None}}, {}):
        row = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
        assert regeneration.answer_row(json.dumps({"messages": row}).encode(), None, "keep")[0] == {
            "rejected_for": ["malformed call", "a call has no name"]
        }
    for tools in ([None], [1], "[null]", {"name": "add"}):
        (found, _) = regeneration.answer_row(json.dumps({"messages": [USER, REPLY], "tools": tools}).encode(), 0, "")
        assert found["rejected_for"][0] == "malformed tools", tools
    rows = [{"text": "rendered"}, [USER], [{"role": "user", "content": "long"}, REPLY], [USER, REPLY]]
    found = answer(server, tmp_path / "a.jsonl", rows)
    causes = [row["rejected_for"][0] for row in found[:3]]
    assert causes == ["no conversation to regenerate", "no question with a reply", "refused by the server"]
    assert "too long" in found[2]["rejected_for"][1] and contents(found[3]) == ["hi", "fine"]
    server.reply = lambda number, body: completion("fine")
    server.requests.clear()  # what was refused is asked for again, what was not is not
    assert contents(answer(server, tmp_path / "a.jsonl", rows)[2]) == ["long", "fine"] and len(server.requests) == 1


# ---------------------------------------------------------------------------- many of them, faults, kills
def conversations(count):
    return [[{"role": "user", "content": f"question {number}"}, REPLY] for number in range(count)]


def test_many_at_once_in_the_order_of_the_input(server, tmp_path):
    server.delay = 0.01
    rows = answer(server, tmp_path / "a.jsonl", conversations(60), concurrency=16)
    assert [contents(row)[0] for row in rows] == [f"question {number}" for number in range(60)]
    assert all(contents(row)[1] == said(row["messages"][:1]) for row in rows)
    assert 12 <= server.most <= 16 and len(server.requests) == 60


def test_faults_that_pass_are_waited_for(server, tmp_path, waits):
    faults = [(503, {}), (429, {}), (None, None), (200, b"<html>"), (200, {"choices": []}), (200, []),
              (200, {"choices": [{"message": "text"}]}), completion(["a", "list"]), completion("", tool_calls=[None]),
              completion(None, tool_calls=[{"function": "add"}])]  # fmt: skip
    server.reply = lambda number, body: faults[number] if number < len(faults) else completion("fine")
    (row,) = answer(server, tmp_path / "a.jsonl", conversations(1), retries=10)
    assert contents(row)[1] == "fine" and waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_an_error_that_ends_in_the_middle_is_waited_for(server, tmp_path, waits, monkeypatch):
    """The status has come, the connection breaks before its text."""

    def broken(error, count):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(urllib.error.HTTPError, "read", broken, raising=False)
    server.reply = lambda number, body: (502, {}) if number == 0 else completion("fine")
    assert contents(answer(server, tmp_path / "a.jsonl", conversations(1))[0])[1] == "fine" and waits == [1]


def test_an_answer_that_takes_too_long_is_asked_for_again(server, tmp_path, waits):
    ended = threading.Event()
    server.reply = lambda number, body: (number == 0 and ended.wait(20), completion("fine"))[1]
    assert contents(answer(server, tmp_path / "a.jsonl", conversations(1), timeout=1)[0])[1] == "fine"
    assert waits == [1] and len(server.requests) == 2
    ended.set()


def test_one_row_for_which_the_server_fails_is_set_aside(server, tmp_path, waits):
    def reply(number, body):
        return (500, {}) if body["messages"][0]["content"] == "question 3" else completion("fine")

    server.reply = reply
    rows = answer(server, tmp_path / "a.jsonl", conversations(20), retries=1, concurrency=2)
    assert [row for row in rows if "rejected_for" in row] == [rows[3]] and rows[3]["rejected_for"][
        0
    ] == regeneration.REFUSED


def stopped(capsys, function, *arguments, **options):
    with pytest.raises(SystemExit) as stop:
        function(*arguments, **options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: "), error
    return error


def test_a_server_that_stays_away_ends_it_and_what_it_answered_is_kept(server, tmp_path, waits, capsys):
    def reply(number, body):
        if number < 10:
            return completion("fine")
        time.sleep(0.3)  # the ten have arrived
        return None, None

    path = tmp_path / "a.jsonl"
    server.reply = reply
    error = stopped(capsys, answer, server, path, conversations(40), retries=2, concurrency=4)
    assert f"regenerate_endpoint {server.url} fails for row" in error and "3 times" in error
    assert "10 of 40 rows are there, the same command goes on" in error
    server.reply = lambda number, body: completion("fine")
    server.requests.clear()
    assert len(answer(server, path, conversations(40))) == 40
    assert len({request["messages"][0]["content"] for request in server.requests}) == 30
    server.reply = lambda number, body: (401, {"error": "no key"})
    error = stopped(capsys, answer, server, tmp_path / "b.jsonl", conversations(40))
    assert "refuses row" in error and "no key" in error and "0 of 40 rows" in error


ALONE = """
import json, sys
from pathlib import Path
from core.regeneration import Answers, Settings, answer_rows
path, rows, flags = json.load(sys.stdin)
raw = [json.dumps({"messages": row}).encode() for row in rows]
answer_rows(list(range(1, len(raw) + 1)), raw.__getitem__, Path(path), Answers(Path(), Settings(**flags), "target"))
"""


def test_killed_again_and_again_it_neither_loses_nor_repeats_a_row(server, tmp_path):
    """kill -9 at several moments; of each row one answer is kept, and what was on the disk is not asked for again."""
    server.delay, path, rows, code, kills = 0.005, tmp_path / "train.jsonl", conversations(150), -signal.SIGKILL, 0
    flags = vars(settings(server))
    while code == -signal.SIGKILL:
        before = path.stat().st_size if path.exists() else 0
        command = [sys.executable, "-c", ALONE]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, cwd=tiny.REPOSITORY, stderr=subprocess.PIPE)
        child.stdin.write(json.dumps([str(path), rows, flags]))
        child.stdin.close()
        deadline = time.monotonic() + 60
        while child.poll() is None:
            assert time.monotonic() < deadline
            if kills < 4 and path.exists() and path.stat().st_size > before + 20 * 100:
                child.kill()
                kills += 1
                break
            time.sleep(0.001)
        code = child.wait()
        if code == -signal.SIGKILL:
            with open(path, "ab") as file:  # as if it had been killed in the middle of a write
                file.write(b'{"row": 7, "messages": [{"role": "us')
    assert code == 0, child.stderr.read()
    asked = Counter(request["messages"][0]["content"] for request in server.requests)
    assert kills == 4 and len(asked) == 150
    assert sum(asked.values()) <= 150 + 4 * 8  # at most those under way at a kill
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["row"] for row in answers] == list(range(1, 151))
    assert all(contents(row)[1] == said(row["messages"][:1]) for row in answers)
    undisturbed = tmp_path / "undisturbed.jsonl"
    answer(server, undisturbed, rows)
    assert path.read_bytes() == undisturbed.read_bytes()


def test_two_writers_and_a_line_that_is_none_are_refused(server, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    with tiny.other_writer(tmp_path, ".a.writer"):
        assert "another process writes" in stopped(capsys, answer, server, path, conversations(1))
    path.write_bytes(b'{"row": 1}\nnonsense\n')
    assert "byte 11 begins a line that is no answer" in stopped(capsys, answer, server, path, conversations(1))


# ---------------------------------------------------------------------------- through the command line
def test_prepared_data_hold_the_targets_own_replies(server, target, tmp_path, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(12, turns=2))
    server.target = str(target)
    words = command(server, target, path, tmp_path / "out", validation_ratio=0.25, num_samples=8)
    config = prepare_data.main(prepare_data.parse_args(words))
    assert {name: part["rows"] for name, part in config["splits"].items()} == {"train": 6, "validation": 2}
    assert {request["model"] for request in server.requests} == {"served"} and len(server.requests) == 16
    tokenizer = target_files.load_tokenizer(target)
    for split in dataloader.open_data(tmp_path / "out")[0].values():
        for row in split:
            text = marked(row["input_ids"], row["loss_mask"], tokenizer)
            assert text.count("⟦answer 1 ") == 1 and "answer 3 " in text and text.count("⟦") == 2
    assert sorted(path.name for path in (tmp_path / "out.answers").iterdir()) == ["train.about.json", "train.jsonl"]
    assert "train: 48 tokens answered in " in capsys.readouterr().out

    # The same command asks for nothing; another length asks for nothing; more rows ask for theirs alone.
    prepare_data.main(prepare_data.parse_args(words))
    assert "reused" in capsys.readouterr().out
    prepare_data.main(prepare_data.parse_args([*words, "--max_length", "100"]))
    assert len(server.requests) == 16
    prepare_data.main(prepare_data.parse_args([*words, "--num_samples", "12"]))
    assert len(server.requests) == 24

    # Answers of other settings, another reader or another input are not mixed.
    about = tmp_path / "out.answers" / "train.about.json"
    current = about.read_text()
    about.write_text(current.replace(f'"format_version": {dataloader.FORMAT_VERSION}', '"format_version": 1'))
    error = stopped(capsys, prepare_data.main, prepare_data.parse_args([*words, "--num_samples", "3"]))
    assert f"format_version 1, now {dataloader.FORMAT_VERSION}: choose another --regenerate_path, or delete" in error
    about.write_text(current)
    other = [*words, "--regenerate_temperature", "0.5", "--regenerate_reasoning", "drop"]
    error = stopped(capsys, prepare_data.main, prepare_data.parse_args(other))
    assert "temperature None, now 0.5; reasoning keep, now drop: choose another --regenerate_path" in error
    prepare_data.main(prepare_data.parse_args([*other, "--regenerate_path", str(tmp_path / "elsewhere")]))
    assert len(server.requests) == 40 and (tmp_path / "elsewhere" / "train.jsonl").exists()
    path.write_bytes(path.read_bytes().replace(b"Question 0", b"question 0", 1))
    assert "input " in stopped(capsys, prepare_data.main, prepare_data.parse_args(words))


def test_the_server_has_to_have_the_target_and_flags_need_an_endpoint(server, target, tmp_path, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(2))
    words = command(server, target, path, tmp_path / "out")
    error = stopped(capsys, prepare_data.main, prepare_data.parse_args(words))
    assert (
        f"serves other, served, not the target {target}: if one of them is it, name it with --regenerate_model" in error
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.answers").exists() and not server.requests
    prepare_data.main(prepare_data.parse_args([*words, "--regenerate_model", "by another name"]))
    assert {request["model"] for request in server.requests} == {"by another name"}
    bare = [word for word in words if not word.startswith(("--regenerate", "http"))]
    error = stopped(capsys, prepare_data.main, prepare_data.parse_args([*bare, "--regenerate_reasoning", "drop"]))
    assert "regenerate_reasoning: without effect as long as neither --regenerate local nor" in error


def test_the_server_renders_as_the_data_are(server, target, tmp_path, capsys):
    """A target that is to answer at once is asked to: its answers behind a thought are other ones."""
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(2))
    words = command(server, target, path, tmp_path / "out", regenerate_model="m")
    prepare_data.main(prepare_data.parse_args(words))
    assert not any("chat_template_kwargs" in request for request in server.requests)
    at_once = [*words, "--chat_template", "qwen3-instruct"]
    error = stopped(capsys, prepare_data.main, prepare_data.parse_args(at_once))
    assert "template {}, now {'enable_thinking': False}: choose another --regenerate_path" in error
    server.requests.clear()
    prepare_data.main(prepare_data.parse_args([*at_once, "--regenerate_path", str(tmp_path / "at once")]))
    assert [request["chat_template_kwargs"] for request in server.requests] == [{"enable_thinking": False}] * 2


@pytest.mark.parametrize("models", [[], {}, {"data": None}, {"data": ["name"]}, {"data": [{"name": "x"}]}])
def test_a_list_of_models_of_another_form_is_one_line(server, target, tmp_path, capsys, waits, models):
    server.models = models
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(2))
    words = command(server, target, path, tmp_path / "out", regenerate_retries=1)
    error = stopped(capsys, prepare_data.main, prepare_data.parse_args(words))
    assert "fails for the list of its models, 2 times" in error and waits == [1]


def test_refused_rows_count_as_rejected(server, target, tmp_path, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(10))
    server.reply = lambda number, body: (400, {"error": "too long"}) if "n 3." in str(body) else completion("fine")
    words = command(server, target, path, tmp_path / "out", regenerate_model="m")
    error = stopped(capsys, prepare_data.main, prepare_data.parse_args(words))
    assert "1 of 10 rows rejected" in error and "1 refused by the server (first: line 4: " in error
    config = prepare_data.main(prepare_data.parse_args([*words, "--max_rejected_ratio", "0.2"]))
    assert config["splits"]["train"]["rejected"] == {"refused by the server": 1}


class Slow(http.server.BaseHTTPRequestHandler):
    """Answers byte by byte, without end."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b" " * self.server.size)
                time.sleep(self.server.pause)


@pytest.mark.parametrize(("size", "pause", "problem"), [(1, 0.1, "does not end"), (2**20, 0, "more than 3,000,000")])
def test_an_answer_that_does_not_end_is_given_up(size, pause, problem, monkeypatch):
    monkeypatch.setattr(regeneration.server, "ANSWER_BYTES", 3_000_000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as slow:
        slow.daemon_threads, slow.size, slow.pause = True, size, pause
        threading.Thread(target=slow.serve_forever, daemon=True).start()
        with pytest.raises((TimeoutError, ValueError), match=problem):
            regeneration.server.request_answer(f"http://127.0.0.1:{slow.server_port}", "models", timeout=1)
        slow.shutdown()


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(regeneration.server.ServerFailed, match="nowhere fails for it with .*refused"):
        regeneration.server.keep_asking(
            "nowhere", "it", 0, lambda: regeneration.server.request_answer("http://127.0.0.1:9", "x")
        )
