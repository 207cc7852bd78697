"""conversations."""

import ast
import contextlib
import functools
import json
import re
import sys
import sysconfig
from collections import namedtuple
from pathlib import Path

from core import common

ROLES = dict.fromkeys(("system", "developer"), "system") | dict.fromkeys(("user", "human", "prompter"), "user")

ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "function_call"), "assistant")

ROLES |= dict.fromkeys(("tool", "function", "observation", "ipython"), "tool")

AFTER = {"": "system user", "system": "user", "user": "assistant", "assistant": "user tool", "tool": "tool assistant"}

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


# ---------------------------------------------------------------------------- one row of JSON to messages
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
    if not isinstance(tools, list | None) or not all(isinstance(tool, dict) for tool in tools or ()):
        raise Rejected("malformed tools", "neither a list of objects nor the JSON of one")
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
    message = {key: turn[key] for key in ("tool_calls", "tool_call_id", "name", "cut") if turn.get(key)} | {
        "role": role
    }
    if role == "assistant":
        texts = (turn[key] for key in REASONING_FIELDS if isinstance(turn.get(key), str) and turn[key].strip())
        message["reasoning"] = next(texts, None)
        calls = message.get("tool_calls", [])
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise Rejected("malformed message", "tool_calls is not a list of objects")
        for call in calls:  # their arguments are text on the wire, but templates want the object
            function = call.get("function", call)
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise Rejected("malformed message", "a call of tool_calls has no name")
            with contextlib.suppress(ValueError, TypeError, KeyError):  # an object already, none, or no JSON
                function["arguments"] = json.loads(function["arguments"])
        if not isinstance(content, str | None) or not (content or "").strip():
            if not calls and not message["reasoning"]:
                raise Rejected("empty", "an assistant turn without content")
            content = None if calls else ""  # some templates drop the calls of a message that has content
    if not isinstance(content, str) and "tool_calls" not in message:
        raise Rejected("malformed message", f"the content of a {role} turn is {type(content).__name__}")
    return message | {"content": content}


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


def chat(row):
    """Rows with a list of turns; a piece of a long chat that was cut loses the reply without its question."""
    turns = row.get("conversations") or row.get("messages") or []
    while turns and ROLES.get(turns[0].get("from") or turns[0].get("role")) == "assistant":
        turns = turns[1:]
    return {"messages": turns}


def pair(row, question, answer):
    """Rows with a question in one column and its answer in another."""
    return chat(
        {"messages": [{"role": "user", "content": row[question]}, {"role": "assistant", "content": row[answer]}]}
    )


def gsm8k(row):
    """<<48/2=24>> is meant for a calculator."""
    return pair({"question": row["question"], "answer": re.sub("<<.*?>>", "", row["answer"])}, "question", "answer")


def instruction(row):
    """Alpaca's form: some instructions have an input of their own."""
    question = "\n\n".join(filter(None, (row["instruction"], row["input"])))
    return pair({"question": question, "output": row["output"]}, "question", "output")


def math_qa(row):
    """Options are one text; many rationales are quoted."""
    question = f"{row['Problem']}\n{row['options']}"
    return pair({"question": question, "answer": row["Rationale"].strip(' "')}, "question", "answer")


def sciq(row):
    """The options in alphabetical order; the support, if there is one, leads to the answer."""
    right = row["correct_answer"]
    options = sorted([right, *(row[f"distractor{i}"] for i in (1, 2, 3))])
    lines = [f"{letter}) {option}" for letter, option in zip("abcd", options, strict=True)]
    answer = f"{row['support']}\n\nThe answer is {lines[options.index(right)]}".lstrip()
    return pair({"question": "\n".join([row["question"], *lines]), "answer": answer}, "question", "answer")


# hub: repositories; files: {split: patterns, of which the first that matches counts}; convert: from the columns to a
# row that read_conversation reads; rejected: max_rejected_ratio, unless given.
Preset = namedtuple("Preset", ("hub", "files", "convert", "rejected", "revision"), defaults=(0.01, None))

PARQUET = {"train": ("data/train-*.parquet",)}

PRESETS = {
    # Raw chats; assumed, so that only a wrong template or schema stops.
    "sharegpt": Preset(("Aeala/ShareGPT_Vicuna_unfiltered",),
                       {"train": ("ShareGPT_V4.3_unfiltered_cleaned_split.json",)}, chat, 0.1),
    "ultrachat": Preset(("HuggingFaceH4/ultrachat_200k",),
                        {"train": ("data/train_sft-*.parquet",), "validation": ("data/test_sft-*.parquet",)}, chat),
    "eaglechat": Preset(("zhaode/EagleChat",),
                        {"train": ("data/train-*.parquet", "*.parquet", "*.jsonl", "*.json")}, chat, 0.1),
    "perfectblend": Preset(("mlabonne/open-perfectblend",), PARQUET, chat),
    "magpie-qwen2.5-pro-1m-v0.1": Preset(("Magpie-Align/Magpie-Qwen2.5-Pro-1M-v0.1",), PARQUET, chat),
    "opencodeinstruct": Preset(("nvidia/OpenCodeInstruct",), PARQUET,
                               functools.partial(pair, question="input", answer="output")),
    "codealpaca-20k": Preset(("sahil2801/CodeAlpaca-20k",), {"train": ("code_alpaca_20k.json",)}, instruction),
    "magicoder-evol-instruct": Preset(("ise-uiuc/Magicoder-Evol-Instruct-110K",),
                                      {"train": ("data-evol_instruct-decontaminated.jsonl",)},
                                      functools.partial(pair, question="instruction", answer="response")),
    "gsm8k": Preset(("openai/gsm8k",),
                    {"train": ("main/train-*.parquet",), "validation": ("main/test-*.parquet",)}, gsm8k),
    "hendrycks_math": Preset(("EleutherAI/hendrycks_math",),
                             {"train": ("*/train-*.parquet",), "validation": ("*/test-*.parquet",)},
                             functools.partial(pair, question="problem", answer="solution")),
    # The repository holds a program; the hub keeps what it gives as a revision of its own.
    "math_qa": Preset(("allenai/math_qa",),
                      {"train": ("default/train/*.parquet", "train.json"),
                       "validation": ("default/validation/*.parquet", "dev.json")},
                      math_qa, 0.01, "refs/convert/parquet"),
    "camel": Preset(("camel-ai/biology", "camel-ai/chemistry", "camel-ai/physics"), {"train": ("*.zip",)},
                    functools.partial(pair, question="message_1", answer="message_2")),
    "sciq": Preset(("allenai/sciq",), PARQUET | {"validation": ("data/validation-*.parquet",)}, sciq),
    "pydoc": Preset((), {"train": ()}, None),
}  # fmt: skip


def find_files(name, dataset_path, split):
    """Files behind the name of a preset or file; missing and empty ones end here, before anything is loaded."""
    if name not in PRESETS:
        if not (path := Path(name).expanduser()).is_file():
            common.fail(f"dataset {name}: no such file, and not one of the presets {', '.join(PRESETS)}")
        if next(read_lines(path), None) is None:
            common.fail(f"dataset {name} is empty: no row in it")
        return [path]
    preset = PRESETS[name]
    if split not in preset.files:
        common.fail(f"preset {name} has no {split} split: use --validation_ratio, or a file of your own")
    patterns, folders = list(preset.files[split]), [Path(dataset_path or "").expanduser()] if preset.hub else []
    if not dataset_path:
        folders = [common.download(repo, patterns, "dataset", preset.revision) for repo in preset.hub]
    files, least = [], 1 if not dataset_path else len(preset.hub)  # a copy has the files of all repositories
    for folder in folders:
        found = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])
        if len(found) < least:
            wanted = f"{len(found) or 'no'} {' or '.join(patterns)} in {folder}"
            common.fail(f"preset {name}: {wanted}, as in {', '.join(preset.hub)} on the hub")
        files += found
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

        kind = {"jsonl": "json", "zip": "json"}.get(files[0].suffix[1:], files[0].suffix[1:])
        table = load_dataset(kind, data_files=list(map(str, files)), split="train", cache_dir=str(cache))
        for number, row in enumerate(table, 1):
            with contextlib.suppress(KeyError, TypeError, AttributeError):  # other columns: rejected as it is
                row = PRESETS[name].convert(row)
            yield number, json.dumps(row, default=str).encode()
