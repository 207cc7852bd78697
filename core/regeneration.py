"""regeneration."""

import contextlib
import fcntl
import json
import os
import queue
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from core import common, conversations, server

MANY = 8  # rows for which the server fails, one after another, so that it is taken for gone

REFUSED = "refused by the server"

# (name, type, default, help, least value if any): see read_conversations.parse_flags
REGENERATE_FLAGS = [
    ("regenerate_endpoint", str, None, "URL of a server whose answers replace the assistant turns; none: they stay"),
    ("regenerate_model", str, None, "what the server calls the target; none: target_model_path"),
    ("regenerate_path", str, None, "folder that keeps the answers; none: OUTPUT_PATH.answers"),
    ("regenerate_temperature", float, None, "of the answers; none: the server's, as a rule the target's own", 0),
    ("regenerate_max_tokens", int, 4096, "of an answer, reasoning included; what is cut there has no end to learn", 1),
    ("regenerate_reasoning", ("keep", "drop"), "keep", "whether an answer keeps its reasoning"),
    ("regenerate_concurrency", int, 64, "conversations under way at once", 1),
    ("regenerate_timeout", float, 600, "seconds that the server may take for an answer", 1),
    ("regenerate_retries", int, 6, "times that it is asked again, after 1, 2, 4, ... 60 seconds", 0),
]


# ---------------------------------------------------------------------------- one conversation
def to_wire(messages):
    """Messages as the protocol has them: arguments as text, an id for every call and output, no reasoning."""
    sent, ids = [], []
    for message in messages:
        wire = {key: message[key] for key in ("role", "content", "name") if key in message}
        if calls := message.get("tool_calls"):
            ids = [call.get("id") or f"call_{number}" for number, call in enumerate(calls)]
            wire["tool_calls"] = []
            for call, name in zip(calls, ids, strict=True):
                function = call.get("function", call)
                arguments = function.get("arguments", {})
                text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                function = {"name": function.get("name"), "arguments": text}
                wire["tool_calls"].append({"id": name, "type": "function", "function": function})
        if message["role"] == "tool":
            wire["tool_call_id"] = message.get("tool_call_id") or (ids.pop(0) if ids else "call_0")
        if message["role"] == "assistant" and message["content"]:
            wire["content"] = message["content"].rpartition("</think>")[2].lstrip("\n")
        sent.append(wire)
    return sent


def calls_of(message):
    """[(name, arguments)] of its calls, arguments as the object that they say."""
    found = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments")
        with contextlib.suppress(ValueError, TypeError):
            arguments = json.loads(arguments)
        found.append((function.get("name"), arguments))
    return found


def read_reply(answer, reasoning):
    """(message, tokens) of a chat completion. content is None if it was cut before there was any."""
    choice = answer["choices"][0]
    reply, cut = choice["message"], choice.get("finish_reason") == "length"
    content, thoughts = (
        reply.get("content") or "",
        [reply[key] for key in conversations.REASONING_FIELDS if reply.get(key)],
    )
    if content.lstrip().startswith("<think>") and "</think>" not in content:  # cut in the middle of a thought
        content = ""
    message = {"role": "assistant", "content": content}
    if reasoning == "keep" and thoughts:
        message["reasoning_content"] = thoughts[0]
    elif reasoning == "drop":
        message["content"] = content.rpartition("</think>")[2].lstrip("\n")
    if reply.get("tool_calls") and not cut:
        message["tool_calls"] = reply["tool_calls"]
    elif cut:
        message["cut"] = True
    if not message["content"].strip():
        message["content"] = None
    return message, (answer.get("usage") or {}).get("completion_tokens") or 0


def answer_row(raw, ask, reasoning):
    """({"messages", "tools"} or {"rejected_for"}, tokens generated) of a row, given as the bytes of its line.

    ask(messages, tools) gives a chat completion. The conversation ends with the first reply that is cut, or calls other
    tools than the row's: what the tools gave, and what was said to it, would not belong to it.
    """
    answered, total = [], 0
    try:
        try:
            row = json.loads(raw.decode() or "{}")
        except (ValueError, RecursionError) as error:
            raise conversations.Rejected("not JSON", error) from None
        if not isinstance(row, dict) or not ("conversations" in row or "messages" in row):
            raise conversations.Rejected("no conversation to regenerate", type(row).__name__)
        messages, tools = conversations.read_conversation(row)
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or ()]
        for message in messages:
            if message["role"] != "assistant":
                answered.append(message)
                continue
            reply, tokens = read_reply(ask(to_wire(answered), tools), reasoning)
            total += tokens
            if reply["content"] is None and "tool_calls" not in reply:
                break
            answered.append(reply)
            if reply.get("cut") or calls_of(reply) != calls_of(message):
                break
            if "tool_calls" in reply:  # their ids are those that the outputs name
                reply["tool_calls"] = message["tool_calls"]
        while answered and answered[-1]["role"] != "assistant":
            answered.pop()
        if not answered:
            raise conversations.Rejected("no answer", "cut before there was one, or empty")
    except conversations.Rejected as rejected:
        return {"rejected_for": [rejected.args[0], str(rejected.args[1])[:200]]}, total
    except server.ServerFailed as error:
        if error.status not in (400, 413, 422):  # those concern this row alone: as a rule it is too long
            raise
        return {"rejected_for": [REFUSED, str(error)[:200]]}, total
    return {"messages": answered} | ({"tools": tools} if tools else {}), total


# ---------------------------------------------------------------------------- the file of answers
def read_answers(file):
    """{row: (offset, length)} of a file of answers, open for reading and writing; a line without its end is cut off."""
    found, offset = {}, 0
    file.seek(0)
    for line in file:
        if not line.endswith(b"\n"):  # the writer was killed
            file.truncate(offset)
            break
        try:
            found[json.loads(line)["row"]] = (offset, len(line))
        except (ValueError, TypeError, KeyError):
            common.fail(f"{file.name}: byte {offset} begins a line that is no answer: remove it, or the file")
        offset += len(line)
    file.seek(0, os.SEEK_END)
    return found


def read_answer(file, place):
    """The bytes of a row's line, without its end."""
    file.seek(place[0])
    return file.read(place[1]).rstrip(b"\n")


def sort_answers(path, file, found):
    """Rewrite the file in the order of rows, each once; a reader sees the old file or the new one."""
    offsets = [found[row][0] for row in sorted(found)]
    if offsets == sorted(offsets) and sum(length for _, length in found.values()) == path.stat().st_size:
        return
    temporary = path.with_name(f".{path.name}.sorting")
    with open(temporary, "wb") as ordered:
        for row in sorted(found):
            ordered.write(read_answer(file, found[row]) + b"\n")
        ordered.flush()
        os.fsync(ordered.fileno())
    os.replace(temporary, path)


# ---------------------------------------------------------------------------- all of them
def settings_of(args, target):
    """What the answers depend on, beside the input; where the server is does not matter.

    args: the flags, and template_options, the variables of the target's chat template.
    """
    names = ("temperature", "max_tokens", "reasoning")
    model = {"model": args.regenerate_model or str(target)}
    return model | {name: getattr(args, f"regenerate_{name}") for name in names} | {"template": args.template_options}


def open_answers(args, target, output, inputs):
    """(folder of the answers, what the server calls the target, args), for the inputs {split: hash}.

    Answers of another model, input or setting are neither mixed with these nor deleted: the program ends.
    """
    folder = Path(args.regenerate_path or f"{output}.answers").expanduser()
    for split, content in inputs.items():
        stored, about = folder / f"{split}.about.json", settings_of(args, target) | {"input": content}
        if stored.is_file():
            there = json.loads(stored.read_text())
            if wrong := [
                f"{key} {there.get(key)}, now {value}" for key, value in about.items() if there.get(key) != value
            ]:
                common.fail(
                    f"{stored}: its answers are of {'; '.join(wrong)}: choose another --regenerate_path, or delete it"
                )
    model = args.regenerate_model or server.find_served(
        "regenerate_endpoint", args.regenerate_endpoint, [target], args.regenerate_retries, args.regenerate_timeout,
        "if one of them is it, name it with --regenerate_model",
    )["id"]  # fmt: skip
    for split, content in inputs.items():
        folder.mkdir(parents=True, exist_ok=True)
        about = settings_of(args, target) | {"input": content}
        common.write_atomic(folder / f"{split}.about.json", json.dumps(about, indent=2) + "\n")
    return folder, model, args


def ask_all(lines, read, pending, model, args):
    """Yield (row, answer, tokens) as they come, for the indices pending; None after each that were there at once.

    ServerFailed if the server refuses everything, or fails for several rows and answers none in between. A row for
    which it fails alone is set aside, as those that it refuses are.
    """
    name, arrived = f"regenerate_endpoint {args.regenerate_endpoint}", queue.SimpleQueue()

    def work(row, raw):
        def ask(messages, tools):
            body = {"model": model, "messages": messages, "max_tokens": args.regenerate_max_tokens}
            body |= {"tools": tools} if tools else {}
            body |= {"chat_template_kwargs": args.template_options} if args.template_options else {}
            if args.regenerate_temperature is not None:
                body["temperature"] = args.regenerate_temperature
            return server.keep_asking(name, f"row {row}", args.regenerate_retries, lambda: complete(body, args))

        try:
            return row, *answer_row(raw, ask, args.regenerate_reasoning)
        except server.ServerFailed as error:
            return row, error, 0

    busy, failed, pending = 0, [], iter(pending)
    pool = ThreadPool(args.regenerate_concurrency)  # of daemons: none of them holds up the end of the program
    try:
        while True:
            while busy < args.regenerate_concurrency and (index := next(pending, None)) is not None:
                pool.apply_async(work, (lines[index], read(index)), callback=arrived.put, error_callback=arrived.put)
                busy += 1
            if not busy:
                break
            results = [arrived.get()]
            while not arrived.empty():
                results.append(arrived.get())
            busy -= len(results)
            for result in results:
                if isinstance(result, Exception):
                    raise result
                if isinstance(result[1], server.ServerFailed):
                    failed.append(result)
                    continue
                yield result
                yield from ((row, {"rejected_for": [REFUSED, str(error)[:200]]}, 0) for row, error, _ in failed)
                failed = []
            yield None
            if failed and (len(failed) >= min(MANY, args.regenerate_concurrency) or failed[-1][1].status):
                break
        if failed:
            raise failed[-1][1]
    finally:
        pool.terminate()


def complete(body, args):
    """A chat completion; ValueError if the answer is none."""
    answer = server.request_answer(args.regenerate_endpoint, "chat/completions", body, args.regenerate_timeout)
    try:
        message = answer["choices"][0]["message"]
        right = isinstance(message.get("content"), str | None)
        names = [call["function"]["name"] for call in message.get("tool_calls") or ()]
        right = right and all(isinstance(name, str) for name in names)
    except (LookupError, TypeError, AttributeError):
        right = False
    if not right:
        raise ValueError(f"an answer without a message: {str(answer)[:200]}")
    return answer


def answer_rows(lines, read, path, model, args):
    """Have the rows answered that the file at path lacks, or that the server refused before; sorted in the end.

    lines: numbers of the rows; read(index): the bytes of lines[index]. Ends the program with one line if the server
    stays away; what it has answered until then is kept.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            common.fail(f"{path}: another process writes answers there")
        found, tokens = read_answers(file), 0
        refused = {row for row, place in found.items() if REFUSED.encode() in read_answer(file, place)[:80]}
        pending = [index for index, row in enumerate(lines) if row not in found or row in refused]
        done = len(lines) - len(pending)
        bar = tqdm(
            total=len(lines),
            initial=done,
            unit=" conversations",
            desc=f"answers, {path.stem}",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 30,
        )
        try:
            with bar:
                for answer in ask_all(lines, read, pending, model, args):
                    if answer is None:
                        file.flush()
                        os.fsync(file.fileno())
                        bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
                        continue
                    row, content, count = answer
                    line = json.dumps({"row": row} | content, ensure_ascii=False).encode() + b"\n"
                    found[row], tokens = (file.seek(0, os.SEEK_END), len(line)), tokens + count
                    file.write(line)
                    bar.update()
        except server.ServerFailed as error:
            common.fail(
                f"{error}; {len(found):,} of {len(lines):,} rows are there, the same command goes on with the others"
            )
        sort_answers(path, file, found)


def answered_rows(lines, path):
    """Yield (row, bytes of its line with the target's own answers) of those rows, in their order."""
    with open(path, "r+b") as file:
        found = read_answers(file)
        for row in lines:
            yield row, read_answer(file, found[row])
