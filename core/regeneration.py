"""The target's own replies: it answers each conversation turn by turn, in place of the replies of the data.

In:  rows of conversations; the target, which answers in this process (core/local_replies.py), on several ranks each its
     share; or the URL of a server that speaks OpenAI's protocol and serves it.
Out: FOLDER/SPLIT.jsonl: a line for each row, {"row": number, "messages", "tools"} or {"row", "rejected_for": [cause,
     detail]}; FOLDER/SPLIT.about.json: what the answers depend on. A killed run loses only the rows under way.
"""

import contextlib
import dataclasses
import json
import os
import queue
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from core import claims, common, conversations, dataloader, local_replies, ranks, server

MANY = 8  # consecutive rows for which the server fails, after which it is taken for gone

REFUSED = "refused by the server"
REFUSED_ROWS = (400, 413, 422)  # refusals that concern one row alone, which as a rule is too long

SERVER_FLAGS = ("model", "timeout", "retries")  # of --regenerate_*: without effect in this process

PATIENCE = 30 * 24 * 60  # minutes that ranks wait for those that have more to answer


@dataclass(frozen=True)
class Settings:
    """The flags --regenerate_*, and template_options: variables of the chat template with which the server renders."""

    endpoint: str | None = None  # None: in this process
    model: str | None = None
    path: str | None = None
    temperature: float | None = None
    max_tokens: int = 4096
    reasoning: str = "keep"
    concurrency: int = 64
    timeout: float = 600
    retries: int = 6
    template_options: dict = field(default_factory=dict)

    def about(self, target):
        """What the answers depend on, beside the input; where the server is does not matter."""
        where = {} if self.endpoint else {"regenerate": "local"}
        return where | {
            "model": self.model or str(target),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "reasoning": self.reasoning,
            "template": self.template_options,
            "format_version": dataloader.FORMAT_VERSION,  # of the reader of the rows
        }


@dataclass(frozen=True)
class Answers:
    """All that asking depends on. folder: where the answers are kept. chat: rendering.Chat; a server renders itself."""

    folder: Path
    settings: Settings
    target: str
    chat: object = None
    trust_remote_code: bool = False

    def file(self, split):
        """The file of a split's answers."""
        return self.folder / f"{split}.jsonl"

    @contextlib.contextmanager
    def open_target(self):
        """What has ask(row, messages, tools), which returns a chat completion and is called by many threads."""
        if self.settings.endpoint:
            yield ServedTarget(self.settings)
            return
        with local_replies.open_target(self.target, self.chat, self.settings, self.trust_remote_code) as target:
            yield target


@dataclass
class Result:
    """What the target made of one row: content is its line in the file; None if its server failed with `error`."""

    row: int
    content: dict | None
    tokens: int = 0
    error: server.ServerFailed | None = None


# ==================== Flags ==========================================================================================


def add_flags(parser):
    """The group of flags --regenerate_*."""
    add = parser.add_argument_group("replies of the target itself").add_argument
    count = common.at_least(int, 1)
    add(
        "--regenerate",
        choices=("local",),
        help="local: the target answers in this process, in place of the assistant turns; none: they stay",
    )
    add("--regenerate_endpoint", help="URL of a server whose answers replace the assistant turns instead")
    add("--regenerate_model", help="the server's name of the target; none: target_model_path")
    add("--regenerate_path", help="folder that keeps the answers; none: OUTPUT_PATH.answers")
    add(
        "--regenerate_temperature",
        type=common.at_least(float, 0),
        help="of the answers, 0 = greedy; none: the target's generation_config.json, or the server's default",
    )
    add(
        "--regenerate_max_tokens",
        type=count,
        default=Settings.max_tokens,
        help="of an answer, reasoning included; an answer that is cut there has no end to learn",
    )
    add(
        "--regenerate_reasoning",
        choices=("keep", "drop"),
        default=Settings.reasoning,
        help="whether an answer keeps its reasoning",
    )
    add(
        "--regenerate_concurrency",
        type=count,
        help=f"conversations under way at once; none: 64, in this process on a CPU {local_replies.CPU_CONCURRENCY}",
    )
    add(
        "--regenerate_timeout",
        type=common.at_least(float, 1),
        default=Settings.timeout,
        help="seconds that the server may take for an answer",
    )
    add(
        "--regenerate_retries",
        type=common.at_least(int, 0),
        default=Settings.retries,
        help="repeated requests after a failure, after 1, 2, 4, ... 60 seconds",
    )


def read_flags(args):
    """The Settings of parsed flags; None if the replies stay. Flags without effect end the program."""
    is_local = args.regenerate == "local"
    settings = Settings(
        endpoint=args.regenerate_endpoint,
        model=args.regenerate_model,
        path=args.regenerate_path,
        temperature=args.regenerate_temperature,
        max_tokens=args.regenerate_max_tokens,
        reasoning=args.regenerate_reasoning,
        concurrency=args.regenerate_concurrency or Settings.concurrency,
        timeout=args.regenerate_timeout,
        retries=args.regenerate_retries,
    )
    if is_local and settings.endpoint:
        common.fail("regenerate local and regenerate_endpoint: give one of them")
    defaults = vars(Settings())
    given = [name for name, value in vars(settings).items() if value != defaults[name]]
    useless = []
    if is_local:
        useless = [f"regenerate_{name}" for name in given if name in SERVER_FLAGS]
        without = "with --regenerate local"
    elif not settings.endpoint:
        useless = [f"regenerate_{name}" for name in given]
        without = "as long as neither --regenerate local nor --regenerate_endpoint is given"
    if useless:
        common.fail(f"{', '.join(useless)}: without effect {without}")
    if is_local and not args.regenerate_concurrency:
        return dataclasses.replace(settings, concurrency=local_replies.default_concurrency())
    return settings if is_local or settings.endpoint else None


# ==================== One conversation ===============================================================================


def to_wire(messages):
    """Messages as the protocol has them: arguments as text, an id for every call and output, no reasoning."""
    sent = []
    ids = []  # of the calls whose outputs follow
    for message in messages:
        wire = {key: message[key] for key in ("role", "content", "name") if key in message}
        if calls := message.get("tool_calls"):
            ids = [call.get("id") or f"call_{number}" for number, call in enumerate(calls)]
            wire["tool_calls"] = [call_to_wire(call, call_id) for call, call_id in zip(calls, ids, strict=True)]
        if message["role"] == "tool":
            following = ids.pop(0) if ids else "call_0"
            wire["tool_call_id"] = message.get("tool_call_id") or following
        if message["role"] == "assistant" and message["content"]:
            wire["content"] = answer_of(message["content"])
        sent.append(wire)
    return sent


def call_to_wire(call, call_id):
    """A call with its arguments as text."""
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    function = {"name": call["function"]["name"], "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def answer_of(content):
    """The content without the reasoning in it."""
    return content.rpartition("</think>")[2].lstrip("\n")


def calls_of(message):
    """The names and arguments of a message's calls. Raises Rejected."""
    return [call["function"] for call in conversations.read_calls(message)]


def has_calls_of(reply, message):
    """Whether the target's reply has the calls of the row's."""
    expected = calls_of(message)
    try:
        return calls_of(reply) == expected
    except conversations.Rejected:  # a call that the target wrote badly
        return False


def read_reply(answer, reasoning):
    """(message, tokens) of a chat completion. content is None if it was cut before there was any."""
    choice = answer["choices"][0]
    reply = choice["message"]
    is_cut = choice.get("finish_reason") == "length"
    content = reply.get("content") or ""
    thoughts = [reply[key] for key in conversations.REASONING_FIELDS if reply.get(key)]
    if content.lstrip().startswith("<think>") and "</think>" not in content:  # cut inside its reasoning
        content = ""
    if not answer_of(content).strip() and not reply.get("tool_calls"):  # cut right after it
        content = ""
    message = {"role": "assistant", "content": content}
    if reasoning == "keep" and thoughts:
        message["reasoning_content"] = thoughts[0]
    elif reasoning == "drop":
        message["content"] = answer_of(content)
    if is_cut:
        message["cut"] = True
    elif reply.get("tool_calls"):
        message["tool_calls"] = reply["tool_calls"]
    if not message["content"].strip():
        message["content"] = None
    usage = answer.get("usage") or {}
    return message, usage.get("completion_tokens") or 0


def drop_replies(turns):
    """The turns without the texts of the assistant, which are replaced: their faults do not matter."""
    texts = (*conversations.CONTENT_FIELDS, *conversations.REASONING_FIELDS)
    kept = []
    for turn in turns:
        name = conversations.name_of(turn)
        if conversations.role_of(turn) == "assistant" and name not in conversations.CALLING_ROLES:
            turn = {key: value for key, value in turn.items() if key not in texts} | {"content": "?"}
        kept.append(turn)
    return kept


def read_row(raw):
    """(messages, tools) of a row, given as the bytes of its line, without the texts of replies. Raises Rejected."""
    row = conversations.parse_line(raw)
    if not isinstance(row, dict) or not conversations.has_turns(row):
        raise conversations.Rejected("no conversation to regenerate", type(row).__name__)
    conversations.check_trained(row)
    found = conversations.find_turns(row)
    return conversations.read_conversation(row | {field: drop_replies(turns) for field, turns in found.items()})


def answer_row(raw, ask, reasoning):
    """({"messages", "tools"} or {"rejected_for"}, tokens generated) of a row, given as the bytes of its line.

    ask(messages, tools) returns a chat completion. The conversation ends with the first reply that is cut or calls
    other tools than the row's: the outputs and questions that follow in the row would not belong to it.
    """
    answered = []
    total = 0
    try:
        messages, tools = read_row(raw)
        for message in messages:
            if message["role"] != "assistant":
                answered.append(message)
                continue
            try:
                completion = ask(to_wire(answered), tools)
            except conversations.Rejected:
                if not any(said["role"] == "assistant" for said in answered):
                    raise
                break  # too long: the replies so far are kept
            reply, tokens = read_reply(completion, reasoning)
            total += tokens
            if reply["content"] is None and "tool_calls" not in reply:
                break
            answered.append(reply)
            if reply.get("cut") or not has_calls_of(reply, message):
                break
            if "tool_calls" in reply:  # the outputs that follow name the ids of the row's calls
                reply["tool_calls"] = message["tool_calls"]
        while answered and answered[-1]["role"] != "assistant":
            answered.pop()
        if not answered:
            raise conversations.Rejected("no answer", "cut before there was one, or empty")
    except conversations.Rejected as rejected:
        cause, detail = rejected.args
        return rejected_for(cause, detail), total
    except server.ServerFailed as error:
        if error.status not in REFUSED_ROWS:
            raise
        return rejected_for(REFUSED, error), total
    content = {"messages": answered}
    if tools:
        content["tools"] = tools
    return content, total


def rejected_for(cause, detail):
    """The line of a row that has no answer."""
    return {"rejected_for": [cause, str(detail)[:200]]}


# ==================== The file of answers ============================================================================


def read_answers(file):
    """{row: (offset, length)} of a file of answers, open for reading and writing; drops an incomplete last line."""
    places = {}
    offset = 0
    file.seek(0)
    for line in file:
        if not line.endswith(b"\n"):  # the writer was killed
            file.truncate(offset)
            break
        try:
            row = json.loads(line)["row"]
            places[row] = (offset, len(line))
        except (ValueError, TypeError, KeyError):
            common.fail(f"{file.name}: byte {offset} begins a line that is no answer: remove it, or the file")
        offset += len(line)
    file.seek(0, os.SEEK_END)
    return places


def read_answer(file, place):
    """The bytes of a row's line, without the newline."""
    offset, length = place
    file.seek(offset)
    return file.read(length).rstrip(b"\n")


def sort_answers(path, file, places):
    """Rewrite the file in the order of rows, each once; a reader sees the old file or the new one."""
    offsets = [places[row][0] for row in sorted(places)]
    size = sum(length for _, length in places.values())
    if offsets == sorted(offsets) and size == path.stat().st_size:
        return
    temporary = path.with_name(f".{path.name}.sorting")
    with open(temporary, "wb") as ordered:
        for row in sorted(places):
            ordered.write(read_answer(file, places[row]) + b"\n")
        ordered.flush()
        os.fsync(ordered.fileno())
    os.replace(temporary, path)


def answered_rows(lines, path):
    """Yield (row, bytes of its line with the target's own answers) for the numbers `lines`, in their order."""
    with open(path, "r+b") as file:
        places = read_answers(file)
        for row in lines:
            yield row, read_answer(file, places[row])


# ==================== All conversations ==============================================================================


def open_answers(settings, target, output, inputs, chat=None, trust_remote_code=False):
    """The Answers for the inputs {split: hash}.

    Answers of another model, input or setting are neither mixed with these nor deleted: the program ends.
    """
    folder = Path(settings.path or f"{output}.answers").expanduser()
    abouts = {}
    for split, content in inputs.items():
        path = folder / f"{split}.about.json"
        abouts[path] = settings.about(target) | {"input": content}
        if not settings.endpoint:
            abouts[path]["max_length"] = chat.max_length  # what would be cut off is not generated
        check_about(path, abouts[path])
    if settings.endpoint:
        model = settings.model or find_model(settings, target)
        settings = dataclasses.replace(settings, model=model)
    else:
        if chat.template and chat.template.joins_channels:
            common.fail(
                "regenerate local: the target replies in channels, which are not told apart here: give a server that "
                "does by --regenerate_endpoint"
            )
        local_replies.check_target(target, trust_remote_code)
    for path, about in abouts.items():
        folder.mkdir(parents=True, exist_ok=True)
        common.write_atomic(path, json.dumps(about, indent=2) + "\n")
    return Answers(folder, settings, str(target), chat, trust_remote_code)


def check_about(path, about):
    """End the program if the answers beside `path` depend on something else than `about`."""
    if not path.is_file():
        return
    stored, problem = common.read_object(path)
    if problem:
        common.fail(f"{path}: {problem}: choose another --regenerate_path, or delete it and its answers")
    different = []
    for key in {**about, **stored}:
        if stored.get(key) != about.get(key):
            different.append(f"{key} {stored.get(key)}, now {about.get(key)}")
    if different:
        common.fail(
            f"{path}: its answers are of {'; '.join(different)}: choose another --regenerate_path, or delete it"
        )


def find_model(settings, target):
    """What the server calls the target."""
    remedy = "if one of them is it, name it with --regenerate_model"
    entry = server.find_served(
        "regenerate_endpoint", settings.endpoint, [target], settings.retries, settings.timeout, remedy
    )
    return entry["id"]


def complete(body, settings):
    """A chat completion. Raises ValueError for an answer that is none, and what server.request_answer raises."""
    answer = server.request_answer(settings.endpoint, "chat/completions", body, settings.timeout)
    if not is_completion(answer):
        raise ValueError(f"an answer without a message: {str(answer)[:200]}")
    return answer


def is_completion(answer):
    """Does the answer have a message, and names for all its calls?"""
    try:
        message = answer["choices"][0]["message"]
        names = [call["function"]["name"] for call in message.get("tool_calls") or ()]
        content = message.get("content")
    except (LookupError, TypeError, AttributeError):
        return False
    return isinstance(content, str | None) and all(isinstance(name, str) for name in names)


@dataclass(frozen=True)
class ServedTarget:
    """A target behind a server."""

    settings: Settings

    def ask(self, row, messages, tools):
        """The server's chat completion. Raises ServerFailed."""
        settings = self.settings
        body = {"model": settings.model, "messages": messages, "max_tokens": settings.max_tokens}
        if tools:
            body["tools"] = tools
        if settings.template_options:
            body["chat_template_kwargs"] = settings.template_options
        if settings.temperature is not None:
            body["temperature"] = settings.temperature

        def work():
            return complete(body, settings)

        return server.keep_asking(f"regenerate_endpoint {settings.endpoint}", f"row {row}", settings.retries, work)


def request_row(row, raw, target, settings):
    """The Result of a row."""

    def ask(messages, tools):
        return target.ask(row, messages, tools)

    try:
        content, tokens = answer_row(raw, ask, settings.reasoning)
        return Result(row, content, tokens)
    except server.ServerFailed as error:
        return Result(row, None, error=error)


def ask_all(rows, target, settings):
    """Yield lists of Results, those that arrived together, for an iterator of (row, bytes of its line).

    Raises ServerFailed if the server refuses everything, or fails for several consecutive rows. A row for which it
    fails alone is set aside as refused.
    """
    arrived = queue.SimpleQueue()
    busy = 0
    failed = []  # since the last row that was answered
    pool = ThreadPool(settings.concurrency)  # daemon threads: none of them delays the end of the program
    try:
        while True:
            while busy < settings.concurrency and (given := next(rows, None)):
                given = (*given, target, settings)
                pool.apply_async(request_row, given, callback=arrived.put, error_callback=arrived.put)
                busy += 1
            if not busy:
                break
            results = [arrived.get()]
            while not arrived.empty():
                results.append(arrived.get())
            busy -= len(results)
            finished, failed = sort_results([result for result in results if isinstance(result, Result)], failed)
            yield finished
            for result in results:
                if isinstance(result, Exception):
                    raise result
            if failed and (len(failed) >= min(MANY, settings.concurrency) or failed[-1].error.status):
                break
        if failed:
            raise failed[-1].error
    finally:
        pool.terminate()


def sort_results(results, failed):
    """(results to write, failures since the last answer). An answer proves that the server is there: the failures
    before it are of their rows alone, and are written as refused.
    """
    finished = []
    for result in results:
        if result.error:
            failed = [*failed, result]
            continue
        finished.append(result)
        finished += [Result(earlier.row, rejected_for(REFUSED, earlier.error)) for earlier in failed]
        failed = []
    return finished, failed


def answer_rows(lines, read, path, answers):
    """Answer the rows that are not in the file at path, or were refused by the server before; then sort the file.

    lines: numbers of the rows; read(index): the bytes of lines[index]. Other ranks that wait in `follow` answer their
    shares into files of their own. Ends the program with one line if the target does not answer any more; the answers
    until then are kept.
    """
    with claims.only_writer("regenerate_path", path.parent, f".{path.stem}.writer"):
        collect_shares(path)
        with open(path, "a+b") as file:
            places = read_answers(file)
            refused = {row for row, place in places.items() if REFUSED.encode() in read_answer(file, place)[:80]}
        pending = [index for index, row in enumerate(lines) if row not in places or row in refused]
        if pending:
            rows = ((lines[index], read(index)) for index in pending)
            share = Share(answers, path, rows, len(pending))
            if world_size() > 1:
                ranks.on_first_rank(lambda: True)
                share = ranks.scatter(split_rows(share, world_size()))
            answer_share(share, len(lines) - len(pending))
            collect_shares(path)
        with open(path, "r+b") as file:
            sort_answers(path, file, read_answers(file))


@dataclass(frozen=True)
class Share:
    """The rows [(row, bytes of its line)] that a rank answers; path: the file of all answers of their split."""

    answers: Answers
    path: Path
    rows: object
    count: int


def split_rows(share, count):
    """The shares of `count` ranks."""
    rows = list(share.rows)
    parts = [rows[rank::count] for rank in range(count)]
    return [dataclasses.replace(share, rows=part, count=len(part)) for part in parts]


def world_size():
    """Number of ranks that answer."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks(settings, local_rank):
    """Whether this is the main rank. Others, if a launcher has started several, first answer their shares."""
    if not settings or settings.endpoint or os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    ranks.start_distributed(PATIENCE, local_rank)
    if dist.get_rank() == 0:
        return True
    follow()
    return False


def dismiss_ranks():
    """Tell the other ranks that there is no more to answer."""
    if dist.is_initialized():
        ranks.on_first_rank(lambda: None)


def follow():
    """Answer the shares of a rank other than the main one, until the main rank has no more."""
    while ranks.on_first_rank(None):
        share = ranks.scatter()
        own = share.path.with_name(f"{share.path.stem}.rank{dist.get_rank()}.jsonl")
        with claims.only_writer("regenerate_path", own.parent, f".{own.stem}.writer"):
            answer_share(dataclasses.replace(share, path=own))


def collect_shares(path):
    """Move the answers of other ranks into the file at path; an interrupted run leaves them too."""
    for own in sorted(path.parent.glob(f"{path.stem}.rank*.jsonl")):
        with open(own, "r+b") as file, open(path, "a+b") as all_answers:
            read_answers(all_answers)
            for place in read_answers(file).values():
                all_answers.write(read_answer(file, place) + b"\n")
            all_answers.flush()
            os.fsync(all_answers.fileno())
        own.unlink()


def answer_share(share, before=None):
    """Append the answers of a share to its file, and wait for the other ranks.

    before: rows that were answered before; None on all ranks but the main one, which shows the progress of its share,
    and at last the tokens of all.
    """
    if world_size() > 1:
        ranks.check_shared("regenerate_path", share.path.parent)
    done = before or 0
    tokens = 0
    seconds = 0.0  # of a share without rows
    try:
        with (
            share.answers.open_target() as target,
            open(share.path, "a+b") as file,
            tqdm(
                total=done + share.count,
                initial=done,
                unit=" conversations",
                desc=f"answers, {share.path.stem}",
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 30,
                disable=before is None,
            ) as bar,
        ):
            began = time.monotonic()
            for results in ask_all(iter(share.rows), target, share.answers.settings):
                for result in results:
                    append_answer(file, result)
                    tokens += result.tokens
                    done += 1
                    bar.update()
                file.flush()
                os.fsync(file.fileno())
                seconds = time.monotonic() - began
                bar.set_postfix_str(f"{tokens:,} tokens, {tokens / seconds:,.0f} a second", refresh=False)
    except (server.ServerFailed, local_replies.GenerationFailed) as error:
        total = share.count + (before or 0)
        common.fail(f"{error}; {done:,} of {total:,} rows are there, the same command goes on with the others")
    if world_size() > 1:
        tokens = sum(ranks.gather(tokens))
        seconds = max(ranks.gather(seconds))
    if before is not None:
        pace = tokens / max(seconds, 1e-3)
        print(f"{share.path.stem}: {tokens:,} tokens answered in {seconds:,.0f} s, {pace:,.0f} a second")


def append_answer(file, result):
    """Append a row's line."""
    file.seek(0, os.SEEK_END)
    file.write(json.dumps({"row": result.row} | result.content, ensure_ascii=False).encode() + b"\n")
