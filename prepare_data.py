"""Turn conversations into tokens and a loss mask: the data set that every later stage reads.

In:  --dataset, a preset (sharegpt, ultrachat, pydoc) or a JSON Lines file whose rows are conversations
     ({"conversations" or "messages": [{"role", "content"} or {"from", "value"}, ...]}, optionally with "tools"), texts
     rendered beforehand ({"text"}) or tokens ({"input_ids", "loss_mask"}); and the target's tokenizer and chat template.
Out: --output_path/
       train/, validation/   Arrow, read with open_data: input_ids int32, loss_mask uint8 (1 = to be produced by the
                             assistant, its end-of-turn token included), length int32
       data_config.json      the fingerprint and what it is made of, counts
       token_freq.pt         {token id: count} over the supervised tokens of train
       rejected.jsonl        rows that were skipped: line, file, cause, detail

A second run with the same input, tokenizer and options finds the same fingerprint and does nothing.

    python prepare_data.py --dataset pydoc --target_model_path TARGET --output_path data/pydoc
    python prepare_data.py --dataset chats.jsonl --target_model_path meta-llama/Llama-3.1-8B-Instruct \\
        --output_path data/chats --max_length 4096 --validation_ratio 0.01
    python prepare_data.py --dataset sharegpt --dataset_path /mirror/ShareGPT_Vicuna_unfiltered \\
        --target_model_path Qwen/Qwen3-8B --chat_template qwen --output_path data/sharegpt
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import sys
import sysconfig
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

FORMAT_VERSION = (
    1  # of the prepared folder; part of the fingerprint, so raise it whenever the same input gives other rows
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken")
HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")

NAMES_OF_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "model", "bot", "function_call"),
    "tool": ("tool", "function", "observation", "ipython"),
}
ROLES = {name: role for role, names in NAMES_OF_ROLES.items() for name in names}
MAY_FOLLOW = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class Template(NamedTuple):
    """Where assistant turns lie in rendered text: behind one of headers, up to and including one of ends.

    With joins, a header directly behind an end was produced by the assistant too: one turn in several channels.
    """

    headers: tuple
    ends: tuple  # the first one closes a final reply
    joins: bool = False


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
    aliases, words = aliases or {}, []
    for position, word in enumerate(argv):
        if word == "--":
            return words + list(argv[position:])
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            word = "--" + aliases.get(name, name) + equals + value
        words.append(word)
    return words


def boolean(text):
    """argparse type of flags that take a value or none; for `type=boolean, nargs="?", const=True, default=False`."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def write_atomic(path, data):
    """Write bytes or str so that a reader sees the old file or the whole new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def hash_file(path):
    """sha256 of the content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------- the target's folder and tokenizer
def resolve_target(path_or_hub_id, weights=True):
    """(model folder, tokenizer folder) of a snapshot, a folder with one nested model, an MLflow model or a hub id.

    weights=False downloads only the small files of a hub id. Ends with one line if there is no such model.
    """
    name, folder = str(path_or_hub_id), Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return _resolve_folder(folder.resolve())
    if folder.exists() or not HUB_ID.fullmatch(name):
        fail(f"target model {name}: neither a folder nor a hub id such as org/name")
    import huggingface_hub

    patterns = SMALL_FILES + (("*.safetensors",) if weights else ())
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"])
    except Exception as error:  # the hub client raises errors of several libraries; each means that there is no model
        fail(f"target model {name}: no such folder, and the hub does not deliver it ({type(error).__name__}: {error})")
    return _resolve_folder(Path(folder))


def _is_model(folder):
    if (folder / "MLmodel").is_file():
        return True
    try:
        return "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def _resolve_folder(folder):
    if (folder / "MLmodel").is_file():
        model = next((folder / sub for sub in ("data/model", "model") if (folder / sub).is_dir()), None)
        if model is None:
            fail(f"MLflow model {folder}: neither data/model nor model in it")
        return _with_config(model, folder / "data" / "config"), _tokenizer_folder(model)
    if (folder / "config.json").is_file():
        return folder, _tokenizer_folder(folder)
    if (folder / "snapshots").is_dir():  # an entry of the hub's cache: refs/main names the commit
        reference = folder / "refs" / "main"
        commits = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
        if reference.is_file() and (folder / "snapshots" / reference.read_text().strip()).is_dir():
            commits = [folder / "snapshots" / reference.read_text().strip()]
        if len(commits) != 1:
            fail(f"{folder}: {len(commits)} snapshots and no refs/main that chooses one")
        return _resolve_folder(commits[0])
    found, level = [], [folder]
    for _ in range(3):
        level = sorted(path for parent in level for path in parent.iterdir() if path.is_dir())
        found += [path for path in level if _is_model(path)]
        level = [path for path in level if path not in found]
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found[:4])
        fail(f"{folder}: no config.json in it and {len(found)} models below it, exactly one is needed {names}".strip())
    return _resolve_folder(found[0])


def _tokenizer_folder(model):
    """The model's own folder, or the separate one in which MLflow keeps the tokenizer."""
    for folder in (model, model.parent / "tokenizer", model.parent / "components" / "tokenizer"):
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    fail(f"{model}: no tokenizer in it (looked for {', '.join(TOKENIZER_FILES)}) nor in a tokenizer folder beside it")


def _with_config(model, config):
    """The model's folder, or a folder of links in the hub's cache if MLflow keeps config.json apart from the weights.

    transformers wants both in one folder, and the input may be mounted read-only.
    """
    if (model / "config.json").is_file() or not (config / "config.json").is_file():
        return model
    from huggingface_hub.constants import HF_HOME

    files = {path.name: path for folder in (config, model) for path in sorted(folder.iterdir()) if path.is_file()}
    merged = Path(HF_HOME) / "mlflow_models" / hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    merged.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        if not (merged / name).is_symlink():
            link = merged / f".{name}.{os.getpid()}"
            link.symlink_to(path)
            link.replace(merged / name)
    return merged


def load_tokenizer(tokenizer_dir, trust_remote_code=False):
    """The fast tokenizer of the folder; a slow one has no character offsets, so the loss mask could not be exact."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        fail(f"cannot load the tokenizer in {tokenizer_dir}: {error}")
    if not tokenizer.is_fast:
        fail(f"the tokenizer in {tokenizer_dir} is not a fast one: add its tokenizer.json")
    return tokenizer


# ---------------------------------------------------------------------------- reading what this script wrote
def open_data(folder):
    """(DatasetDict, data_config) of a prepared folder; columns input_ids int32, loss_mask uint8, length int32."""
    from datasets import DatasetDict

    folder = Path(folder)
    for name in ("data_config.json", "dataset_dict.json", "token_freq.pt", "train"):
        if not (folder / name).exists():
            fail(f"{folder} is not a complete prepared data set: {name} is missing; run prepare_data.py again")
    config = json.loads((folder / "data_config.json").read_text())
    if config.get("format_version") != FORMAT_VERSION:
        version = config.get("format_version")
        fail(f"{folder} has format version {version}, this program reads {FORMAT_VERSION}: run prepare_data.py again")
    return DatasetDict.load_from_disk(str(folder)), config


def read_token_freq(path):
    """{token id: count} from a file written by torch.save: a dict, or a 1-D tensor indexed by token id."""
    import pickle

    import torch

    if not Path(path).is_file():
        fail(f"token counts {path}: no such file")
    try:
        counts = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        fail(f"token counts {path}: not a file of plain tensors or numbers ({str(error).splitlines()[0][:200]})")
    if isinstance(counts, torch.Tensor) and counts.dim() == 1:
        counts = {i: count for i, count in enumerate(counts.tolist()) if count}
    if not isinstance(counts, dict) or not counts:
        fail(f"token counts {path}: neither a dict {{token id: count}} with entries nor a 1-D tensor")
    counts = {int(token): int(count) for token, count in counts.items()}
    if min(counts) < 0 or min(counts.values()) < 0:
        fail(f"token counts {path}: negative token id or count")
    return counts


def epoch_order(num_rows, seed, epoch):
    """Permutation of the rows in one epoch, int64 [num_rows]; the same on every rank and machine.

    RandomState because NumPy promises that its stream never changes, so a run resumed years later sees the same order.
    """
    return np.random.RandomState([seed % 2**32, epoch]).permutation(num_rows).astype(np.int64)


def step_rows(order, step, global_batch_size, rank, world_size):
    """Rows that one rank trains on in one optimizer step; the last batch of an epoch may be short, nothing is dropped."""
    batch = order[step * global_batch_size : (step + 1) * global_batch_size]
    return [int(row) for row in batch[rank::world_size]]


# ---------------------------------------------------------------------------- one row: from JSON to messages
class Rejected(Exception):
    """A row that cannot be used: its cause, which is counted, and a short detail."""

    def __init__(self, cause, detail=""):
        super().__init__(cause, str(detail)[:200])


def read_messages(row):
    """Messages of a row as role, content and, where given, reasoning, tool_calls and the like; roles checked.

    What follows the last assistant turn is dropped: nothing in it would be supervised.
    """
    turns = row.get("conversations") or row.get("messages")
    if not turns:
        raise Rejected("empty", "no messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Rejected("malformed message", "the messages are not a list of objects")
    messages = [_read_message(turn) for turn in turns]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise Rejected("no assistant turn", " ".join(roles))
    for before, role in zip([None, *roles], roles, strict=False):
        if role not in MAY_FOLLOW[before]:
            raise Rejected("roles out of order", " ".join(roles))
    while messages[-1]["role"] != "assistant":
        messages.pop()
    return messages


def _read_message(turn):
    name = turn.get("role") or turn.get("from")
    role = ROLES.get(str(name).lower())
    if role is None:
        raise Rejected("unknown role", repr(name))
    content = turn.get("content")
    content = turn.get("value") if content is None else content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if role == "tool" and not isinstance(content, str):
        content = "" if content is None else json.dumps(content, ensure_ascii=False)
    message = {"role": role, "content": content}
    for key in ("tool_calls", "tool_call_id", "name"):
        if turn.get(key):  # not merely present: columns of a table are null where a row has none
            message[key] = turn[key]
    if role == "assistant":
        calls = message.get("tool_calls", [])
        reasoning = [turn[key] for key in REASONING_FIELDS if isinstance(turn.get(key), str) and turn[key].strip()]
        message["reasoning"] = reasoning[0] if reasoning else None
        if not isinstance(calls, list) or not all(isinstance(_function(call), dict) for call in calls):
            raise Rejected("malformed message", "tool_calls is not a list of functions")
        for function in map(_function, calls):
            if isinstance(function.get("arguments"), str):  # the wire format; most templates want the object
                with contextlib.suppress(ValueError):
                    function["arguments"] = json.loads(function["arguments"])
        if not (isinstance(content, str) and content.strip()):
            if not calls and not reasoning:
                raise Rejected("empty", "an assistant turn without content")
            message["content"] = content = None if calls else ""  # DeepSeek's template tells a call by its null content
    if not isinstance(content, str) and "tool_calls" not in message:
        raise Rejected("malformed message", f"content of a {role} turn is {type(content).__name__}")
    return message


def _function(call):
    return call.get("function", call) if isinstance(call, dict) else None


def read_tools(row):
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise Rejected("malformed tools", error) from None
    if tools and not isinstance(tools, list):
        raise Rejected("malformed tools", type(tools).__name__)
    return tools or None


def check_markers(value, template):
    """No text of a row may contain a marker: a prompt could declare itself supervised, a reply end too early."""
    if isinstance(value, str):
        marker = next((mark for mark in template.headers + template.ends if mark.strip() in value), None)
        if marker:
            raise Rejected("marker inside content", repr(marker))
    elif isinstance(value, (list, dict)):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            check_markers(part, template)


# ---------------------------------------------------------------------------- one row: text, spans, tokens, mask
class Chat(NamedTuple):
    """All that turns a row into tokens; sent to the worker processes."""

    tokenizer: object
    encoder: object  # tokenizers.Tokenizer without post-processing: its offsets cover blanks as well
    vocab_size: int
    template: Template
    opening: str = ""  # what the generation prompt has behind the header (<think>): not produced by the assistant
    source: str = ""  # the chat template itself; empty if the tokenizer has none
    max_length: int = 2048
    only_last: bool = False
    worker: bool = False  # runs in a process of its own


def render(tokenizer, messages, tools=None, source="", **options):
    """Text of the conversation by the tokenizer's own template."""
    messages = copy.deepcopy(messages)
    for message in messages:
        reasoning = message.pop("reasoning", None)
        if reasoning:
            message.update({field: reasoning for field in REASONING_FIELDS if field in source})
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    except TypeError:  # DeepSeek's template concatenates the arguments, so it wants them as text
        for message in messages:
            for function in map(_function, message.get("tool_calls", ())):
                function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)


def find_spans(text, template, opening=""):
    """[(start, end)] in characters of each assistant turn: what the assistant is to produce, its end marker included."""
    header = re.compile("|".join(map(re.escape, template.headers)))
    end = re.compile("|".join(map(re.escape, template.ends)))
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
    """Text of a conversation that ends with the final reply as the target produces it, reasoning included.

    Templates of reasoning models drop what stands before </think> from every turn, which is right for the history but
    loses the reasoning of the final reply. Then the text is the generation prompt, and behind it what the target answers.
    """
    text = render(chat.tokenizer, messages, tools, chat.source)
    last = messages[-1]
    content, reasoning = last["content"] or "", last["reasoning"]
    if not reasoning and "</think>" in content:
        reasoning, content = content.removeprefix("<think>").split("</think>", 1)
    spans = find_spans(text, chat.template)
    if not (reasoning and reasoning.strip() and "</think>" in chat.source and spans):
        return text
    if "</think>" in text[slice(*spans[-1])] or "tool_calls" in last:
        return text
    prompt = render(chat.tokenizer, messages[:-1], tools, chat.source, add_generation_prompt=True)
    prompt = re.sub(r"<think>\s*\Z", "<think>\n", prompt)
    opening = "" if prompt.endswith("<think>\n") else "<think>\n"
    return f"{prompt}{opening}{reasoning.strip()}\n</think>\n\n{content.strip()}{chat.template.ends[0]}"


def chat_spans(row, chat):
    """(text, supervised spans in characters) of a row with messages."""
    messages, tools = read_messages(row), read_tools(row)
    check_markers([messages, tools], chat.template)
    try:
        text = render_reply(messages, tools, chat)
        spans = find_spans(text, chat.template, chat.opening)
        if any(message["role"] == "tool" for message in messages):
            # A template unknown here may close a tool call by a marker of its own; the span would run on.
            masked = [{**message, "content": "x"} if message["role"] == "tool" else message for message in messages]
            other = render_reply(masked, tools, chat)
            other_spans = find_spans(other, chat.template, chat.opening)
            if [text[a:b] for a, b in spans] != [other[a:b] for a, b in other_spans]:
                raise Rejected("turns not marked", "a tool's output would be supervised")
    except Rejected:
        raise
    except Exception as error:  # whatever the template's own code raises on this row concerns this row only
        raise Rejected("template error", f"{type(error).__name__}: {error}") from None
    turns = sum(message["role"] == "assistant" for message in messages)
    if len(spans) != turns:
        raise Rejected("turns not marked", f"{len(spans)} marked replies for {turns} assistant turns")
    return text, spans


def encode(text, spans, encoder):
    """(ids, mask) of the whole text in one encoding: a token is supervised iff all its characters lie in one span."""
    encoding = encoder.encode(text, add_special_tokens=False)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(len(offsets), dtype=np.uint8)
    for start, end in spans:
        # A token of no characters stands behind what it was trimmed from, so at the span's start it is still prompt.
        mask |= (starts >= start) & (ends <= end) & ((ends > starts) | (ends > start))
    return np.array(encoding.ids, dtype=np.int32), mask


def read_tokens(row, chat):
    """(ids, mask) of a row that is tokenised already."""
    ids, mask = row["input_ids"], row.get("loss_mask")
    if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
        raise Rejected("bad tokens", "input_ids and loss_mask must be lists of one length")
    if not ids:
        raise Rejected("empty", "no tokens")
    if not all(type(value) is int for value in ids + mask):
        raise Rejected("bad tokens", "input_ids and loss_mask must be integers")
    if min(ids) < 0 or max(ids) >= chat.vocab_size:
        raise Rejected(
            "bad tokens", f"token ids {min(ids)} to {max(ids)}, the tokenizer has 0 to {chat.vocab_size - 1}"
        )
    if not set(mask) <= {0, 1}:
        raise Rejected("bad tokens", "loss_mask has values other than 0 and 1")
    mask = np.array(mask, dtype=np.uint8)
    if chat.only_last and mask.any():  # the last run of ones is the last turn
        last = np.flatnonzero(mask)[-1]
        mask[: last + 1 - np.argmin(np.append(mask[last::-1], 0))] = 0
    return np.array(ids, dtype=np.int32), mask


def tokenise(raw, chat):
    """(ids, mask, tokens cut off) of one row given as the bytes of its line; raises Rejected."""
    try:
        row = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise Rejected("not JSON" if raw.strip() else "empty", error if raw.strip() else "blank line") from None
    if not isinstance(row, dict):
        raise Rejected("not an object", type(row).__name__)
    if not row:
        raise Rejected("empty", "no fields")
    if row.get("input_ids") is not None:
        ids, mask = read_tokens(row, chat)
    else:
        if "conversations" in row or "messages" in row:
            text, spans = chat_spans(row, chat)
        elif isinstance(row.get("text"), str):
            text, spans = row["text"], find_spans(row["text"], chat.template, chat.opening)
        else:
            raise Rejected("unknown form", f"fields {', '.join(map(str, row))}")
        if not text.strip():
            raise Rejected("empty", "no text")
        ids, mask = encode(text, spans[-1:] if chat.only_last else spans, chat.encoder)
    cut = max(0, len(ids) - chat.max_length)
    ids, mask = ids[: chat.max_length], mask[: chat.max_length]
    if not mask.any():
        raise Rejected("no supervised token", f"within {chat.max_length} tokens" if cut else "")
    return ids, mask, cut


def tokenise_batch(batch, chat):
    """datasets' map: columns raw and line to the columns of the data set, and cause and detail of what is rejected."""
    if chat.worker:  # the rows are spread over processes already, and threads do not survive the fork
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    columns = {name: [] for name in ("input_ids", "loss_mask", "length", "cut", "cause", "detail")}
    for raw in batch["raw"]:
        try:
            ids, mask, cut = tokenise(raw, chat)
            values = (ids, mask, len(ids), cut, "", "")
        except Rejected as rejected:
            values = ([], [], 0, 0, *rejected.args)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


# ---------------------------------------------------------------------------- does the template fit the tokenizer?
PROBE = [
    {"role": role, "content": content, "reasoning": None}
    for role, content in (("user", "Qone"), ("assistant", "Aone"), ("user", "Qtwo"), ("assistant", "Atwo"))
]


def fits(text, template):
    """Does the rendered probe show both of its replies, each closed by an end marker?"""
    parts = [text[start:end] for start, end in find_spans(text, template)]
    return len(parts) == 2 and all(
        answer in part and part.endswith(template.ends) for answer, part in zip(("Aone", "Atwo"), parts, strict=True)
    )


def derive_template(tokenizer, text):
    """The markers of the tokenizer's own template from the rendered probe, for a family that TEMPLATES does not name.

    Header: what add_generation_prompt appends, as far as it stands before both replies; if it appends nothing, what all
    prompts end with. End: the first special token behind a reply. None if that does not describe the probe.
    """
    prompt, generation = (render(tokenizer, PROBE[:1], add_generation_prompt=flag) for flag in (False, True))
    appended = generation[len(prompt) :] if generation.startswith(prompt) else ""
    found = re.search("Qone(.*?)Aone(.*?)Qtwo(.*?)Atwo(.*)", text, re.DOTALL)
    if found is None:
        return None
    first, end_one, second, end_two = found.groups()
    shared = [appended[:n] for n in range(1, len(appended) + 1) if appended[:n] in first and appended[:n] in second]
    common = os.path.commonprefix([first[::-1], second[::-1]])[::-1]
    header = shared[-1] if shared else common
    specials = sorted((str(t) for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    special = re.compile(r"\s*(" + "|".join(map(re.escape, specials)) + ")")
    ends = [match[1] for match in map(special.match, (end_two, end_one)) if match] if specials else []
    template = Template((header,), tuple(dict.fromkeys(ends)))
    return template if header.strip() and ends and fits(text, template) else None


def choose_template(tokenizer, name):
    """(Template, opening) of --chat_template for this tokenizer; ends with one line if its markers do not occur."""
    try:
        text = render(tokenizer, PROBE)
    except Exception as error:  # the template is foreign code
        fail(f"the tokenizer's chat template does not render a plain conversation: {type(error).__name__}: {error}")
    fitting = [known for known, template in TEMPLATES.items() if fits(text, template)]
    if name == "auto":  # a known family also brings the markers that the probe does not show
        template = TEMPLATES[fitting[0]] if fitting else derive_template(tokenizer, text)
    else:
        template = TEMPLATES[name] if name in fitting else None
    if template is None:
        sought = "" if name == "auto" else f"; looked for {TEMPLATES[name].headers} ... {TEMPLATES[name].ends}"
        remedy = f"--chat_template {' or '.join(fitting)}" if fitting else "--chat_template auto"
        remedy = "rows with input_ids and loss_mask" if name == "auto" else remedy
        fail(f"chat_template {name} does not fit the tokenizer, which renders {text[:200]!r}{sought}; use {remedy}")
    prompt = render(tokenizer, PROBE[:1], add_generation_prompt=True)
    behind = [prompt.rpartition(header)[2] for header in template.headers if header in prompt]
    return template, min(behind, key=len, default="")


def make_chat(tokenizer, name, max_length, only_last, first_row):
    """The Chat of a tokenizer; first_row(fields) names the first row that has one of the fields, or None."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.post_processor = None
    encoder.no_truncation()
    encoder.no_padding()
    source = json.dumps(tokenizer.chat_template or "", ensure_ascii=False)
    size = max(encoder.get_vocab(with_added_tokens=True).values()) + 1
    if tokenizer.chat_template:
        template, opening = choose_template(tokenizer, name)
        return Chat(tokenizer, encoder, size, template, opening, source, max_length, only_last)
    needing = first_row(("conversations", "messages") + (("text",) if name == "auto" else ()))
    if needing:
        fail(
            f"the target's tokenizer has no chat template, which {needing} needs: add chat_template.jinja to its folder"
        )
    template = TEMPLATES.get(
        name, Template(("<assistant>",), ("</assistant>",))
    )  # auto: tokenised rows need no markers
    return Chat(tokenizer, encoder, size, template, "", source, max_length, only_last)


# ---------------------------------------------------------------------------- presets
# Modules that act when they are imported or open windows, and test suites, whose docstrings explain nothing.
NOT_READ = {"antigravity", "this", "idlelib", "turtledemo", "test", "tests", "__main__", "idle_test", "lib2to3"}
IN_C = (
    "builtins",
    "math",
    "cmath",
    "itertools",
    "time",
    "array",
    "zlib",
    "binascii",
    "unicodedata",
    "collections",
    "io",
)
QUESTIONS = {
    "module": ("What is the Python module {name} for?", "Describe the module {name}.", "When do I need {name}?"),
    "class": ("What is {name}?", "Explain the class {name}.", "What is the class {name} for?"),
    "function": ("What does {name} do?", "Explain the function {name}.", "How do I use {name}?"),
    "method": ("What does {name} do?", "Explain the method {name}.", "How do I use {name}?"),
    "next method": ("And its method {name}?", "What about {name}?", "What does its {name} do?"),
}


def _documented_in_source(path, module):
    """[kind, name, signature, docstring, methods] of a module, its classes and functions, read without running it."""
    tree = ast.parse(path.read_bytes())
    yield "module", module, "", ast.get_docstring(tree), []
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if isinstance(node, functions):
            yield "function", f"{module}.{node.name}", f"({ast.unparse(node.args)})", ast.get_docstring(node), []
        elif isinstance(node, ast.ClassDef):
            methods = [
                (sub.name, f"({ast.unparse(sub.args)})", ast.get_docstring(sub))
                for sub in node.body
                if isinstance(sub, functions)
            ]
            yield "class", f"{module}.{node.name}", "", ast.get_docstring(node), methods


def _documented_in_c(module):
    """The same of a module written in C, which has no source to read; those in IN_C do nothing when imported."""

    def signature(value):
        with contextlib.suppress(ValueError, TypeError):
            return str(inspect.signature(value))
        return "(...)"

    for name, value in sorted(vars(importlib.import_module(module)).items()):
        qualified = name if module == "builtins" else f"{module}.{name}"
        if inspect.isclass(value):
            methods = [(key, signature(m), inspect.getdoc(m)) for key, m in sorted(vars(value).items()) if callable(m)]
            yield "class", qualified, "", inspect.getdoc(value), methods
        elif inspect.isbuiltin(value):
            yield "function", qualified, signature(value), inspect.getdoc(value), []


def pydoc_rows():
    """Conversations on the running Python's standard library: a question by name, the documentation as the answer."""
    library, sources = Path(sysconfig.get_path("stdlib")), []
    for name in sorted(sys.stdlib_module_names - NOT_READ):
        for path in [library / f"{name}.py", *sorted((library / name).rglob("*.py"))]:
            parts = path.relative_to(library).with_suffix("").parts
            if path.is_file() and not NOT_READ & set(parts):
                module = ".".join(parts).removesuffix(".__init__")
                if not re.search(r"(^|\.)_", module):
                    sources.append(_documented_in_source(path, module))
    sources += [_documented_in_c(module) for module in IN_C]
    rows, seen = [], set()

    def turns(kind, name, signature, doc):
        """Question and answer, or nothing for what is private, hardly documented, or documented by the same words."""
        short, doc = name.rpartition(".")[2], inspect.cleandoc(doc or "")
        if short.startswith("_") or len(doc) < 20 or doc in seen:
            return []
        seen.add(doc)
        choices = QUESTIONS[kind]
        question = choices[zlib.crc32(name.encode()) % len(choices)].format(name=short if "next" in kind else name)
        answer = doc if kind == "module" else f"{'class ' if kind == 'class' else ''}{short}{signature}\n\n{doc}"
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    for kind, name, signature, doc, methods in (entry for source in sources for entry in source):
        messages = turns(kind, name, signature, doc)
        rows.append((name, messages))
        for method, *rest in methods:
            if messages and len(messages) < 8:  # the class and its first three methods are one conversation
                messages += turns("next method", f"{name}.{method}", *rest)
            else:
                rows.append((f"{name}.{method}", turns("method", f"{name}.{method}", *rest)))
    return [{"id": f"pydoc {name}", "conversations": messages} for name, messages in rows if messages]


def _from_sharegpt(row):
    """Long chats were cut into pieces there, so that many begin with the assistant's turn: leave out what is cut off."""
    turns = list(row["conversations"] or [])
    while turns and ROLES.get(str(turns[0]["from"]).lower()) == "assistant":
        turns.pop(0)
    return {"conversations": turns}


class Preset(NamedTuple):
    repo: str  # on the hub
    files: dict  # split -> pattern of its files in the repo
    convert: object  # row of the hub's schema -> row of one of our forms
    tolerated: float = 0.0  # share of rejected rows that is this data's own and no mistake of the user


PRESETS = {
    # Collected from users: besides cut beginnings it has empty turns, chats of one side only, turns in a wrong order.
    # The share is an assumption, chosen to catch a wrong template or schema and nothing else.
    "sharegpt": Preset(
        "Aeala/ShareGPT_Vicuna_unfiltered",
        {"train": "ShareGPT_V4.3_unfiltered_cleaned_split.json"},
        _from_sharegpt,
        tolerated=0.1,
    ),
    "ultrachat": Preset(
        "HuggingFaceH4/ultrachat_200k",
        {"train": "data/train_sft-*.parquet", "validation": "data/test_sft-*.parquet"},
        lambda row: {"messages": row["messages"]},
    ),
    "pydoc": Preset("", {"train": ""}, pydoc_rows),
}


# ---------------------------------------------------------------------------- sources of rows
class Source(NamedTuple):
    label: str
    load: (
        object  # () -> (sha256 of the content, folder for temporary files -> iterator of (line number, bytes of a row))
    )
    path: Path | None = None  # of a JSON Lines file
    tolerated: float = 0.0


def find_source(name, dataset_path, split):
    """The rows behind --dataset or --validation_dataset. Missing and empty files end here, before anything is loaded."""
    if name not in PRESETS:
        path = Path(name).expanduser()
        if dataset_path:
            fail(f"dataset_path is for the presets {', '.join(PRESETS)}; {name} is a file of its own")
        if not path.is_file():
            what = "is a folder; give the JSON Lines file in it" if path.is_dir() else "does not exist"
            fail(f"dataset {name} {what} (presets: {', '.join(PRESETS)})")
        if next(read_lines(path), None) is None:
            fail(f"dataset {name} is empty: no row in it")
        return Source(str(path), lambda: (hash_file(path), lambda folder: read_lines(path)), path)
    preset = PRESETS[name]
    if split not in preset.files:
        having = [key for key, row in PRESETS.items() if split in row.files]
        fail(f"preset {name} has no {split} split: use --validation_ratio, a file, or {' or '.join(having)}")
    if not preset.repo:
        return Source(name, _load_pydoc)
    if dataset_path and not Path(dataset_path).expanduser().is_dir():
        fail(f"dataset_path {dataset_path} is not a folder: it is a local copy of the hub's {preset.repo}")
    return Source(name, lambda: _load_preset(preset, dataset_path, split), tolerated=preset.tolerated)


def read_lines(path):
    """(line number from 1, line) of a file; blank lines at its end are no rows."""
    blank = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield from blank
                blank = []
                yield number, line.strip()
            else:
                blank.append((number, b""))


def _load_pydoc():
    lines = [json.dumps(row).encode() for row in pydoc_rows()]
    return hashlib.sha256(b"\n".join(lines)).hexdigest(), lambda folder: enumerate(lines, 1)


def _load_preset(preset, dataset_path, split):
    import huggingface_hub
    from datasets import load_dataset

    pattern = preset.files[split]
    if dataset_path:
        folder = Path(dataset_path).expanduser()
    else:
        try:
            folder = Path(huggingface_hub.snapshot_download(preset.repo, repo_type="dataset", allow_patterns=[pattern]))
        except Exception as error:  # as in resolve_target
            reason = f"{type(error).__name__}: {error}"
            fail(f"the hub does not deliver {preset.repo} ({reason}); give a local copy with --dataset_path")
    files = [str(path) for path in sorted(folder.glob(pattern))]
    if not files:
        fail(f"{folder} has no {pattern}, which {preset.repo} has on the hub")

    def rows(cache):
        table = load_dataset(Path(files[0]).suffix[1:], data_files=files, split="train", cache_dir=str(cache / "hub"))
        return ((number, json.dumps(preset.convert(row)).encode()) for number, row in enumerate(table, 1))

    return hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest(), rows


def first_row_with(sources, fields):
    """Names the first row that has one of the fields, None if there is none; a preset's rows are conversations."""
    for source in sources:
        if source.path is None:
            return f"preset {source.label}"
        for number, line in read_lines(source.path):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "input_ids" not in row and any(field in row for field in fields):
                    return f"line {number} of {source.label}"
    return None


# ---------------------------------------------------------------------------- building the prepared folder
def map_rows(source, rows, chat, options, cache):
    """(Dataset of the rows kept, list of the rejected ones, tokens cut off in each kept row) of one source."""
    from datasets import Dataset, Features, List, Value

    def generate():
        for line, raw in rows(cache):
            yield {"line": line, "raw": raw}

    features = Features({"line": Value("int64"), "raw": Value("large_binary")})
    data = Dataset.from_generator(generate, features=features, cache_dir=str(cache / "raw"), fingerprint="raw")
    if options["num_samples"] and options["num_samples"] < len(data):
        chosen = np.random.RandomState(options["seed"] % 2**32).permutation(len(data))[: options["num_samples"]]
        data = data.select(np.sort(chosen))
    workers = min(options["num_proc"], len(data))
    columns = {"input_ids": List(Value("int32")), "loss_mask": List(Value("uint8")), "length": Value("int32")}
    columns |= {"line": Value("int64"), "cut": Value("int64"), "cause": Value("string"), "detail": Value("string")}
    data = data.map(
        tokenise_batch,
        batched=True,
        batch_size=100,
        remove_columns=["raw"],
        features=Features(columns),
        fn_kwargs={"chat": chat._replace(worker=workers > 1)},
        num_proc=workers if workers > 1 else None,
        new_fingerprint="tokens",  # else datasets would hash the tokenizer; this data set has a fingerprint of its own
        cache_file_name=str(cache / "tokens.arrow"),
        load_from_cache_file=False,
        desc=source.label,
    )
    causes, kept = np.array(data["cause"][:], dtype=object), data["length"][:]
    bad = data.select(np.flatnonzero(causes != "")).select_columns(["line", "cause", "detail"])
    rejected = [
        {"line": row["line"], "file": source.label, "cause": row["cause"], "detail": row["detail"]} for row in bad
    ]
    good = data.select(np.flatnonzero(np.array(kept) > 0))
    return good.select_columns(["input_ids", "loss_mask", "length"]), rejected, np.array(good["cut"][:], dtype=np.int64)


def check_rejected(source, kept, rejected, limit, output):
    """Stop if too many rows, or all of them, were rejected; the list is kept beside the folder that is not written."""
    total, limit = kept + len(rejected), max(limit, source.tolerated)
    if kept and len(rejected) <= limit * total:
        return
    write_rejected(output.with_name(output.name + ".rejected.jsonl"), rejected)
    first = {row["cause"]: row["line"] for row in reversed(rejected)}
    counts = Counter(row["cause"] for row in rejected).most_common()
    causes = ", ".join(f"{count} {cause} (first: line {first[cause]})" for cause, count in counts)
    share = f"{len(rejected)} of {total} rows rejected ({len(rejected) / total:.1%}, max_rejected_ratio {limit:g})"
    where = f"; each row is named in {output}.rejected.jsonl"
    fail(f"{source.label}: {share if kept else f'none of its {total} rows can be used'}: {causes}{where}")


def write_rejected(path, rejected):
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected))


def count_tokens(data):
    """{token id: count} of the supervised tokens, and the number of all tokens."""
    counts, tokens = np.zeros(0, dtype=np.int64), 0
    table = data.with_format("arrow")
    for batch in table.iter(batch_size=1000):
        ids, mask = (batch.column(name).combine_chunks().flatten().to_numpy() for name in ("input_ids", "loss_mask"))
        found = np.bincount(ids[mask == 1], minlength=len(counts))
        found[: len(counts)] += counts
        counts, tokens = found, tokens + len(ids)
    return {int(token): int(counts[token]) for token in np.flatnonzero(counts)}, tokens


def build(sources, chat, options, config, temporary, output):
    """Write the prepared folder into temporary; config gets the counts."""
    import torch
    from datasets import DatasetDict

    splits, cuts, rejected = {}, {}, {}
    for split, (source, rows) in sources.items():
        sampled = options if split == "train" else {**options, "num_samples": None}
        cache = temporary / "cache" / split
        cache.mkdir(parents=True)
        splits[split], rejected[split], cuts[split] = map_rows(source, rows, chat, sampled, cache)
        check_rejected(source, len(splits[split]), rejected[split], options["max_rejected_ratio"], output)
    if options["validation_ratio"]:
        rows = len(splits["train"])
        size = max(1, round(rows * options["validation_ratio"]))
        if size >= rows:
            fail(f"validation_ratio {options['validation_ratio']} leaves no row of {rows} to train on")
        order = np.random.RandomState(options["seed"] % 2**32).permutation(rows)
        parts = {"validation": np.sort(order[:size]), "train": np.sort(order[size:])}
        whole, cut = splits["train"], cuts["train"]
        splits = {split: whole.select(part) for split, part in parts.items()}
        cuts = {split: cut[part] for split, part in parts.items()}
    DatasetDict(splits).save_to_disk(str(temporary))
    for split, data in DatasetDict.load_from_disk(str(temporary)).items():
        counts, tokens = count_tokens(data)
        config["splits"][split] = {
            "rows": len(data),
            "tokens": tokens,
            "supervised_tokens": sum(counts.values()),
            "longest": max(data["length"][:]),
            "truncated": int((cuts[split] > 0).sum()),
            "rejected": dict(Counter(row["cause"] for row in rejected.get(split, []))),
        }
        if split == "train":
            torch.save(counts, temporary / "token_freq.pt")
    write_rejected(temporary / "rejected.jsonl", [row for rows in rejected.values() for row in rows])
    shutil.rmtree(temporary / "cache")
    # Last, so that it vouches for everything above.
    write_atomic(temporary / "data_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def replace_folder(temporary, output):
    """Put the finished folder in the place of an older one."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.rename(output, old)
    os.rename(temporary, output)
    shutil.rmtree(old, ignore_errors=True)
    output.with_name(output.name + ".rejected.jsonl").unlink(missing_ok=True)


def prepare(
    dataset,
    output_path,
    target_model_path,
    *,
    validation_dataset=None,
    dataset_path=None,
    chat_template="llama3",
    max_length=2048,
    num_samples=None,
    train_only_last_turn=False,
    validation_ratio=0.0,
    num_proc=None,
    max_rejected_ratio=0.01,
    seed=0,
    trust_remote_code=False,
):
    """Write the prepared folder, or keep it if its fingerprint is the one wanted. Returns its data_config as a dict.

    dataset: name of a preset or path of a JSON Lines file. One process calls this; the others wait and use open_data.
    """
    options = dict(num_samples=num_samples, validation_ratio=validation_ratio, max_rejected_ratio=max_rejected_ratio)
    check_options(chat_template, max_length, options, validation_dataset)
    found = {"train": find_source(str(dataset), dataset_path, "train")}
    if validation_dataset:
        own_path = dataset_path if str(validation_dataset) in PRESETS else None
        found["validation"] = find_source(str(validation_dataset), own_path, "validation")
    output = Path(output_path).expanduser().absolute()
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / "data_config.json").is_file()):
        fail(f"output_path {output} holds something that is not a prepared data set: choose another folder")
    tokenizer = load_tokenizer(resolve_target(target_model_path, weights=False)[1], trust_remote_code)
    only_last = bool(train_only_last_turn)
    chat = make_chat(
        tokenizer, chat_template, max_length, only_last, lambda fields: first_row_with(found.values(), fields)
    )
    loaded = {split: source.load() for split, source in found.items()}
    ingredients = {
        "format_version": FORMAT_VERSION,
        "inputs": {split: digest for split, (digest, _) in loaded.items()},
        "dataset": {split: source.label if source.path is None else "file" for split, source in found.items()},
        "tokenizer": hash_tokenizer(chat),
        "chat_template": chat_template,
        "markers": chat.template._asdict(),
        "max_length": max_length,
        "train_only_last_turn": only_last,
        "seed": seed,
        **options,
    }
    ingredients = json.loads(json.dumps(ingredients))
    fingerprint = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
    if (output / "data_config.json").is_file():
        config = json.loads((output / "data_config.json").read_text())
        if config.get("fingerprint") == fingerprint:
            open_data(output)
            print(f"{output}: the same input, tokenizer and options as before (fingerprint {fingerprint[:12]}): reused")
            return config
        print(f"{output}: built from another input, tokenizer or option: building it again")
    config = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "ingredients": ingredients}
    config |= {"target_model_path": str(target_model_path), "vocab_size": chat.vocab_size, "splits": {}}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options |= {"seed": seed, "num_proc": max(1, min(num_proc or cores, cores))}
    temporary = output.with_name(f".{output.name}.building")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with progress_bars(sys.stderr.isatty()):
            build(
                {split: (found[split], loaded[split][1]) for split in found}, chat, options, config, temporary, output
            )
        replace_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    summarise(output, config, tokenizer)
    return config


def check_options(chat_template, max_length, options, validation_dataset):
    ratio, samples = options["validation_ratio"], options["num_samples"]
    if chat_template not in TEMPLATES and chat_template != "auto":
        fail(f"chat_template {chat_template}: known are {', '.join(TEMPLATES)} and auto")
    if max_length < 2:
        fail(f"max_length {max_length}: at least 2 tokens, since each predicts the next")
    if not 0 <= ratio < 1 or not 0 <= options["max_rejected_ratio"] <= 1:
        fail(
            f"validation_ratio {ratio} must be in [0, 1), max_rejected_ratio {options['max_rejected_ratio']} in [0, 1]"
        )
    if ratio and validation_dataset:
        fail(f"validation_ratio {ratio} and validation_dataset {validation_dataset}: give one of them")
    if samples is not None and samples < 1:
        fail(f"num_samples {samples}: at least 1, or leave it out for all rows")


def hash_tokenizer(chat):
    backend = chat.tokenizer.backend_tokenizer.to_str()
    special = {key: str(value) for key, value in chat.tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([backend, chat.source, special], sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def progress_bars(wanted):
    """datasets' progress bars on a terminal only: in a log file they are noise around the one line that matters."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    if not wanted:
        disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def summarise(output, config, tokenizer):
    """Print the counts, and the beginning of one row with its supervised part between the marks ⟦ and ⟧."""
    for split, part in config["splits"].items():
        share = part["supervised_tokens"] / part["tokens"]
        print(
            f"{split}: {part['rows']:,} rows, {part['tokens']:,} tokens, {part['supervised_tokens']:,} supervised "
            f"({share:.1%}), longest row {part['longest']:,}, {part['truncated']:,} truncated to max_length"
        )
        if part["rejected"]:
            print(f"{split}: rejected " + ", ".join(f"{count} {cause}" for cause, count in part["rejected"].items()))
    row = open_data(output)[0]["train"][0]
    ids, mask = np.array(row["input_ids"]), np.array(row["loss_mask"])
    borders = [0, *np.flatnonzero(np.diff(mask)) + 1, len(ids)]
    parts = [(tokenizer.decode(ids[a:b]), mask[a]) for a, b in zip(borders, borders[1:], strict=False)]
    text = "".join(f"⟦{part}⟧" if supervised else part for part, supervised in parts)
    print(f"first row, supervised between ⟦ and ⟧:\n{text[:1500]}{' ...' if len(text) > 1500 else ''}")
    print(f"written to {output}")


# ---------------------------------------------------------------------------- command line
def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("input")
    group.add_argument("--dataset", required=True, help=f"preset ({', '.join(PRESETS)}) or path of a JSON Lines file")
    group.add_argument("--dataset_path", help="local copy of the preset's hub repository, instead of a download")
    group.add_argument("--validation_dataset", help="JSON Lines file, or ultrachat for its test split; default: none")
    group.add_argument(
        "--target_model_path", required=True, help="model folder or hub id; only its tokenizer is loaded"
    )
    group.add_argument(
        "--trust_remote_code", type=boolean, nargs="?", const=True, default=False, help="of the tokenizer"
    )
    group = parser.add_argument_group("what becomes of it")
    group.add_argument("--output_path", required=True, help="folder to write")
    group.add_argument(
        "--chat_template", default="llama3", help=f"{', '.join(TEMPLATES)}, or auto: the tokenizer's own"
    )
    group.add_argument("--max_length", type=int, default=2048, help="tokens; longer rows are truncated at the right")
    group.add_argument("--num_samples", type=int, help="rows of the training input, taken at random; default: all")
    group.add_argument("--train_only_last_turn", type=boolean, nargs="?", const=True, default=False,
                       help="supervise only the last assistant turn of each row")  # fmt: skip
    group.add_argument("--validation_ratio", type=float, default=0.0, help="share of the rows kept back for validation")
    group.add_argument("--max_rejected_ratio", type=float, default=0.01, help="stop if more of the rows are unusable")
    group.add_argument("--seed", type=int, default=0, help="of num_samples and validation_ratio")
    group.add_argument("--num_proc", type=int, help="processes, at most one a core; default: one a core")
    return parser.parse_args(normalise_argv(sys.argv[1:] if argv is None else argv))


def main(args):
    return prepare(**vars(args))


if __name__ == "__main__":
    main(parse_args())
