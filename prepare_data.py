"""Turn conversations into tokens and a loss mask: the data set that every later stage reads.

In:  --dataset: a preset (sharegpt, ultrachat, pydoc) or a JSON Lines file. A row is a conversation ({"conversations"
     or "messages": [{"role", "content"} or {"from", "value"}, ...]}, also "tools"), a text rendered beforehand
     ({"text"}) or tokens ({"input_ids", "loss_mask"}). --target_model_path: its tokenizer and chat template are read.
Out: --output_path: train/ and validation/ in Arrow (input_ids int32; loss_mask uint8, 1 = to be produced by the
     assistant, its end-of-turn token included; length int32), data_config.json (fingerprint, what it is made of,
     counts), token_freq.pt ({token id: count} of train's supervised tokens), rejected.jsonl (line, file, cause,
     detail). With the same input, tokenizer and options as before nothing is built again.

    python prepare_data.py --dataset pydoc --target_model_path TARGET --output_path data/pydoc
    python prepare_data.py --dataset chats.jsonl --target_model_path meta-llama/Llama-3.1-8B-Instruct \\
        --output_path data/chats --max_length 4096 --validation_ratio 0.01
    python prepare_data.py --dataset sharegpt --dataset_path /mirror/ShareGPT_Vicuna_unfiltered \\
        --target_model_path Qwen/Qwen3-8B --chat_template qwen --output_path data/sharegpt
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
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

FORMAT_VERSION = 1  # part of the fingerprint: raise it whenever the same input would give other rows
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken"]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
AFTER = {"": "system user", "system": "user", "user": "assistant", "assistant": "user tool", "tool": "tool assistant"}
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class Template(NamedTuple):
    """Assistant turns lie behind one of headers, up to and including one of ends.

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
    words = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            word = "--" + (aliases or {}).get(name, name) + equals + value
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
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            fail(f"target model {name}: neither a folder nor a hub id such as org/name")
        folder = _download(name, f"target model {name}", SMALL_FILES + ["*.safetensors"] * weights)
        if weights and not any(folder.glob("*.safetensors")):
            folder = _download(name, f"target model {name}", [*SMALL_FILES, "*.bin"])
    folder = folder.resolve()
    if (folder / "refs" / "main").is_file():  # an entry of the hub's cache
        folder = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    found = [folder] if (folder / "config.json").is_file() else []
    level = [folder]
    for _ in range(3):
        if found:
            break
        level = sorted(path for parent in level if parent.is_dir() for path in parent.iterdir() if path.is_dir())
        found = [path for path in level if _has_model_type(path / "config.json")]
        # MLflow may have data/config beside data/model, with or without a second config.json among the weights.
        found = [path for path in found if path.name != "config" or path.parent / "model" not in found]
    if len(found) != 1:
        names = ": " + ", ".join(str(path.relative_to(folder)) for path in found) if found else ""
        fail(f"target model {name}: no config.json in it, and {len(found)} models below it instead of one{names}")
    model = found[0]
    if model.name == "config" and (model.parent / "model").is_dir():
        model, found = model.parent / "model", [_link_together(model, model.parent / "model")]
    for tokenizer in (model, model.parent / "tokenizer", model.parent / "components" / "tokenizer"):
        if any((tokenizer / file).is_file() for file in TOKENIZER_FILES):
            return found[0], tokenizer
    fail(f"{model}: no tokenizer in it (looked for {', '.join(TOKENIZER_FILES)}) nor in a folder tokenizer beside it")


def _download(repo, what, patterns, repo_type="model"):
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo, repo_type=repo_type, allow_patterns=patterns))
    except Exception as error:  # errors of several libraries, each of which means that the files cannot be had
        fail(f"{what}: not a local folder, and the hub does not deliver it ({type(error).__name__}: {error})")


def _has_model_type(path):
    with contextlib.suppress(OSError, ValueError):
        return "model_type" in json.loads(path.read_text())
    return False


def _link_together(*folders):
    """One folder of links in the hub's cache: transformers wants one folder, and the input may be mounted read-only."""
    from huggingface_hub.constants import HF_HOME

    files = {path.name: path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()}
    merged = Path(HF_HOME) / "mlflow_models" / hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    merged.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        with contextlib.suppress(FileExistsError):  # another rank was faster
            (merged / name).symlink_to(path)
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
    import torch

    if not Path(path).is_file():
        fail(f"token counts {path}: no such file")
    try:
        counts = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind fails anywhere in the unpickler
        fail(f"token counts {path}: not a file of plain tensors or numbers ({type(error).__name__})")
    if isinstance(counts, torch.Tensor) and counts.dim() == 1:
        counts = {token: count for token, count in enumerate(counts.tolist()) if count}
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
    """Rows of one rank in one optimizer step. The last step of an epoch may be short: nothing is dropped."""
    batch = order[step * global_batch_size : (step + 1) * global_batch_size]
    return [int(row) for row in batch[rank::world_size]]


# ---------------------------------------------------------------------------- one row: from JSON to messages
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
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise Rejected("malformed tools", error) from None
    if not isinstance(tools, list | None):
        raise Rejected("malformed tools", type(tools).__name__)
    return messages[: len(roles) - roles[::-1].index("assistant")], tools


def read_message(turn):
    """A message with role and content; an assistant's also with reasoning (None if it has none) and tool_calls."""
    role = ROLES.get(str(turn.get("role") or turn.get("from")).lower())
    if role is None:
        raise Rejected("unknown role", repr(turn.get("role") or turn.get("from")))
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if role == "tool" and not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    message = {key: turn[key] for key in ("tool_calls", "tool_call_id", "name") if turn.get(key)} | {"role": role}
    if role == "assistant":
        reasoning = [turn[key] for key in REASONING_FIELDS if isinstance(turn.get(key), str) and turn[key].strip()]
        message["reasoning"] = reasoning[0] if reasoning else None
        calls = message.get("tool_calls", [])
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise Rejected("malformed message", "tool_calls is not a list of objects")
        for call in calls:  # their arguments are text on the wire, but templates want the object
            function = call.get("function", call)
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                with contextlib.suppress(ValueError):
                    function["arguments"] = json.loads(function["arguments"])
        if not isinstance(content, str | None) or not (content or "").strip():
            if not calls and not reasoning:
                raise Rejected("empty", "an assistant turn without content")
            content = None if calls else ""  # some templates drop the calls of a message that has content
    if not isinstance(content, str) and "tool_calls" not in message:
        raise Rejected("malformed message", f"the content of a {role} turn is {type(content).__name__}")
    return message | {"content": content}


def check_markers(value, template):
    """No text of a row may contain a marker: a prompt could declare itself supervised, a reply end too early."""
    if isinstance(value, str):
        for marker in template.headers + template.ends:
            if marker.strip() in value:
                raise Rejected("marker inside content", repr(marker))
    elif isinstance(value, list | dict):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            check_markers(part, template)


# ---------------------------------------------------------------------------- one row: text, spans, tokens, mask
class Chat(NamedTuple):
    """All that turns a row into tokens; sent to the worker processes."""

    tokenizer: object
    encoder: object  # tokenizers.Tokenizer without post-processing, which would trim blanks off the offsets
    template: Template
    opening: str  # what the generation prompt has behind the header (<think>): not produced by the assistant
    max_length: int
    only_last: bool


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
    check_markers([messages, tools], chat.template)
    outputs = [message for message in messages if message["role"] == "tool"]
    try:
        text, spans = render_reply(messages, tools, chat)
        supervised = [text[start:end] for start, end in spans]
        if outputs:  # an unknown template may close a call by a marker of its own, so that the span would run on
            for message in outputs:
                message["content"] = "x"
            other, other_spans = render_reply(messages, tools, chat)
            if supervised != [other[start:end] for start, end in other_spans]:
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
    """(ids int32 [T], mask uint8 [T]) from one encoding: supervised is a token whose characters all lie in one span."""
    encoding = encoder.encode(text, add_special_tokens=False)
    starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=np.uint8)
    for start, end in spans:
        # A token of no characters stands behind what was trimmed off it, so at the span's start it is still prompt.
        mask |= (starts >= start) & (ends <= end) & ((ends > starts) | (ends > start))
    return np.array(encoding.ids, dtype=np.int32), mask


def read_tokens(row, chat):
    """(ids, mask) of a row that is tokenised already."""
    ids, mask, size = row["input_ids"], row.get("loss_mask"), chat.encoder.get_vocab_size()
    if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
        raise Rejected("bad tokens", "input_ids and loss_mask must be lists of one length")
    if not all(type(value) is int for value in ids + mask) or not set(mask) <= {0, 1}:
        raise Rejected("bad tokens", "input_ids must be integers, loss_mask 0 or 1")
    if ids and not 0 <= min(ids) <= max(ids) < size:
        raise Rejected("bad tokens", f"token ids {min(ids)} to {max(ids)}, the tokenizer has {size}")
    mask = np.array(mask, dtype=np.uint8)
    if chat.only_last and mask.any():  # the last run of ones is the last turn
        mask[: np.flatnonzero(np.diff(mask, prepend=0) == 1)[-1]] = 0
    return np.array(ids, dtype=np.int32), mask


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
        ids, mask = read_tokens(row, chat)
    else:
        text, spans = row.get("text"), []
        if "conversations" in row or "messages" in row:
            text, spans = chat_spans(row, chat)
        elif isinstance(text, str):
            spans = find_spans(text, chat.template, chat.opening)
        elif row:
            raise Rejected("unknown form", f"fields {', '.join(row)}")
        ids, mask = encode(text or "", spans[-1:] if chat.only_last else spans, chat.encoder)
    if not len(ids):
        raise Rejected("empty", "no text")
    cut = max(0, len(ids) - chat.max_length)
    ids, mask = ids[: chat.max_length], mask[: chat.max_length]
    if not mask.any():
        raise Rejected("no supervised token", f"within {chat.max_length} tokens" if cut else "")
    return ids, mask, cut


def tokenise_batch(batch, chat, worker):
    """For datasets' map: rows with input_ids, loss_mask, length, tokens cut off; cause and detail if rejected."""
    if worker:  # the rows are spread over processes already, and threads do not survive the fork
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows = []
    for raw in batch["raw"]:
        try:
            ids, mask, cut = tokenise(raw, chat)
            rows.append((ids, mask, len(ids), cut, "", ""))
        except Rejected as rejected:
            none = np.zeros(0, dtype=np.uint8)
            rows.append((none.astype(np.int32), none, 0, 0, rejected.args[0], str(rejected.args[1])[:200]))
    names = ("input_ids", "loss_mask", "length", "cut", "cause", "detail")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


# ---------------------------------------------------------------------------- does the template fit the tokenizer?
PROBE = [
    {"role": role, "content": content, "reasoning": None}
    for role, content in (("user", "Qone"), ("assistant", "Aone"), ("user", "Qtwo"), ("assistant", "Atwo"))
]


def fits(text, template):
    """Does the rendered probe show both of its replies, each closed by an end marker?"""
    parts = [text[start:end] for start, end in find_spans(text, template)]
    return (
        len(parts) == 2
        and all(part.endswith(template.ends) for part in parts)
        and "Aone" in parts[0]
        and "Atwo" in parts[1]
    )


def derive_template(tokenizer, text):
    """The markers in the rendered probe, for a family that TEMPLATES does not name; None if they do not describe it.

    Header: what the generation prompt has behind the question, as far as it stands before both replies, without what
    closes the question if that can be told apart. Ends: the first special token behind each reply.
    """
    prompt, generation = (render(tokenizer, PROBE[:1], add_generation_prompt=flag) for flag in (False, True))
    found = re.search("Qone(.*?)Aone(.*?)Qtwo(.*?)Atwo(.*)", text, re.DOTALL)
    first, end_one, second, end_two = found.groups() if found else [""] * 4
    header = os.path.commonprefix([generation.rpartition("Qone")[2], first, second])
    if len(generation) > len(prompt):
        header = header.removeprefix(prompt.rpartition("Qone")[2])
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = re.compile(r"\s*(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")")
    ends = [match[1] for match in map(special.match, (end_two, end_one)) if match and match[1]]
    template = Template((header,), tuple(dict.fromkeys(ends)))
    return template if header.strip() and ends and fits(text, template) else None


def choose_template(tokenizer, name):
    """(Template, opening) of chat_template for this tokenizer. Ends with one line if its markers do not occur."""
    try:
        text = render(tokenizer, PROBE)
        prompt = render(tokenizer, PROBE[:1], add_generation_prompt=True)
    except Exception as error:  # the template is foreign code
        fail(f"the tokenizer's chat template does not render a plain conversation: {type(error).__name__}: {error}")
    fitting = [known for known, template in TEMPLATES.items() if fits(text, template)]
    if name == "auto":  # a known family also brings the markers that the probe does not show
        template = TEMPLATES[fitting[0]] if fitting else derive_template(tokenizer, text)
        problem, remedy = "finds no markers in", "give rows with input_ids and loss_mask"
    else:
        template = TEMPLATES[name] if name in fitting else None
        problem = (
            f"needs {' or '.join(map(repr, TEMPLATES[name].headers))} ... {TEMPLATES[name].ends[0]!r}, not found in"
        )
        remedy = f"use --chat_template {' or '.join([*fitting, 'auto'])}"
    if template is None:
        fail(f"chat_template {name} {problem} what the tokenizer renders: {text[:200]!r}; {remedy}")
    behind = [prompt.rpartition(header)[2] for header in template.headers if header in prompt]
    return template, min(behind, key=len, default="")


def make_chat(tokenizer, name, max_length, only_last, sources):
    """The Chat of a tokenizer, which needs a chat template unless all rows are rendered or tokenised beforehand."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.post_processor = None
    encoder.no_truncation()
    encoder.no_padding()
    if tokenizer.chat_template:
        return Chat(tokenizer, encoder, *choose_template(tokenizer, name), max_length, only_last)
    for source, files in sources.values():
        for number, line in [(1, b'{"messages"')] if source in PRESETS else read_lines(files[0]):
            if re.search(
                rb'"(messages|conversations)"' if name != "auto" else rb'"(messages|conversations|text)"', line
            ):
                fail(f"row {number} of {source} needs the target's chat template, but its tokenizer has none")
    template = TEMPLATES.get(name, TEMPLATES["llama3"])  # with auto all rows are tokenised, and none is searched
    return Chat(tokenizer, encoder, template, "", max_length, only_last)


# ---------------------------------------------------------------------------- presets
# Suites of tests, and programs that act on import or open windows: their docstrings explain nothing.
NOT_DOCUMENTED = {"antigravity", "this", "idlelib", "turtledemo", "test", "tests", "__main__", "idle_test", "lib2to3"}
QUESTIONS = {
    "module": ("What is the Python module {} for?", "Describe the module {}.", "When do I need the module {}?"),
    "class": ("What is {}?", "Explain the class {}.", "What is the class {} for?"),
    "function": ("What does {} do?", "Explain the function {}.", "How do I use {}?"),
    "method": ("And its method {}?", "What about its method {}?", "What does its {} do?"),
}


@functools.cache
def pydoc_lines():
    """Rows on the running Python's standard library: a question by name, the docstring as the answer.

    The sources are parsed, nothing is imported. A class and its first three methods make one conversation.
    """
    library, seen, lines = Path(sysconfig.get_path("stdlib")), set(), []

    def turns(kind, name, node, asked=None):
        short, doc = name.rpartition(".")[2], ast.get_docstring(node) or ""
        if short.startswith("_") or len(doc) < 20 or doc in seen:  # private, hardly documented, or said already
            return []
        seen.add(doc)
        question = QUESTIONS[kind][zlib.crc32(name.encode()) % 3].format(asked or name)
        signature = f"{short}({ast.unparse(node.args)})\n\n" if hasattr(node, "args") else f"{kind} {name}\n\n"
        return [{"role": "user", "content": question}, {"role": "assistant", "content": signature + doc}]

    def add(name, messages):
        if messages:
            lines.append(json.dumps({"id": f"pydoc {name}", "conversations": messages}).encode())

    for module in sorted(sys.stdlib_module_names - NOT_DOCUMENTED):
        for path in [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]:
            parts = path.relative_to(library).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            if not path.is_file() or NOT_DOCUMENTED & set(parts) or re.search(r"(^|\.)_", name):
                continue
            tree = ast.parse(path.read_bytes())
            add(name, turns("module", name, tree))
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    add(f"{name}.{node.name}", turns("function", f"{name}.{node.name}", node))
                elif isinstance(node, ast.ClassDef):
                    qualified = f"{name}.{node.name}"
                    messages = turns("class", qualified, node)
                    for method in node.body:
                        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
                            full = f"{qualified}.{method.name}"
                            if messages and len(messages) < 8:
                                messages += turns("method", full, method, asked=method.name)
                            else:
                                add(full, turns("function", full, method))
                    add(qualified, messages)
    return lines


def from_sharegpt(row):
    """Long chats were cut into pieces there, so that many begin with an assistant turn: leave that out."""
    turns = row["conversations"] or []
    return {"conversations": list(itertools.dropwhile(lambda turn: ROLES.get(turn["from"]) == "assistant", turns))}


# name: repo on the hub, its file pattern for each split, conversion of its rows, tolerated share of rejected rows.
PRESETS = {
    # Collected from users: it has empty turns, one-sided chats and turns out of order even where it was not cut. The
    # share is an assumption, chosen so that only a wrong template or schema stops.
    "sharegpt": {
        "repo": "Aeala/ShareGPT_Vicuna_unfiltered",
        "files": {"train": "ShareGPT_V4.3_unfiltered_cleaned_split.json"},
        "convert": from_sharegpt,
        "tolerated": 0.1,
    },
    "ultrachat": {
        "repo": "HuggingFaceH4/ultrachat_200k",
        "files": {"train": "data/train_sft-*.parquet", "validation": "data/test_sft-*.parquet"},
        "convert": lambda row: {"messages": row["messages"]},
    },
    "pydoc": {"files": {"train": ""}},
}


# ---------------------------------------------------------------------------- where rows come from
def find_files(name, dataset_path, split):
    """Files behind the name of a preset or file; missing and empty ones end here, before anything is loaded."""
    if name not in PRESETS:
        path = Path(name).expanduser()
        if not path.is_file():
            fail(f"dataset {name}: no such file, and not one of the presets {', '.join(PRESETS)}")
        if next(read_lines(path), None) is None:
            fail(f"dataset {name} is empty: no row in it")
        return [path]
    preset = PRESETS[name]
    if split not in preset["files"]:
        fail(f"preset {name} has no {split} split: use --validation_ratio, or a file of your own")
    if "repo" not in preset:
        return []
    pattern = preset["files"][split]
    folder = Path(dataset_path or "").expanduser()
    if not dataset_path:
        what = f"preset {name}: give a local copy of {preset['repo']} as --dataset_path"
        folder = _download(preset["repo"], what, [pattern], repo_type="dataset")
    files = sorted(folder.glob(pattern))
    if not files:
        fail(f"preset {name}: {folder} has no {pattern}, which {preset['repo']} has on the hub")
    return files


def read_lines(path):
    """(line number from 1, line) of a file; blank lines at its end are no rows."""
    blank = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            blank.append((number, line))
            if line:
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

        kind, names = files[0].suffix[1:], [str(path) for path in files]
        table = load_dataset(kind, data_files=names, split="train", cache_dir=str(cache))
        for number, row in enumerate(table, 1):
            yield number, json.dumps(PRESETS[name]["convert"](row)).encode()


# ---------------------------------------------------------------------------- building the prepared folder
def build_split(source, files, chat, options, num_samples, cache):
    """(Dataset of the rows kept, tokens cut off each, list of the rejected rows) of one source."""
    from datasets import Dataset, Features, List, Value

    columns = {"line": Value("int64"), "raw": Value("large_binary")}
    rows = lambda: ({"line": line, "raw": raw} for line, raw in read_rows(source, files, cache / "hub"))  # noqa: E731
    data = Dataset.from_generator(rows, Features(columns), str(cache / "raw"), fingerprint="raw")
    if num_samples and num_samples < len(data):
        data = data.select(np.sort(np.random.RandomState(options["seed"]).permutation(len(data))[:num_samples]))
    workers = min(options["num_proc"], len(data))
    columns = {"line": Value("int64"), "input_ids": List(Value("int32")), "loss_mask": List(Value("uint8"))}
    columns |= {"length": Value("int32"), "cut": Value("int64"), "cause": Value("string"), "detail": Value("string")}
    data = data.map(
        functools.partial(tokenise_batch, chat=chat, worker=workers > 1),
        batched=True,
        batch_size=100,
        remove_columns=["raw"],
        features=Features(columns),
        num_proc=workers if workers > 1 else None,
        new_fingerprint="tokens",  # else datasets would hash the tokenizer; this data set has a fingerprint of its own
        cache_file_name=str(cache / "tokens.arrow"),
        load_from_cache_file=False,
        desc=source,
    )
    lengths = np.array(data["length"][:])
    rejected = data.select(np.flatnonzero(lengths == 0)).select_columns(["line", "cause", "detail"]).to_list()
    rejected = [
        {"line": row["line"], "file": source, "cause": row["cause"], "detail": row["detail"]} for row in rejected
    ]
    data, total = data.select(np.flatnonzero(lengths)), len(data)
    limit = max(options["max_rejected_ratio"], PRESETS.get(source, {}).get("tolerated", 0))
    if not len(data) or len(rejected) > limit * total:
        first = {row["cause"]: row["line"] for row in reversed(rejected)}
        counts = Counter(row["cause"] for row in rejected).most_common()
        causes = ", ".join(f"{count} {cause} (first: line {first[cause]})" for cause, count in counts)
        share = f"{len(rejected)} of {total} rows rejected ({len(rejected) / total:.1%}, max_rejected_ratio {limit:g})"
        fail(f"{source}: {share if len(data) else f'none of {total} rows can be used'}: {causes}")
    return data.select_columns(["input_ids", "loss_mask", "length"]), np.array(data["cut"][:]), rejected


def count_tokens(data):
    """({token id: count} of the supervised tokens, number of all tokens) of a Dataset."""
    counts, tokens = np.zeros(0, dtype=np.int64), 0
    for batch in data.with_format("arrow").iter(batch_size=1000):
        ids, mask = (batch.column(name).combine_chunks().flatten().to_numpy() for name in ("input_ids", "loss_mask"))
        found = np.bincount(ids[mask == 1], minlength=len(counts))
        found[: len(counts)] += counts
        counts, tokens = found, tokens + len(ids)
    return {int(token): int(counts[token]) for token in np.flatnonzero(counts)}, tokens


def build(sources, chat, options, config, folder):
    """Write the prepared folder; config gets the counts and is written last, so that it vouches for all the rest."""
    import torch
    from datasets import DatasetDict, disable_progress_bars

    if not sys.stderr.isatty():  # in a log file a bar is noise
        disable_progress_bars()
    splits, cuts, rejected = {}, {}, {}
    for split, (source, files) in sources.items():
        cache, samples = folder / "cache" / split, options["num_samples"] if split == "train" else None
        cache.mkdir(parents=True)
        splits[split], cuts[split], rejected[split] = build_split(source, files, chat, options, samples, cache)
    if options["validation_ratio"]:
        data, cut, rows = splits["train"], cuts["train"], len(splits["train"])
        size = max(1, round(rows * options["validation_ratio"]))
        if size >= rows:
            fail(f"validation_ratio {options['validation_ratio']} leaves none of {rows} rows to train on")
        order = np.random.RandomState(options["seed"]).permutation(rows)
        for split, part in (("train", np.sort(order[size:])), ("validation", np.sort(order[:size]))):
            splits[split], cuts[split] = data.select(part), cut[part]
    DatasetDict(splits).save_to_disk(str(folder))
    for split, data in DatasetDict.load_from_disk(str(folder)).items():
        counts, tokens = count_tokens(data)
        if split == "train":
            torch.save(counts, folder / "token_freq.pt")
        config["splits"][split] = {
            "rows": len(data),
            "tokens": tokens,
            "supervised_tokens": sum(counts.values()),
            "longest": max(data["length"][:]),
            "truncated": int((cuts[split] > 0).sum()),
            "rejected": Counter(row["cause"] for row in rejected.get(split, ())),
        }
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for rows in rejected.values() for row in rows]
    write_atomic(folder / "rejected.jsonl", "".join(lines))
    shutil.rmtree(folder / "cache")
    write_atomic(folder / "data_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def summarise(output, tokenizer):
    """Print the counts, and the beginning of one row with its supervised part between ⟦ and ⟧. Returns data_config."""
    splits, config = open_data(output)
    for split, part in config["splits"].items():
        share = part["supervised_tokens"] / part["tokens"]
        print(f"{split}: {part['rows']:,} rows, {part['tokens']:,} tokens, {part['supervised_tokens']:,} supervised")
        print(f"    ({share:.1%}), longest row {part['longest']:,}, {part['truncated']:,} truncated to max_length")
        print("    rejected: " + (", ".join(f"{n} {cause}" for cause, n in part["rejected"].items()) or "none"))
    row = splits["train"][0]
    ids, mask = np.array(row["input_ids"]), np.array(row["loss_mask"])
    borders = [0, *np.flatnonzero(np.diff(mask)) + 1, len(ids)]
    parts = [("⟦{}⟧" if mask[a] else "{}").format(tokenizer.decode(ids[a:b])) for a, b in itertools.pairwise(borders)]
    print(f"the first row, supervised between ⟦ and ⟧:\n{''.join(parts)[:1500]}\nwritten to {output}")
    return config


def check_options(chat_template, max_length, num_samples, validation_ratio, max_rejected_ratio, validation_dataset):
    if chat_template not in TEMPLATES and chat_template != "auto":
        fail(f"chat_template {chat_template}: known are {', '.join(TEMPLATES)} and auto")
    if max_length < 2:
        fail(f"max_length {max_length}: at least 2 tokens, since each predicts the next")
    if not 0 <= validation_ratio < 1 or not 0 <= max_rejected_ratio <= 1:
        fail(
            f"validation_ratio {validation_ratio} must be in [0, 1), max_rejected_ratio {max_rejected_ratio} in [0, 1]"
        )
    if validation_ratio and validation_dataset:
        fail(f"validation_ratio {validation_ratio} and validation_dataset {validation_dataset}: give one of them")
    if num_samples is not None and num_samples < 1:
        fail(f"num_samples {num_samples}: at least 1, or leave it out for all rows")


def prepare(dataset, output_path, target_model_path, *, validation_dataset=None, dataset_path=None,
            chat_template="llama3", max_length=2048, num_samples=None, train_only_last_turn=False, validation_ratio=0.0,
            num_proc=None, max_rejected_ratio=0.01, seed=0, trust_remote_code=False):  # fmt: skip
    """Write the prepared folder, or keep it if its fingerprint is the one wanted. Returns its data_config as a dict.

    dataset: name of a preset or path of a JSON Lines file. One process calls this, the others wait and use open_data.
    """
    check_options(chat_template, max_length, num_samples, validation_ratio, max_rejected_ratio, validation_dataset)
    names = {"train": str(dataset)} | ({"validation": str(validation_dataset)} if validation_dataset else {})
    if dataset_path and not any("repo" in PRESETS.get(name, {}) for name in names.values()):
        fail(f"dataset_path is a local copy of a preset's hub repository, but dataset is {dataset}")
    sources = {split: (name, find_files(name, dataset_path, split)) for split, name in names.items()}
    output = Path(output_path).expanduser().absolute()
    stored = output / "data_config.json"
    if output.exists() and not stored.is_file() and (output.is_file() or any(output.iterdir())):
        fail(f"output_path {output} holds something that is not a prepared data set: choose another folder")
    tokenizer = load_tokenizer(resolve_target(target_model_path, weights=False)[1], trust_remote_code)
    chat = make_chat(tokenizer, chat_template, max_length, bool(train_only_last_turn), sources)
    options = {"max_length": max_length, "train_only_last_turn": bool(train_only_last_turn), "seed": seed % 2**32}
    options |= {
        "num_samples": num_samples,
        "validation_ratio": validation_ratio,
        "max_rejected_ratio": max_rejected_ratio,
    }
    backend = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    ingredients = {
        "format_version": FORMAT_VERSION,
        "presets": {split: name for split, name in names.items() if name in PRESETS},
        "inputs": {split: hash_source(files) for split, (_, files) in sources.items()},
        "tokenizer": hash_text(json.dumps(backend, default=str, sort_keys=True)),
        "chat_template": [chat_template, *chat.template],
        **options,
    }
    fingerprint = hash_text(json.dumps(ingredients, sort_keys=True))
    if stored.is_file():
        if json.loads(stored.read_text()).get("fingerprint") == fingerprint:
            print(f"{output}: reused, made of the same input, tokenizer and options (fingerprint {fingerprint[:12]})")
            return open_data(output)[1]
        print(f"{output}: made of another input, tokenizer or option, so it is built again")
    config = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "ingredients": ingredients}
    config |= {"dataset": names, "target_model_path": str(target_model_path), "splits": {}}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options["num_proc"] = max(1, min(num_proc or cores, cores))
    # Built beside the output and renamed, so that a killed build never looks complete.
    new, old = (output.with_name(f".{output.name}.{state}") for state in ("building", "replaced"))
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        build(sources, chat, options, config, new)
        if output.exists():
            os.rename(output, old)
        os.rename(new, output)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return summarise(output, tokenizer)


def hash_source(files):
    return hash_text(" ".join(map(hash_file, files))) if files else hash_text(b"\n".join(pydoc_lines()).decode())


def hash_text(text):
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------- command line
def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    switch = {"type": boolean, "nargs": "?", "const": True, "default": False}
    group = parser.add_argument_group("input")
    group.add_argument("--dataset", required=True, help=f"preset ({', '.join(PRESETS)}) or path of a JSON Lines file")
    group.add_argument("--dataset_path", help="local copy of the preset's hub repository, instead of a download")
    group.add_argument("--validation_dataset", help="JSON Lines file, or ultrachat for its test split; default: none")
    group.add_argument("--target_model_path", required=True, help="folder or hub id; only the tokenizer is loaded")
    group.add_argument("--trust_remote_code", **switch, help="let the tokenizer run code of its own")
    group = parser.add_argument_group("what becomes of it")
    group.add_argument("--output_path", required=True, help="folder to write")
    group.add_argument(
        "--chat_template", default="llama3", help=f"{', '.join(TEMPLATES)}, or auto: as the tokenizer has it"
    )
    group.add_argument("--max_length", type=int, default=2048, help="tokens; longer rows are truncated at the right")
    group.add_argument("--num_samples", type=int, help="rows of the training input, taken at random; default: all")
    group.add_argument("--train_only_last_turn", **switch, help="supervise only the last assistant turn of each row")
    group.add_argument("--validation_ratio", type=float, default=0.0, help="share of the rows kept back for validation")
    group.add_argument("--max_rejected_ratio", type=float, default=0.01, help="stop if more of the rows are unusable")
    group.add_argument("--seed", type=int, default=0, help="of num_samples and validation_ratio")
    group.add_argument("--num_proc", type=int, help="processes, at most one a core; default: one a core")
    return parser.parse_args(normalise_argv(sys.argv[1:] if argv is None else argv))


def main(args):
    return prepare(**vars(args))


if __name__ == "__main__":
    main(parse_args())
