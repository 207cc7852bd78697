"""Conversations: one row of JSON as messages, and the presets: data sets with a name.

In:  rows {"conversations" or "messages": [{"role", "content"} or {"from", "value"}, ...], "tools"}; rows in the schema
     of a preset's hub repository.
Out: messages {"role", "content"}, the role one of system, user, assistant and tool; an assistant's also have
     "reasoning" and "tool_calls".
"""

import ast
import contextlib
import functools
import json
import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "function_call"),
    "tool": ("tool", "function", "observation", "ipython"),
}
ROLES = {name: role for role, names in NAMES.items() for name in names}

NEXT_ROLES = {  # "" is the start of a conversation
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}

TURN_FIELDS = ("conversations", "messages", "conversation")  # of a row

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


# ==================== A row of JSON as messages ======================================================================


UNANSWERED = "no question with a reply"  # the cause of a row in which there is nothing to learn


class Rejected(Exception):
    """A row that cannot be used. Arguments: the cause, by which it is counted, and a short detail."""


def read_conversation(row):
    """(messages, tools) of a row. Turns after the last assistant turn are dropped: nothing of them is supervised."""
    turns = next((row[field] for field in TURN_FIELDS if row.get(field)), None)
    if not turns:
        raise Rejected(UNANSWERED, "no messages")
    if not is_list_of_objects(turns):
        raise Rejected("malformed message", "the messages are not a list of objects")
    messages = [read_message(turn) for turn in drop_unasked(turns)]
    roles = [message["role"] for message in messages]
    check_order(roles)
    tools = read_tools(row)
    after_last = len(roles) - roles[::-1].index("assistant")
    return messages[:after_last], tools


def has_turns(row):
    """Is the row a conversation?"""
    return any(field in row for field in TURN_FIELDS)


def drop_unasked(turns):
    """The turns without replies and outputs in front of the first question, with which a part of a long chat begins."""
    roles = [ROLES.get(str(turn.get("role") or turn.get("from")).strip().lower()) for turn in turns]
    if "user" not in roles:
        return turns
    first = roles.index("user")
    kept = [turn for turn, role in zip(turns[:first], roles[:first], strict=True) if role not in ("assistant", "tool")]
    return kept + turns[first:]


def is_list_of_objects(value):
    """Is the value a list of JSON objects?"""
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def check_order(roles):
    """Raise Rejected unless the roles alternate as chat templates expect, with a question and a reply among them."""
    if "assistant" not in roles or "user" not in roles:
        raise Rejected(UNANSWERED, " ".join(roles))
    before = ""
    for role in roles:
        if role not in NEXT_ROLES[before]:
            raise Rejected("roles out of order", " ".join(roles))
        before = role


def read_tools(row):
    """The tools of a row, a list of objects or the JSON of one; None if it has none."""
    tools = row.get("tools") or None
    if isinstance(tools, str):
        with contextlib.suppress(ValueError):
            tools = json.loads(tools)
    if tools is not None and not is_list_of_objects(tools):
        raise Rejected("malformed tools", "neither a list of objects nor the JSON of one")
    return tools


def read_message(turn):
    """A message with role and content; an assistant's also with reasoning (None if it has none) and tool_calls."""
    name = turn.get("role") or turn.get("from")
    role = ROLES.get(str(name).lower())
    if role is None:
        raise Rejected("unknown role", repr(name))
    content = read_content(turn)
    if role == "tool" and not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    message = {key: turn[key] for key in ("tool_calls", "tool_call_id", "name", "cut") if turn.get(key)}
    message["role"] = role
    if role == "assistant":
        message["reasoning"] = read_reasoning(turn)
        calls = message.get("tool_calls", [])
        read_calls(calls)
        if not isinstance(content, str | None) or not (content or "").strip():
            if not calls and not message["reasoning"]:
                raise Rejected("empty", "an assistant turn without content")
            content = None if calls else ""  # some templates drop the calls of a message that has content
    if not isinstance(content, str) and "tool_calls" not in message:
        raise Rejected("malformed message", f"the content of a {role} turn is {type(content).__name__}")
    message["content"] = content
    return message


def read_content(turn):
    """The content of a turn; a list of text parts is concatenated."""
    content = turn.get("content")
    if content is None:
        content = turn.get("value")
    if not isinstance(content, list):
        return content
    if all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content


def read_reasoning(turn):
    """The first reasoning field with text in it, or None."""
    for key in REASONING_FIELDS:
        text = turn.get(key)
        if isinstance(text, str) and text.strip():
            return text
    return None


def read_calls(calls):
    """Check tool calls and turn their arguments, text on the wire, into the object that templates expect."""
    if not is_list_of_objects(calls):
        raise Rejected("malformed message", "tool_calls is not a list of objects")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Rejected("malformed message", "a call of tool_calls has no name")
        with contextlib.suppress(ValueError, TypeError, KeyError):  # an object already, none, or no JSON
            function["arguments"] = json.loads(function["arguments"])


# ==================== The preset pydoc: Python's standard library ====================================================

# Test suites, and programs that act on import or open windows: their docstrings explain nothing.
NOT_DOCUMENTED = {"antigravity", "this", "idlelib", "turtledemo", "test", "tests", "__main__", "idle_test", "lib2to3"}

KINDS = {ast.Module: "module", ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}

QUESTIONS = ("What does the {} {} do?", "Explain the {} {}.", "What is the {} {} for?")

FIRST_PYDOC_TURNS = 8  # messages of a class in one conversation; each further question is one of its own


@functools.cache
def pydoc_lines():
    """Rows on the running Python's standard library: a question by name, the docstring as the answer.

    The sources are parsed, nothing is imported. The first four docstrings of a class make one conversation.
    """
    seen = set()
    lines = []
    for module_name, path in stdlib_modules():
        tree = ast.parse(path.read_bytes())
        topics = {f"{module_name}.{node.name}": node for node in tree.body if type(node) in KINDS}
        for name, node in [(module_name, tree), *topics.items()]:
            messages = pydoc_turns(name, node, seen)
            if isinstance(node, ast.ClassDef):
                for part in node.body:
                    if type(part) in KINDS:
                        messages += pydoc_turns(f"{name}.{part.name}", part, seen)
            for turns in split_turns(messages):
                row = {"id": f"pydoc {name}", "conversations": turns}
                lines.append(json.dumps(row).encode())
    return lines


def stdlib_modules():
    """(name, path) of the public modules of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names - NOT_DOCUMENTED):
        for path in [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]:
            parts = path.relative_to(library).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            is_private = re.search(r"(^|\.)_", name)
            if path.is_file() and not NOT_DOCUMENTED & set(parts) and not is_private:
                yield name, path


def pydoc_turns(name, node, seen):
    """[question, answer] on a module, class or function; [] if private, hardly documented, or a docstring of `seen`."""
    short = name.rpartition(".")[2]
    doc = ast.get_docstring(node) or ""
    if short.startswith("_") or len(doc) < 20 or doc in seen:
        return []
    seen.add(doc)
    kind = KINDS[type(node)]
    title = f"{short}({ast.unparse(node.args)})" if kind == "function" else f"{kind} {name}"
    question = QUESTIONS[len(name) % 3].format(kind, name)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": f"{title}\n\n{doc}"}]


def split_turns(messages):
    """The messages as conversations."""
    if messages:
        yield messages[:FIRST_PYDOC_TURNS]
    for start in range(FIRST_PYDOC_TURNS, len(messages), 2):
        yield messages[start : start + 2]


# ==================== Rows of the presets ============================================================================


def pair(question, answer):
    """A row of one question and one answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def gsm8k(row):
    """<<48/2=24>> is meant for a calculator."""
    return pair(row["question"], re.sub("<<.*?>>", "", row["answer"]))


def instruction(row):
    """Alpaca's form: some instructions have an input of their own."""
    parts = [row["instruction"], row["input"]]
    return pair("\n\n".join(filter(None, parts)), row["output"])


def math_qa(row):
    """The options are one text; many rationales are quoted."""
    return pair(f"{row['Problem']}\n{row['options']}", row["Rationale"].strip(' "'))


def sciq(row):
    """The options in alphabetical order; the support, if there is one, leads to the answer."""
    correct = row["correct_answer"]
    options = sorted([correct, row["distractor1"], row["distractor2"], row["distractor3"]])
    lines = [f"{letter}) {option}" for letter, option in zip("abcd", options, strict=True)]
    answer = f"{row['support']}\n\nThe answer is {lines[options.index(correct)]}".lstrip()
    return pair("\n".join([row["question"], *lines]), answer)


class Preset(NamedTuple):
    """A data set with a name.

    hub: repositories. files: {split: patterns, of which the first that matches counts}. convert: function from the
    columns to a row that read_conversation reads; columns: those of question and answer, in place of convert; neither
    where rows are conversations.
    rejected: max_rejected_ratio unless given. revision: of the repository, None for the newest.
    """

    hub: tuple
    files: dict
    convert: Callable | None = None
    columns: tuple = ()
    rejected: float = 0.01
    revision: str | None = None

    def to_row(self, row):
        """The row of JSON for a row of the repository."""
        if self.convert:
            return self.convert(row)
        if self.columns:
            question, answer = self.columns
            return pair(row[question], row[answer])
        return row


PARQUET = {"train": ("data/train-*.parquet",)}

PRESETS = {
    "sharegpt": Preset(
        hub=("Aeala/ShareGPT_Vicuna_unfiltered",),
        files={"train": ("ShareGPT_V4.3_unfiltered_cleaned_split.json",)},
        rejected=0.1,  # raw chats; the ratio is assumed, so that only a wrong template or schema stops
    ),
    "ultrachat": Preset(
        hub=("HuggingFaceH4/ultrachat_200k",),
        files={"train": ("data/train_sft-*.parquet",), "validation": ("data/test_sft-*.parquet",)},
    ),
    "eaglechat": Preset(
        hub=("zhaode/EagleChat",),
        files={"train": ("data/train-*.parquet", "*.parquet", "*.jsonl", "*.json")},
        rejected=0.1,
    ),
    "perfectblend": Preset(hub=("mlabonne/open-perfectblend",), files=PARQUET),
    "magpie-qwen2.5-pro-1m-v0.1": Preset(
        hub=("Magpie-Align/Magpie-Qwen2.5-Pro-1M-v0.1",),
        files=PARQUET,
    ),
    "opencodeinstruct": Preset(hub=("nvidia/OpenCodeInstruct",), files=PARQUET, columns=("input", "output")),
    "codealpaca-20k": Preset(
        hub=("sahil2801/CodeAlpaca-20k",),
        files={"train": ("code_alpaca_20k.json",)},
        convert=instruction,
    ),
    "magicoder-evol-instruct": Preset(
        hub=("ise-uiuc/Magicoder-Evol-Instruct-110K",),
        files={"train": ("data-evol_instruct-decontaminated.jsonl",)},
        columns=("instruction", "response"),
    ),
    "gsm8k": Preset(
        hub=("openai/gsm8k",),
        files={"train": ("main/train-*.parquet",), "validation": ("main/test-*.parquet",)},
        convert=gsm8k,
    ),
    "hendrycks_math": Preset(
        hub=("EleutherAI/hendrycks_math",),
        files={"train": ("*/train-*.parquet",), "validation": ("*/test-*.parquet",)},
        columns=("problem", "solution"),
    ),
    "math_qa": Preset(
        hub=("allenai/math_qa",),
        files={
            "train": ("default/train/*.parquet", "train.json"),
            "validation": ("default/validation/*.parquet", "dev.json"),
        },
        convert=math_qa,
        revision="refs/convert/parquet",  # the repository holds a program; the hub keeps its output as a revision
    ),
    "camel": Preset(
        hub=("camel-ai/biology", "camel-ai/chemistry", "camel-ai/physics"),
        files={"train": ("*.zip",)},
        columns=("message_1", "message_2"),
    ),
    "sciq": Preset(
        hub=("allenai/sciq",),
        files=PARQUET | {"validation": ("data/validation-*.parquet",)},
        convert=sciq,
    ),
    "pydoc": Preset(hub=(), files={"train": ()}),
}
