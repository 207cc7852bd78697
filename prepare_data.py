"""Turn conversations into tokens and a loss mask: the data set that every later stage reads.

In:  a preset (sharegpt, ultrachat, pydoc) or a JSON Lines file with rows {"conversations" or "messages":
     [{"role", "content"} or {"from", "value"}, ...], "tools"}, {"text"} or {"input_ids", "loss_mask"}; a tokenizer.
Out: --output_path: train/ and validation/ in Arrow (input_ids int32; loss_mask uint8, 1 = the assistant's, its
     end-of-turn token included; length int32), data_config.json (fingerprint, its ingredients, counts), token_freq.pt
     ({token id: count} of train's supervised tokens), rejected.jsonl. The same ingredients are not built twice.

    python prepare_data.py --dataset pydoc --target_model_path TARGET --output_path data/pydoc
    python prepare_data.py --dataset chats.jsonl --target_model_path TARGET --output_path data --validation_ratio 0.01
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
from collections import Counter, namedtuple
from pathlib import Path
from typing import NoReturn

import huggingface_hub
import numpy as np
import torch
from tokenizers import Tokenizer

MIN_ROWS_PER_PROCESS = 500  # below that, starting a process takes longer than its share of the rows
FORMAT_VERSION = 1  # part of the fingerprint: raise it whenever the same input would give other rows
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken"]
ROLES = dict.fromkeys(("system", "developer"), "system") | dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "function_call"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "observation", "ipython"), "tool")
AFTER = {"": "system user", "system": "user", "user": "assistant", "assistant": "user tool", "tool": "tool assistant"}
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

# Assistant turns lie behind one of headers, up to and including one of ends, the first of which closes a final reply.
# joins: a header directly behind an end is the assistant's too, one turn in several channels.
Template = namedtuple("Template", ("headers", "ends", "joins"), defaults=(False,))
TEMPLATES = {
    "llama3": Template(("<|start_header_id|>assistant<|end_header_id|>\n\n",), ("<|eot_id|>", "<|eom_id|>")),
    "qwen": Template(("<|im_start|>assistant\n",), ("<|im_end|>",)),
    "gpt-oss": Template(("<|start|>assistant",), ("<|return|>", "<|end|>", "<|call|>"), joins=True),
    # Behind a tool's output the reply follows without the assistant's own marker.
    "deepseek-r1-distill": Template(("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"), ("<｜end▁of▁sentence｜>",)),
}


# ---------------------------------------------------------------------------- conventions that all scripts share
def fail(message) -> NoReturn:
    """Report an error that the user can mend: one line on stderr, exit code 2, no traceback."""
    print("error: " + " ".join(str(message).split("\n")), file=sys.stderr, flush=True)
    raise SystemExit(2)


def normalise_argv(argv, aliases=None):
    """Kebab-case flags to snake_case, then other trainers' names (aliases: {alias: name}); values stay untouched."""

    def normalise(flag):
        name = flag[1].replace("-", "_")
        return "--" + (aliases or {}).get(name, name)

    return [re.sub(r"\A--([^=]+)", normalise, word) for word in argv]


def boolean(text):
    """Type of flags that take a value or none, which means true."""
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def parse_flags(description, groups, argv=None, aliases=None):
    """The flags' values, for {title: [(name, type, default, help, least value if any)]}; ends with one line if wrong.

    type: a tuple lists choices, [int] takes several values; default ... means required.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form, allow_abbrev=False)
    parser.error = fail  # one line, without the usage
    for title, rows in groups.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text, *_ in rows:
            # Of a path only the name: the help is the same wherever the repository lies.
            shown = "none" if default is None else Path(default).name if str(default).startswith("/") else default
            shown = "required" if default is ... else f"default: {shown}"
            options = {"required": default is ..., "default": default, "help": f"{text} ({shown})"}
            options |= {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            if isinstance(kind, list):
                options |= {"type": kind[0], "nargs": "+"}
            elif kind is boolean:
                options |= {"nargs": "?", "const": True}
            group.add_argument(f"--{name}", **options)
    args = parser.parse_args(normalise_argv(sys.argv[1:] if argv is None else argv, aliases))
    for name, *_, least in (row for rows in groups.values() for row in rows if len(row) == 5):
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"{name} is {getattr(args, name)}; it must be at least {least}")
    return args


def write_atomic(path, data):
    """Write bytes or str so that a reader sees the old file or the whole new one, never a part."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def hash_file(path):
    """sha256 of the content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(value):
    """sha256 of the value as JSON, in hex."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------- the target's files
def download(repo, patterns, repo_type="model"):
    """Folder of those files of a hub repository that match; weights in sub-folders are second copies, so left out."""
    which = {"allow_patterns": patterns, "ignore_patterns": ["*/*.safetensors", "*/*.bin"]}
    try:
        return Path(huggingface_hub.snapshot_download(repo, repo_type=repo_type, **which))
    except Exception as error:  # errors of several libraries, each of which means that the files cannot be had
        flag = {"model": "target_model_path", "dataset": "dataset_path"}[repo_type]
        fail(f"{repo_type} {repo}: give a local copy as --{flag}; the hub fails with {type(error).__name__}: {error}")


def locate(path_or_hub_id, names, patterns=SMALL_FILES):
    """The folder with one of the named files: the one given, the nearest at most three levels below it, or a hub id's.

    So it finds a model somewhere inside and both of MLflow's layouts. A config.json counts if it is a model's.
    patterns: what is downloaded of a hub id. Ends with one line if no folder or several equally near ones have a file.
    """
    target, folder = str(path_or_hub_id), Path(path_or_hub_id).expanduser()
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", target):
            fail(f"target model {target}: neither a folder nor a hub id such as org/name")
        folder = download(target, patterns)
    folder, found = folder.resolve(), []
    if (folder / "refs" / "main").is_file():  # an entry of the hub's cache
        folder = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    for depth in range(4):
        files = [file for name in names for file in folder.glob("*/" * depth + name) if file.is_file()]
        files = [file for file in files if file.name != "config.json" or b'"model_type"' in file.read_bytes()]
        found = found or sorted({file.parent for file in files})
    if {path.name for path in found} <= {"model", "config", "tokenizer"}:  # MLflow may keep such a file twice
        found = [path for path in found if path.name == "model"] or found
    if len(found) != 1:
        where = ", ".join(str(path.relative_to(folder)) for path in found)
        fail(f"target model {target}: {len(found)} folders with {' or '.join(names)} in it instead of one: {where}")
    return found[0]


def load_tokenizer(target_model_path, trust_remote_code=False):
    """The target's fast tokenizer; a slow one has no character offsets, so the loss mask could not be exact."""
    from transformers import AutoTokenizer

    folder = locate(target_model_path, TOKENIZER_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        fail(f"cannot load the tokenizer in {folder}: {error}")
    if not tokenizer.is_fast:
        fail(f"the tokenizer in {folder} is not a fast one: add its tokenizer.json")
    return tokenizer


def hash_tokenizer(tokenizer):
    """Hash of all that decides which tokens a conversation becomes."""
    return hash_of([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map])


# ---------------------------------------------------------------------------- reading what this script wrote
def open_data(folder):
    """(DatasetDict, data_config) of a prepared folder; columns input_ids int32, loss_mask uint8, length int32."""
    from datasets import DatasetDict

    for name in ("data_config.json", "dataset_dict.json", "token_freq.pt", "train"):
        if not Path(folder, name).exists():
            fail(f"{folder} is not a complete prepared data set: {name} is missing; run prepare_data.py again")
    config = json.loads(Path(folder, "data_config.json").read_text())
    if (version := config.get("format_version")) != FORMAT_VERSION:
        fail(f"{folder} has format version {version}, this program reads {FORMAT_VERSION}: run prepare_data.py again")
    return DatasetDict.load_from_disk(str(folder)), config


def read_token_freq(path):
    """{token id: count} of a token_freq.pt; ends the program if the file is of another kind."""
    try:
        counts = {int(i): int(n) for i, n in torch.load(path, map_location="cpu", weights_only=True).items()}
    except Exception as error:  # a file of another kind fails anywhere in the unpickler
        fail(f"token counts {path}: not a plain dict {{token id: count}} in a file of torch ({type(error).__name__})")
    if not counts or min(counts) < 0 or min(counts.values()) < 0:
        fail(f"token counts {path}: none in it, or a negative token id or count")
    return counts


# ---------------------------------------------------------------------------- one row: from JSON to tokens and mask
class Rejected(Exception):
    """A row that cannot be used. Arguments: the cause, by which it is counted, and a short detail."""


def read_conversation(row):
    """(messages, tools) of a row. What follows the last assistant turn is dropped: nothing of it is supervised."""
    turns, tools = row.get("conversations") or row.get("messages"), row.get("tools") or None
    if not turns:
        raise Rejected("empty", "no messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Rejected("malformed message", "the messages are not a list of objects")
    messages = [read_message(turn) for turn in turns]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise Rejected("no assistant turn", " ".join(roles))
    if any(role not in AFTER[before].split() for before, role in zip(["", *roles], roles, strict=False)):
        raise Rejected("roles out of order", " ".join(roles))
    with contextlib.suppress(ValueError):
        tools = json.loads(tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list | None):
        raise Rejected("malformed tools", "neither a list nor the JSON of one")
    return messages[: len(roles) - roles[::-1].index("assistant")], tools


def read_message(turn):
    """A message with role and content; an assistant's also with reasoning (None if it has none) and tool_calls."""
    if (role := ROLES.get(str(turn.get("role") or turn.get("from")).lower())) is None:
        raise Rejected("unknown role", repr(turn.get("role") or turn.get("from")))
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if role == "tool" and not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    message = {key: turn[key] for key in ("tool_calls", "tool_call_id", "name") if turn.get(key)} | {"role": role}
    if role == "assistant":
        texts = (turn[key] for key in REASONING_FIELDS if isinstance(turn.get(key), str) and turn[key].strip())
        message["reasoning"] = next(texts, None)
        calls = message.get("tool_calls", [])
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise Rejected("malformed message", "tool_calls is not a list of objects")
        for call in calls:  # their arguments are text on the wire, but templates want the object
            function = call.get("function", call)
            with contextlib.suppress(ValueError, TypeError, KeyError):  # an object already, none, or no JSON
                function["arguments"] = json.loads(function["arguments"])
        if not isinstance(content, str | None) or not (content or "").strip():
            if not calls and not message["reasoning"]:
                raise Rejected("empty", "an assistant turn without content")
            content = None if calls else ""  # some templates drop the calls of a message that has content
    if not isinstance(content, str) and "tool_calls" not in message:
        raise Rejected("malformed message", f"the content of a {role} turn is {type(content).__name__}")
    return message | {"content": content}


# All that turns a row into tokens. encoder: without post-processing, which would trim blanks off the offsets. template:
# None for auto if the tokenizer has none. opening: what the prompt, so not the assistant, has behind the header.
Chat = namedtuple("Chat", ("tokenizer", "encoder", "template", "opening", "max_length", "only_last"))


def render(tokenizer, messages, tools=None, **options):
    """Text of the conversation by the tokenizer's own template; reasoning under every name that templates look for."""
    messages = [message | dict.fromkeys(REASONING_FIELDS, message.get("reasoning")) for message in messages]
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)


def find_spans(text, template, opening=""):
    """[(start, end)] in characters of each assistant turn: what the assistant produces, its end marker included."""
    header, end = (re.compile("|".join(map(re.escape, markers))) for markers in template[:2])
    spans, position = [], 0
    while found := header.search(text, position):
        start = found.end() + (len(opening) if text.startswith(opening, found.end()) else 0)
        closing = end.search(text, start)
        position = closing.end() if closing else len(text)
        if template.joins and spans and spans[-1][1] == found.start():
            spans[-1] = (spans[-1][0], position)
        elif start < position:
            spans.append((start, position))
    return spans


def render_reply(messages, tools, chat):
    """(text, spans) of a conversation that ends with the reply as the target produces it, reasoning included.

    Templates of reasoning models drop what stands before </think> from every turn: right for the history, but it loses
    the reasoning of the last reply. Then the text is the generation prompt, and behind it what the target answers.
    """
    text, last = render(chat.tokenizer, messages, tools), messages[-1]
    spans = find_spans(text, chat.template, chat.opening)
    content, reasoning = last["content"] or "", last["reasoning"] or ""
    if not reasoning and "</think>" in content:
        reasoning, content = content.removeprefix("<think>").split("</think>", 1)
    kept = "tool_calls" in last or not spans or "</think>" in text[spans[-1][0] :]
    if not reasoning.strip() or kept or "</think>" not in str(chat.tokenizer.chat_template):
        return text, spans
    prompt = render(chat.tokenizer, messages[:-1], tools, add_generation_prompt=True)
    prompt = re.sub(r"(<think>\n?)?\Z", "<think>\n", prompt, count=1)
    text = f"{prompt}{reasoning.strip()}\n</think>\n\n{content.strip()}{chat.template.ends[0]}"
    return text, find_spans(text, chat.template, chat.opening)


def chat_spans(row, chat):
    """(text, spans) of a row with messages."""
    messages, tools = read_conversation(row)
    content = json.dumps([messages, tools], ensure_ascii=False)
    for marker in chat.template.headers + chat.template.ends:
        # No text may contain one: a prompt could declare itself supervised, a reply end too early.
        if json.dumps(marker.strip(), ensure_ascii=False)[1:-1] in content:
            raise Rejected("marker inside content", repr(marker))
    others = [message | {"content": "x"} if message["role"] == "tool" else message for message in messages]
    try:
        text, spans = render_reply(messages, tools, chat)
        other, other_spans = render_reply(others, tools, chat) if others != messages else (text, spans)
    except Exception as error:  # whatever the template's own code raises on this row concerns this row only
        raise Rejected("template error", f"{type(error).__name__}: {error}") from None
    # An unknown template may close a call by a marker of its own, so that the span would run on.
    if [text[start:end] for start, end in spans] != [other[start:end] for start, end in other_spans]:
        raise Rejected("turns not marked", "a tool's output would be supervised")
    if len(spans) != (turns := sum(message["role"] == "assistant" for message in messages)):
        raise Rejected("turns not marked", f"{len(spans)} marked replies for {turns} assistant turns")
    return text, spans


def encode(text, spans, encoder):
    """(ids int32 [T], mask uint8 [T]) from one encoding: supervised is a token whose characters all lie in one span."""
    encoding = encoder.encode(text, add_special_tokens=False)
    starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=np.uint8)
    for start, end in spans:
        # A token of no characters stands behind what was trimmed off it, so at the span's start it is still prompt.
        mask |= (starts >= start) & (ends <= end) & ((ends > starts) | (ends > start))
    return np.array(encoding.ids, dtype=np.int32), mask


def tokenise(raw, chat):
    """(ids, mask, number of tokens cut off) of one row, given as the bytes of its line. Raises Rejected."""
    try:
        row = json.loads(raw.decode() or "{}")
        json.dumps(row, ensure_ascii=False).encode() if b"\\u" in raw else None  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise Rejected("not JSON", error) from None
    if not isinstance(row, dict):
        raise Rejected("not an object", type(row).__name__)
    if row.get("input_ids") is not None:
        ids, mask, size = row["input_ids"], row.get("loss_mask"), chat.encoder.get_vocab_size()
        lists = isinstance(ids, list) and isinstance(mask, list) and len(ids) == len(mask)
        if not lists or not all(type(value) is int for value in ids + mask) or not set(mask) <= {0, 1}:
            raise Rejected("bad tokens", "input_ids (integers) and loss_mask (0 or 1) must be lists of one length")
        if ids and not 0 <= min(ids) <= max(ids) < size:
            raise Rejected("bad tokens", f"token ids {min(ids)} to {max(ids)}, the tokenizer has {size}")
        ids, mask = np.array(ids, dtype=np.int32), np.array(mask, dtype=np.uint8)
        if chat.only_last and mask.any():  # the last run of ones is the last turn
            mask[: np.flatnonzero(np.diff(mask, prepend=0) == 1)[-1]] = 0
    else:
        text, spans, is_chat = row.get("text"), [], "conversations" in row or "messages" in row
        if not chat.tokenizer.chat_template and (is_chat or chat.template is None):
            raise Rejected("no chat template in the tokenizer", "needed to render messages, or for the markers of auto")
        if is_chat:
            text, spans = chat_spans(row, chat)
        elif isinstance(text, str):
            spans = find_spans(text, chat.template, chat.opening)
        elif row:
            raise Rejected("unknown form", f"fields {', '.join(row)}")
        ids, mask = encode(text or "", spans[-1:] if chat.only_last else spans, chat.encoder)
    if not len(ids):
        raise Rejected("empty", "no text")
    ids, mask, cut = ids[: chat.max_length], mask[: chat.max_length], max(0, len(ids) - chat.max_length)
    if not mask.any():
        raise Rejected("no supervised token", f"within {chat.max_length} tokens" if cut else "")
    return ids, mask, cut


def tokenise_row(row, chat):
    """For datasets' map: columns of a row; without tokens, but with cause and detail, if it is rejected."""
    ids, mask, cut, cause, detail = np.zeros(0, np.int32), np.zeros(0, np.uint8), 0, "", ""
    try:
        ids, mask, cut = tokenise(row["raw"], chat)
    except Rejected as rejected:
        cause, detail = rejected.args[0], str(rejected.args[1])[:200]
    return {"input_ids": ids, "loss_mask": mask, "length": len(ids), "cut": cut, "cause": cause, "detail": detail}


# ---------------------------------------------------------------------------- does the template fit the tokenizer?
PROBE = [{"role": "user", "content": "Qone"}, {"role": "assistant", "content": "Aone"},
         {"role": "user", "content": "Qtwo"}, {"role": "assistant", "content": "Atwo"}]  # fmt: skip


def fits(text, template):
    """Does the rendered probe show both of its replies, each closed by an end marker?"""
    parts = [text[start:end] for start, end in find_spans(text, template)]
    return [part.endswith(template.ends) and re.findall("Aone|Atwo", part) for part in parts] == [["Aone"], ["Atwo"]]


def derive_template(tokenizer, text, prompt):
    """The markers in the rendered probe and generation prompt, for a family that TEMPLATES does not name; or None.

    Header: what the generation prompt has behind the question, as far as it stands before both replies, without what
    closes the question if that can be told apart. Ends: the first special token behind each reply.
    """
    question = render(tokenizer, PROBE[:1])
    found = re.search("Qone(.*?)Aone(.*?)Qtwo(.*?)Atwo(.*)", text, re.DOTALL)
    first, end_one, second, end_two = found.groups() if found else [""] * 4
    header = os.path.commonprefix([prompt.rpartition("Qone")[2], first, second])
    header = header.removeprefix(question.rpartition("Qone")[2]) if len(prompt) > len(question) else header
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = re.compile(r"\s*(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")")
    ends = [match[1] for match in map(special.match, (end_two, end_one)) if match and match[1]]
    return Template((header,), tuple(dict.fromkeys(ends))) if header.strip() and ends else None


def make_chat(tokenizer, name, max_length, only_last):
    """The Chat of a tokenizer and a chat_template. Ends with one line if the template's markers do not occur."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.post_processor = None
    encoder.no_truncation()
    encoder.no_padding()
    if not tokenizer.chat_template:  # only rows rendered or tokenised beforehand can be used
        return Chat(tokenizer, encoder, TEMPLATES.get(name), "", max_length, only_last)
    try:
        text, prompt = render(tokenizer, PROBE), render(tokenizer, PROBE[:1], add_generation_prompt=True)
        templates = TEMPLATES | {"auto": derive_template(tokenizer, text, prompt)}
    except Exception as error:  # the template is foreign code
        fail(f"the tokenizer's chat template does not render a plain conversation: {type(error).__name__}: {error}")
    fitting = [known for known, template in templates.items() if template and fits(text, template)]
    if name == "auto" and fitting:  # a known family comes first: it also brings markers that the probe does not show
        name = fitting[0]
    template = templates[name]
    if name not in fitting:
        wanted = f"{' or '.join(map(repr, template.headers))} ... {template.ends[0]!r}" if template else "markers"
        remedy = f"use --chat_template {' or '.join(fitting)}" if fitting else "give rows with input_ids and loss_mask"
        fail(f"chat_template {name}: no {wanted} in what the tokenizer renders: {text[:200]!r}; {remedy}")
    behind = [prompt.rpartition(header)[2] for header in template.headers if header in prompt]
    return Chat(tokenizer, encoder, template, min(behind, key=len, default=""), max_length, only_last)


# ---------------------------------------------------------------------------- where rows come from: presets, files
# Suites of tests, and programs that act on import or open windows: their docstrings explain nothing.
NOT_DOCUMENTED = {"antigravity", "this", "idlelib", "turtledemo", "test", "tests", "__main__", "idle_test", "lib2to3"}
KINDS = {ast.Module: "module", ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}


@functools.cache
def pydoc_lines():
    """Rows on the running Python's standard library: a question by name, the docstring as the answer.

    The sources are parsed, nothing is imported. The first four docstrings of a class make one conversation.
    """
    library, seen, lines = Path(sysconfig.get_path("stdlib")), set(), []

    def turns(name, node):
        kind, short, doc = KINDS[type(node)], name.rpartition(".")[2], ast.get_docstring(node) or ""
        if short.startswith("_") or len(doc) < 20 or doc in seen:  # private, hardly documented, or said already
            return []
        seen.add(doc)
        answer = f"{short}({ast.unparse(node.args)})\n\n{doc}" if kind == "function" else f"{kind} {name}\n\n{doc}"
        question = ("What does the {} {} do?", "Explain the {} {}.", "What is the {} {} for?")[len(name) % 3]
        return [{"role": "user", "content": question.format(kind, name)}, {"role": "assistant", "content": answer}]

    for module in sorted(sys.stdlib_module_names - NOT_DOCUMENTED):
        for path in [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]:
            parts = path.relative_to(library).with_suffix("").parts
            module_name = ".".join(parts).removesuffix(".__init__")
            if not path.is_file() or NOT_DOCUMENTED & set(parts) or re.search(r"(^|\.)_", module_name):
                continue
            tree = ast.parse(path.read_bytes())
            topics = {f"{module_name}.{node.name}": node for node in tree.body if type(node) in KINDS}
            for name, node in [(module_name, tree), *topics.items()]:
                messages = turns(name, node)
                for part in node.body if type(node) is ast.ClassDef else ():
                    if type(part) in KINDS:
                        messages += turns(f"{name}.{part.name}", part)
                chats = [messages[:8], *(messages[at : at + 2] for at in range(8, len(messages), 2))]
                lines += [json.dumps({"id": f"pydoc {name}", "conversations": chat}).encode() for chat in chats if chat]
    return lines


PRESETS = {  # name: (repository on the hub, {split: file pattern})
    "sharegpt": ("Aeala/ShareGPT_Vicuna_unfiltered", {"train": "ShareGPT_V4.3_unfiltered_cleaned_split.json"}),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k",
                  {"train": "data/train_sft-*.parquet", "validation": "data/test_sft-*.parquet"}),
    "pydoc": (None, {"train": ""}),
}  # fmt: skip
# max_rejected_ratio where not 0.01. ShareGPT is raw chats; assumed, so that only a wrong template or schema stops.
TOLERATED = {"sharegpt": 0.1}


def find_files(name, dataset_path, split):
    """Files behind the name of a preset or file; missing and empty ones end here, before anything is loaded."""
    if name not in PRESETS:
        if not (path := Path(name).expanduser()).is_file():
            fail(f"dataset {name}: no such file, and not one of the presets {', '.join(PRESETS)}")
        if next(read_lines(path), None) is None:
            fail(f"dataset {name} is empty: no row in it")
        return [path]
    repo, patterns = PRESETS[name]
    if split not in patterns:
        fail(f"preset {name} has no {split} split: use --validation_ratio, or a file of your own")
    if not repo:
        return []
    folder = Path(dataset_path).expanduser() if dataset_path else download(repo, [patterns[split]], "dataset")
    if not (files := sorted(folder.glob(patterns[split]))):
        fail(f"preset {name}: {folder} has no {patterns[split]}, which {repo} has on the hub")
    return files


def read_lines(path):
    """(line number from 1, line) of a file; blank lines at its end are no rows."""
    blank = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            blank.append((number, line.removeprefix(b"\xef\xbb\xbf").strip()))
            if blank[-1][1]:
                yield from blank
                blank = []


def read_rows(name, files, cache):
    """(row number from 1, bytes of the row as JSON)."""
    if name not in PRESETS:
        yield from read_lines(files[0])
    elif not files:
        yield from enumerate(pydoc_lines(), 1)
    else:
        from datasets import load_dataset

        table = load_dataset(files[0].suffix[1:], data_files=list(map(str, files)), split="train", cache_dir=str(cache))
        for number, row in enumerate(table, 1):
            turns = row.get("conversations") or row.get("messages") or []
            while turns and ROLES.get(turns[0].get("from")) == "assistant":  # a piece of a long chat that was cut
                turns = turns[1:]
            yield number, json.dumps({"messages": turns}).encode()


# ---------------------------------------------------------------------------- building the prepared folder
def build_split(source, files, chat, options, num_samples, num_proc, cache):
    """(Dataset of the rows kept, list of the rejected rows) of one source; cut: number of tokens cut off a row."""
    from datasets import Dataset, Features, List, Value

    rows = lambda: ({"line": line, "raw": raw} for line, raw in read_rows(source, files, cache / "hub"))  # noqa: E731
    data = Dataset.from_generator(rows, cache_dir=str(cache / "raw"), fingerprint="raw")
    if num_samples and num_samples < len(data):
        data = data.select(np.sort(np.random.RandomState(options["seed"]).permutation(len(data))[:num_samples]))
    columns = {"line": Value("int64"), "input_ids": List(Value("int32")), "loss_mask": List(Value("uint8"))}
    columns |= {"length": Value("int32"), "cut": Value("int64"), "cause": Value("string"), "detail": Value("string")}
    workers = min(num_proc, len(data) // MIN_ROWS_PER_PROCESS)
    data = data.map(
        functools.partial(tokenise_row, chat=chat), remove_columns=["raw"], features=Features(columns),
        num_proc=workers if workers > 1 else None, cache_file_name=str(cache / "tokens.arrow"),
        load_from_cache_file=False, desc=source, new_fingerprint="tokens",  # else datasets would hash the tokenizer
    )  # fmt: skip
    total, lengths = len(data), np.array(data["length"][:])
    rejected = data.select(np.flatnonzero(lengths == 0)).select_columns(["line", "cause", "detail"]).to_list()
    data = data.select(np.flatnonzero(lengths)).select_columns(["input_ids", "loss_mask", "length", "cut"])
    limit = TOLERATED.get(source, 0.01) if options["max_rejected_ratio"] is None else options["max_rejected_ratio"]
    if not len(data) or len(rejected) > limit * total:
        first = {row["cause"]: row["line"] for row in reversed(rejected)}
        counts = Counter(row["cause"] for row in rejected).most_common()
        causes = ", ".join(f"{count} {cause} (first: line {first[cause]})" for cause, count in counts)
        share = f"{len(rejected)} of {total} rows rejected ({len(rejected) / total:.1%}, max_rejected_ratio {limit:g})"
        fail(f"{source}: {share if len(data) else f'none of {total} rows can be used'}: {causes}")
    return data, [{"file": source, **row} for row in rejected]


def build(sources, chat, options, num_proc, config, folder):
    """Write the prepared folder; config gets the counts and is written last, so that it vouches for all the rest."""
    from datasets import DatasetDict, disable_progress_bars

    if not sys.stderr.isatty():  # in a log file a bar is noise
        disable_progress_bars()
    splits, rejected, vocabulary = {}, {}, 1 + max(chat.encoder.get_vocab().values())
    for split, (source, files) in sources.items():
        cache, samples = folder.with_name("cache") / split, options["num_samples"] if split == "train" else None
        cache.mkdir(parents=True)
        splits[split], rejected[split] = build_split(source, files, chat, options, samples, num_proc, cache)
    if options["validation_ratio"]:
        data, rows = splits["train"], len(splits["train"])
        if (size := max(1, round(rows * options["validation_ratio"]))) >= rows:
            fail(f"validation_ratio {options['validation_ratio']} leaves none of {rows} rows to train on")
        order = np.random.RandomState(options["seed"]).permutation(rows)
        splits = {"train": data.select(np.sort(order[size:])), "validation": data.select(np.sort(order[:size]))}
    DatasetDict(splits).remove_columns("cut").save_to_disk(str(folder))
    for split, data in splits.items():
        lengths, counts = np.array(data["length"][:]), np.zeros(vocabulary, dtype=np.int64)
        for batch in data.with_format("arrow").iter(batch_size=1000):
            ids, mask = (batch[name].combine_chunks().flatten().to_numpy() for name in ("input_ids", "loss_mask"))
            counts += np.bincount(ids[mask == 1], minlength=len(counts))
        if split == "train":
            torch.save({int(token): int(counts[token]) for token in np.flatnonzero(counts)}, folder / "token_freq.pt")
        part = config["splits"][split] = {
            "rows": len(data), "tokens": int(lengths.sum()), "supervised_tokens": int(counts.sum()),
            "longest": int(lengths.max()), "truncated": int(np.count_nonzero(data["cut"][:])),
            "rejected": Counter(row["cause"] for row in rejected.get(split, ())),
        }  # fmt: skip
        print(f"{split}: {part['rows']:,} rows, {part['supervised_tokens']:,} of {part['tokens']:,} tokens supervised, "
              f"longest row {part['longest']:,}, {part['truncated']:,} truncated; "
              f"rejected: {dict(part['rejected']) or 'none'}")  # fmt: skip
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for rows in rejected.values() for row in rows]
    write_atomic(folder / "rejected.jsonl", "".join(lines))
    write_atomic(folder / "data_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def prepare(dataset, output_path, target_model_path, *, validation_dataset=None, dataset_path=None,
            chat_template="llama3", max_length=2048, num_samples=None, train_only_last_turn=False, validation_ratio=0.0,
            num_proc=None, max_rejected_ratio=None, seed=0, trust_remote_code=False):  # fmt: skip
    """Write the prepared folder, or keep it if its fingerprint is the one wanted. Returns its data_config as a dict.

    dataset: name of a preset or path of a JSON Lines file. One process calls this, the others wait and use open_data.
    """
    names = {"train": str(dataset)} | ({"validation": str(validation_dataset)} if validation_dataset else {})
    output, known = Path(output_path).expanduser().absolute(), [*TEMPLATES, "auto"]
    stored = output / "data_config.json"
    foreign = output.exists() and not stored.is_file() and (output.is_file() or any(output.iterdir()))
    for wrong, message in (
        (chat_template not in known, f"chat_template {chat_template}: known are {', '.join(known)}"),
        (not 0 <= validation_ratio < 1, f"validation_ratio {validation_ratio} must be in [0, 1)"),
        (not 0 <= (max_rejected_ratio or 0) <= 1, f"max_rejected_ratio {max_rejected_ratio} must be in [0, 1]"),
        (validation_ratio and validation_dataset, "validation_ratio and validation_dataset: give one of them"),
        (dataset_path and not set(names.values()) & {"sharegpt", "ultrachat"},
         f"dataset_path is a copy of a preset's hub repository, but dataset is {dataset}"),
        (foreign, f"output_path {output} holds something that is not a prepared data set: choose another folder"),
    ):  # fmt: skip
        if wrong:
            fail(message)
    sources = {split: (name, find_files(name, dataset_path, split)) for split, name in names.items()}
    tokenizer = load_tokenizer(target_model_path, trust_remote_code)
    chat = make_chat(tokenizer, chat_template, max_length, bool(train_only_last_turn))
    options = {"max_length": max_length, "num_samples": num_samples, "train_only_last_turn": bool(train_only_last_turn)}
    options |= {"validation_ratio": validation_ratio, "max_rejected_ratio": max_rejected_ratio, "seed": seed % 2**32}
    ingredients = options | {
        "format_version": FORMAT_VERSION,
        "presets": [name for name in names.values() if name in PRESETS],
        "inputs": [list(map(hash_file, files)) or hash_of(pydoc_lines()) for _, files in sources.values()],
        "tokenizer": hash_tokenizer(tokenizer), "chat_template": [chat_template, *(chat.template or ())],
    }  # fmt: skip
    fingerprint = hash_of(ingredients)
    if stored.is_file() and json.loads(stored.read_text()).get("fingerprint") == fingerprint:
        print(f"{output}: reused, made of the same input, tokenizer and options (fingerprint {fingerprint[:12]})")
        return open_data(output)[1]
    config = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "ingredients": ingredients, "splits": {}}
    config |= {"dataset": names, "target_model_path": str(target_model_path)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    scratch = output.with_name(f".{output.name}.building")  # renamed, so that a killed build never looks complete
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        build(sources, chat, options, min(num_proc or cores, cores), config, scratch / "new")
        if output.exists():
            output.rename(scratch / "old")
        (scratch / "new").rename(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    data, config = open_data(output)
    ids, mask = (np.array(data["train"][0][name]) for name in ("input_ids", "loss_mask"))
    borders = [0, *np.flatnonzero(np.diff(mask)) + 1, len(ids)]
    parts = [("⟦{}⟧" if mask[a] else "{}").format(tokenizer.decode(ids[a:b])) for a, b in itertools.pairwise(borders)]
    print(f"the first row, supervised between ⟦ and ⟧:\n{''.join(parts)[:1500]}\nwritten to {output}")
    return config


# ---------------------------------------------------------------------------- command line
FLAGS = {
    "input": [
        ("dataset", str, ..., f"preset ({', '.join(PRESETS)}) or path of a JSON Lines file"),
        ("dataset_path", str, None, "local copy of the preset's hub repository, instead of a download"),
        ("validation_dataset", str, None, "JSON Lines file, or ultrachat for its test split"),
        ("target_model_path", str, ..., "folder or hub id; only the tokenizer is loaded"),
        ("trust_remote_code", boolean, False, "let the tokenizer run code of its own"),
    ],
    "what becomes of it": [
        ("output_path", str, ..., "folder to write"),
        ("chat_template", str, "llama3", f"{', '.join(TEMPLATES)} or auto, which finds it out"),
        ("max_length", int, 2048, "tokens; longer rows are truncated at the right", 2),
        ("num_samples", int, None, "rows of the training input, taken at random; none: all", 1),
        ("train_only_last_turn", boolean, False, "supervise only the last assistant turn of each row"),
        ("validation_ratio", float, 0.0, "share of the rows kept back for validation"),
        ("max_rejected_ratio", float, None, "share of unusable rows; none: 0.01, sharegpt 0.1"),
        ("seed", int, 0, "of num_samples and validation_ratio"),
        ("num_proc", int, None, "processes, at most one a core; none: one a core", 1),
    ],
}


def parse_args(argv=None):
    return parse_flags(__doc__, FLAGS, argv)


def main(args):
    return prepare(**vars(args))


if __name__ == "__main__":
    main(parse_args())
