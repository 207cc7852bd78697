"""Conversations: one row of JSON as messages, and the presets: data sets with a name.

In:  rows {"conversations" or "messages": [{"role", "content"} or {"from", "value"}, ...], "tools"}; rows in the schema
     of a preset's hub repository.
Out: messages {"role", "content"}, the role one of system, user, assistant and tool; an assistant's also have
     "reasoning", "tool_calls" if it calls, and "supervised", which is False if the row says that it is not to be
     trained.
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
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "ai", "function_call", "tool_call"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response"),
}
ROLES = {name: role for role, names in NAMES.items() for name in names}
CALLING_ROLES = ("function_call", "tool_call")  # of an assistant's turn whose content is the JSON of calls

NEXT_ROLES = {  # "" is the start of a conversation
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}

TURN_FIELDS = ("conversations", "messages", "conversation")  # of a row

CONTENT_FIELDS = ("content", "value", "text")

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning", "thought")

EMPTY_THOUGHT = re.compile(r"\A\s*<think>\s*</think>\s*")
OPEN_THOUGHT = re.compile(r"^\s*<think>", re.MULTILINE)

SYSTEM_FIELDS = (  # of a row, beside its turns
    "system",
    "system_prompt",
    "system_message",
    "system_instruction",
    "systemPrompt",
    "systemMessage",
    "systemInstruction",
)

# Keys of a turn, or of a row, that change what was said or how it is rendered.
NOT_READ = ("image", "images", "video", "videos", "audio", "audios")
NOT_READ_IN_ROWS = (*NOT_READ, "chat_template_kwargs", "documents", "history", "reasoning_effort")
NOT_READ_IN_TURNS = (
    *NOT_READ,
    "refusal",
    "prefix",
    "partial",
    "tools",
    "functions",
    "files",
    "attachments",
    "tool_plan",  # Cohere: what the assistant says before its calls
    "train_detail",  # Axolotl: the parts of a reply that are not to be trained
    "training_detail",
    "tool_call",
    "toolCall",
    "toolCalls",
    "function_calls",
    "functionCall",
    "functionCalls",
)
NOT_READ_IN_ADDITIONS = (*NOT_READ_IN_TURNS, "tool_calls", "function_call", *REASONING_FIELDS)  # LangChain

# Types of the parts of a content.
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
THOUGHT_PARTS = ("thinking", "reasoning")
OTHER_PARTS = ("image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio", "file")

NO = ("0", "0.0", "false", "no")
YES = ("1", "1.0", "true", "yes")
# Keys of a turn that say whether it is trained, and the values that say that it is not.
MARKS = {
    "weight": NO,
    "train": NO,
    "training": NO,
    "trainable": NO,
    "loss": NO,
    "loss_mask": NO,
    "loss_weight": NO,
    "supervised": NO,
    "mask": YES,
    "masked": YES,
}
# The same of a row. Its label is that of KTO's rows: any other one says nothing.
ROW_MARKS = {name: MARKS[name] for name in ("weight", "train", "training", "trainable", "supervised", "masked")}
BAD_LABEL = "false"

ARGUMENTS = ("arguments", "parameters")
KEYS_OF_CALLS = ("name", "id", "type", "index")


# ==================== A row of JSON as messages ======================================================================


# Causes of rows in which there is nothing to learn.
UNANSWERED = "no question with a reply"
UNTRAINED = "not to be trained"


class Rejected(Exception):
    """A row that cannot be used. Arguments: the cause, by which it is counted, and a short detail."""


def parse_line(raw):
    """The value in the bytes of a line of JSON. Raises Rejected."""
    try:
        value = json.loads(raw.decode())
        if b"\\u" in raw:  # half a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Rejected("not JSON", error) from None
    return value


def read_conversation(row):
    """(messages, tools) of a row. Turns after the last assistant turn are dropped: nothing of them is supervised."""
    found = find_turns(row)
    if not found:
        raise Rejected(UNANSWERED, "no messages")
    refuse_keys(row, NOT_READ_IN_ROWS, "the row")
    if row.get("enable_thinking") is not None:
        raise Rejected("not read", "enable_thinking of the row")
    messages, *others = [read_turns(turns) for turns in found.values()]
    if any(other != messages for other in others):
        raise Rejected("two conversations", f"{' and '.join(found)} of the row differ")
    messages = add_system_prompt(messages, row)
    roles = [message["role"] for message in messages]
    check_order(roles)
    tools = read_tools(row)
    after_last = len(roles) - roles[::-1].index("assistant")
    return messages[:after_last], tools


def has_turns(row):
    """Is the row a conversation? An empty list is one, unless the row has a text."""
    return bool(find_turns(row)) or not row.get("text") and any(row.get(field) is not None for field in TURN_FIELDS)


def find_turns(row):
    """{field: turns} of the fields that hold a conversation. Raises Rejected if there is only something else."""
    given = {field: decode(row.get(field)) for field in TURN_FIELDS}
    filled = {field: value for field, value in given.items() if value}
    found = {field: value for field, value in filled.items() if is_list_of_objects(value)}
    if filled and not found:
        raise Rejected("malformed message", f"{' and '.join(filled)} of the row: not a list of objects")
    return found


def read_turns(turns):
    """The messages of turns, from the first question on."""
    turns = drop_unasked(turns)
    return join_calls(turns, [read_message(turn) for turn in turns])


def with_reply(turns):
    """The turns with a reply after a question or an output at their end."""
    is_open = role_of(turns[-1]) in ("user", "tool")
    return [*turns, {"role": "assistant", "content": "?"}] if is_open else turns


def drop_unasked(turns):
    """Drop replies and outputs before the first question: the parts of a long chat that was split begin with them."""
    roles = [role_of(turn) for turn in turns]
    if "user" not in roles:
        return turns
    first = roles.index("user")
    kept = [turn for turn, role in zip(turns[:first], roles[:first], strict=True) if role not in ("assistant", "tool")]
    return kept + turns[first:]


def decode(value):
    """What a text of JSON stands for, encoded several times as well; anything else as it is."""
    with contextlib.suppress(ValueError, RecursionError):
        while isinstance(value, str):
            value = json.loads(value)
    return value


def is_json(value):
    """Can the value be written as JSON? Python reads NaN and Infinity, which are none."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def kind_of(value):
    """What a value is in JSON."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")


def is_list_of_objects(value):
    """Is the value a list of JSON objects?"""
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def refuse_keys(given, keys, where):
    """Raise Rejected if a turn or row has one of the keys with something in it: its meaning is not known here."""
    for key in keys:
        if given.get(key):
            raise Rejected("not read", f"{key} of {where}")


def add_system_prompt(messages, row):
    """The messages after the system prompt that stands beside the turns of the row."""
    other = "the first turn"
    for key in SYSTEM_FIELDS:
        text = row.get(key)
        if text is None or isinstance(text, str) and not text.strip():
            continue
        if not isinstance(text, str):
            raise Rejected("malformed message", f"{key} of the row is {kind_of(text)}, not text")
        prompt = {"role": "system", "content": text}
        if messages[0] == prompt:
            continue
        if messages[0]["role"] == "system":
            raise Rejected("two system prompts", f"{key} of the row and {other} differ")
        messages = [prompt, *messages]
        other = f"{key} of the row"
    return messages


def join_calls(turns, messages):
    """The messages; calls in turns of their own are appended to the assistant's turn before them."""
    joined = []
    for turn, message in zip(turns, messages, strict=True):
        is_call = name_of(turn) in CALLING_ROLES and not message["content"]
        if is_call and joined and joined[-1]["role"] == "assistant":
            calls = joined[-1].get("tool_calls", [])
            joined[-1]["tool_calls"] = calls + message["tool_calls"]
            joined[-1]["supervised"] &= message["supervised"]
        else:
            joined.append(message)
    return joined


def check_order(roles):
    """Raise Rejected unless the roles alternate as chat templates expect, with a question and a reply among them.

    A reply that follows a system prompt is no part of a split chat: the prompt may be the question.
    """
    if "assistant" not in roles or "user" not in roles and roles[0] != "system":
        raise Rejected(UNANSWERED, " ".join(roles))
    before = ""
    for role in roles:
        if role not in NEXT_ROLES[before]:
            raise Rejected("roles out of order", " ".join(roles))
        before = role


def read_tools(row):
    """The tools of a row in the form of OpenAI's protocol; None if it has none.

    They are a list of objects, the JSON of one, or the older `functions` without the wrapper.
    """
    tools = read_list(row.get("tools"))
    functions = read_list(row.get("functions"))
    if tools and functions:
        raise Rejected("malformed tools", "both tools and functions")
    wrapped = []
    for tool in tools or functions:
        is_bare = "name" in tool and "function" not in tool
        wrapped.append({"type": "function", "function": tool} if is_bare else tool)
    return wrapped or None


def read_list(value):
    """The objects of a list, which may be text, as may each of them; [] for none."""
    entries = decode(value)
    if isinstance(entries, list):
        entries = [decode(entry) for entry in entries]
    if not entries or isinstance(entries, str) and not entries.strip():
        return []
    if not is_list_of_objects(entries):
        raise Rejected("malformed tools", "neither a list of objects nor the JSON of one")
    return entries


# ==================== A turn as a message ============================================================================


def name_of(turn):
    """What the turn calls its role."""
    return str(turn.get("role") or turn.get("from")).strip().lower()


def role_of(turn):
    """The role of a turn, None if it is not known."""
    return ROLES.get(name_of(turn))


def read_message(turn):
    """A message with role and content; an assistant's also with reasoning (None if it has none), tool_calls and
    supervised.
    """
    name = name_of(turn)
    role = role_of(turn)
    if role is None:
        raise Rejected("unknown role", repr(name))
    refuse_keys(turn, NOT_READ_IN_TURNS, f"a turn of {name}")
    if isinstance(turn.get("additional_kwargs"), dict):
        refuse_keys(turn["additional_kwargs"], NOT_READ_IN_ADDITIONS, f"additional_kwargs in a turn of {name}")
    content, thoughts = read_content(turn, role)
    calls = read_calls(turn)
    if calls and role != "assistant":
        raise Rejected("malformed call", f"a call in a turn of {name}")
    message = {key: turn[key] for key in ("tool_call_id", "name", "cut") if turn.get(key)}
    message["role"] = role
    if role == "assistant":
        if name in CALLING_ROLES:
            content, calls = split_calls(content)
        message["reasoning"] = read_reasoning(turn) or thoughts
        message["supervised"] = is_supervised(turn)
        if calls:
            message["tool_calls"] = calls
        content = check_reply(content, message)
    if not isinstance(content, str) and "tool_calls" not in message:
        raise Rejected("malformed message", f"the content of a turn of {name} is {kind_of(content)}")
    message["content"] = content
    return message


def check_reply(content, message):
    """The content of an assistant's turn, None if it is blank beside calls. Raises Rejected for a reply without end."""
    if isinstance(content, str):
        content = EMPTY_THOUGHT.sub("", content)  # of a target that answers at once; a template writes its own
    is_blank = content is None or isinstance(content, str) and not content.strip()
    calls = "tool_calls" in message
    if is_blank and not calls and not message["reasoning"]:
        raise Rejected("empty", "an assistant turn without content")
    if is_blank:
        content = None if calls else ""  # some templates drop the calls of a message that has content
    text = content if isinstance(content, str) else ""
    answer = text.rpartition("</think>")[2]
    if OPEN_THOUGHT.search(answer):
        raise Rejected("thought without an end", "an assistant turn has no </think> after a line with <think>")
    if not answer.strip() and isinstance(content, str) and not calls:
        raise Rejected("thought without an answer", "an assistant turn with reasoning, but no answer")
    return content


def read_content(turn, role):
    """(content, thoughts) of a turn; the texts of a list of parts are concatenated, thoughts are None without any."""
    given = [turn[key] for key in CONTENT_FIELDS if turn.get(key) is not None]
    content = next((value for value in given if value != ""), given[0] if given else None)
    kinds = []
    if isinstance(content, list):
        kinds = [str(part.get("type", "text")) if isinstance(part, dict) else type(part).__name__ for part in content]
    is_chat = isinstance(content, list) and {*kinds} <= {*TEXT_PARTS, *THOUGHT_PARTS, *OTHER_PARTS}
    if role == "tool" and is_chat:  # JSON with a field "text" is no part of a chat
        is_chat = all("type" in part for part in content)
    if role == "tool" and content is not None and not isinstance(content, str) and not is_chat:
        return json.dumps(content, ensure_ascii=False), None
    if not isinstance(content, list):
        return content, None
    return read_parts(content, kinds, role)


def read_parts(parts, kinds, role):
    """(text, thoughts) of a content of parts."""
    texts = []
    thoughts = []
    for kind, part in zip(kinds, parts, strict=True):
        is_thought = role == "assistant" and kind in THOUGHT_PARTS
        if kind not in TEXT_PARTS and not is_thought:
            raise Rejected("not read", f"a part of type {kind} in a turn of {role}: only text is read")
        text = part.get(kind, part.get("text"))
        if not isinstance(text, str):
            raise Rejected("malformed message", f"the text of a part in a turn of {role} is {kind_of(text)}")
        (thoughts if is_thought else texts).append(text)
    return "".join(texts), "".join(thoughts).strip() or None


def read_reasoning(turn):
    """The first reasoning field with text in it, or None."""
    for key in REASONING_FIELDS:
        text = turn.get(key)
        if text and not isinstance(text, str):
            raise Rejected("malformed message", f"{key} of a turn is {kind_of(text)}, not text")
        if text and text.strip():
            return text
    return None


def is_supervised(given, marks=MARKS, where="a turn"):
    """Is the assistant's turn, or the row, to be trained, as far as it says?"""
    for key, negative in marks.items():
        if given.get(key) is None:
            continue
        value = str(given[key]).strip().lower()
        if value not in NO + YES:
            raise Rejected("not read", f"{key} {value[:40]} of {where}: 0 or 1, false or true")
        if value in negative:
            return False
    return True


def check_trained(row):
    """Raise Rejected if the row says that it is not to be trained."""
    is_bad = str(row.get("label")).strip().lower() == BAD_LABEL
    if is_bad or not is_supervised(row, ROW_MARKS, "the row"):
        raise Rejected(UNTRAINED, "the row says so")


def read_calls(turn):
    """The calls of a turn in the form of OpenAI's protocol; function_call is the older form of one."""
    calls = decode(turn.get("tool_calls")) or []
    if calls and turn.get("function_call"):
        raise Rejected("malformed call", "both tool_calls and function_call")
    if turn.get("function_call"):
        calls = [decode(turn["function_call"])]
    if not is_list_of_objects(calls):
        raise Rejected("malformed call", "tool_calls is not a list of objects")
    return [read_call(call) for call in calls]


def split_calls(content):
    """(thought or None, calls) of a turn in a role of calls: its content is the JSON of a call or a list of them."""
    thought, tag, text = content.rpartition("</think>") if isinstance(content, str) else ("", "", content)
    calls = decode(text)
    if isinstance(calls, dict):
        calls = [calls]
    if not calls or not is_list_of_objects(calls):
        raise Rejected("malformed call", "a function_call turn without the JSON of a call")
    return thought + tag or None, [read_call(call) for call in calls]


def read_call(call):
    """A call as templates expect it: its arguments, text on the wire, are an object, an empty one if there are none."""
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise Rejected("malformed call", "a call has no name")
    given = [key for key in ARGUMENTS if function.get(key) is not None]
    arguments = decode(function[given[0]]) if given else {}
    if arguments is None or isinstance(arguments, str) and not arguments.strip():
        arguments = {}
    if not isinstance(arguments, dict):
        raise Rejected("malformed call", f"the arguments of {name} are {kind_of(arguments)}, not an object")
    if not is_json(arguments):
        raise Rejected("malformed call", f"the arguments of {name} have numbers that are not finite")
    unknown = function.keys() - {*ARGUMENTS, *KEYS_OF_CALLS}
    if unknown and not given:
        raise Rejected("malformed call", f"a call of {name} has no arguments, but {', '.join(sorted(unknown))}")
    read = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call["id"], **read} if call.get("id") else read


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
