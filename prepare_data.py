"""Turn conversations into tokens and a loss mask: the data set that every later stage reads.

In:  a preset (sharegpt, gsm8k, pydoc, ...) or a JSON Lines file with rows {"conversations" or "messages":
     [{"role", "content"} or {"from", "value"}, ...], "tools"}, {"text"} or {"input_ids", "loss_mask"}; a tokenizer.
Out: --output_path: train/ and validation/ in Arrow (input_ids int32; loss_mask uint8, 1 = the assistant's, its
     end-of-turn token included; length int32), data_config.json (fingerprint, its ingredients, counts), token_freq.pt
     ({token id: count} of train's supervised tokens), rejected.jsonl. The same ingredients are not built twice.

    python prepare_data.py --dataset pydoc --target_model_path TARGET --output_path data/pydoc
    python prepare_data.py --dataset chats.jsonl --target_model_path meta-llama/Llama-3.1-8B-Instruct \
        --output_path data/chats --max_length 4096 --validation_ratio 0.01
    python prepare_data.py --dataset chats.jsonl --target_model_path meta-llama/Llama-3.1-8B-Instruct \
        --output_path data/own --regenerate_endpoint http://localhost:8000/v1   # the target's own replies
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import sys
from collections import Counter, namedtuple
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from tokenizers import Tokenizer

from core import common, conversations, dataloader, regeneration, target_files

MIN_ROWS_PER_PROCESS = 500  # below that, starting a process takes longer than its share of the rows

BLANKS = re.compile(r"\s*")

# Assistant turns lie behind one of headers, up to and including one of ends, the first of which closes a final reply.
# joins: a header directly behind an end is the assistant's too, one turn in several channels.
# shared_ends: the next turn begins with them, so that the text has none behind the last reply: the first one is added,
# behind a call the second one. options: variables of the tokenizer's template.
Template = namedtuple("Template", ("headers", "ends", "joins", "shared_ends", "options"), defaults=(False, False, {}))

CHATML = Template(("<|im_start|>assistant\n",), ("<|im_end|>",))

# Behind a tool's output the reply follows without the assistant's own marker.
DEEPSEEK = Template(("<｜Assistant｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁end｜>"), ("<｜end▁of▁sentence｜>",))

TEMPLATES = {
    "llama3": Template(("<|start_header_id|>assistant<|end_header_id|>\n\n",), ("<|eot_id|>", "<|eom_id|>")),
    "llama4": Template(("<|header_start|>assistant<|header_end|>\n\n",), ("<|eot|>", "<|eom|>")),
    "qwen": CHATML,
    "qwen3-thinking": CHATML._replace(options={"enable_thinking": True}),
    "qwen3-instruct": CHATML._replace(options={"enable_thinking": False}),
    "gpt-oss": Template(("<|start|>assistant",), ("<|return|>", "<|end|>", "<|call|>"), joins=True),
    "deepseek-r1-distill": DEEPSEEK,
    "deepseek-v3": DEEPSEEK,
    "phi3": Template(("<|assistant|>\n",), ("<|end|>",)),
    "phi4": Template(("<|im_start|>assistant<|im_sep|>",), ("<|im_end|>",)),
    "gemma": Template(("<start_of_turn>model\n",), ("<end_of_turn>",)),
    "glm": Template(("<|assistant|>",), ("<|user|>", "<|observation|>"), shared_ends=True),
    "kimi-k2": Template(("<|im_assistant|>assistant<|im_middle|>",), ("<|im_end|>",)),
}

# ---------------------------------------------------------------------------- one row: from JSON to tokens and mask
# All that turns a row into tokens. encoder: without post-processing, which would trim blanks off the offsets. template:
# None for auto if the tokenizer has none. opening: what the prompt, so not the assistant, has behind the header.
# call_form: content of a message that calls tools and has no text (None: transformers leaves the key out), and whether
# its arguments are handed over as text.
# thoughts: reasoning is "dropped" as the target answers at once, goes into a "field" that the template reads, or stays
# in the "text" of the reply.
CHAT_FIELDS = ("tokenizer", "encoder", "template", "opening", "call_form", "thoughts", "max_length", "only_last")

Chat = namedtuple("Chat", CHAT_FIELDS)

READS_THOUGHTS = re.compile(r"""reasoning_content|(?:\.|\[['"])(?:reasoning|thinking)\b""")


def render(tokenizer, messages, tools=None, **options):
    """Text of the conversation by the tokenizer's own template; reasoning under every name that templates look for."""
    messages = [
        message | dict.fromkeys(conversations.REASONING_FIELDS, message.get("reasoning")) for message in messages
    ]
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)


def find_spans(text, template, opening=""):
    """[(start, end)] in characters of each assistant turn: what the assistant produces, its end marker included."""
    header, end = (re.compile("|".join(map(re.escape, markers))) for markers in template[:2])
    spans, position = [], 0
    while found := header.search(text, position):
        closing = end.search(text, found.end())
        # The last header before the end: what the first of several tools gives ends with one as well.
        found = list(header.finditer(text, found.start(), closing.start() if closing else len(text)))[-1]
        start = found.end() + (len(opening) if text.startswith(opening, found.end()) else 0)
        position = closing.end() if closing else len(text)
        if template.joins and spans and spans[-1][1] == found.start():
            spans[-1] = (spans[-1][0], position)
        elif start < position:
            spans.append((start, position))
    return spans


def arrange(messages, chat):
    """The messages with calls and reasoning in the form in which the target's template shows them."""
    arranged = []
    for message in messages:
        message = dict(message)
        if message["role"] == "assistant" and chat.thoughts != "text":
            thought, tag, answer = (message["content"] or "").rpartition("</think>")
            if tag:
                message["content"] = answer.lstrip("\n")
                message["reasoning"] = message["reasoning"] or thought.strip().removeprefix("<think>").strip()
            if chat.thoughts == "dropped":
                message["reasoning"] = None
                if not message["content"] and not message.get("tool_calls"):
                    raise conversations.Rejected(
                        "empty", "an assistant turn of reasoning alone, and the target does not reason"
                    )
        if message.get("tool_calls"):
            content, as_text = chat.call_form
            message["content"] = message["content"] or content
            if as_text:
                calls = [(call, call.get("function", call)) for call in message["tool_calls"]]
                texts = [json.dumps(function.get("arguments"), ensure_ascii=False) for _, function in calls]
                message["tool_calls"] = [
                    call | {"function": function | {"arguments": text}}
                    for (call, function), text in zip(calls, texts, strict=True)
                ]
        arranged.append(message)
    return arranged


def reasoning_of(message):
    """(reasoning, answer) of an assistant's message, whichever form it has; "" if there is none."""
    content, reasoning = message["content"] or "", message["reasoning"] or ""
    if not reasoning and "</think>" in content:
        reasoning, content = content.removeprefix("<think>").split("</think>", 1)
    return reasoning.strip(), content


def shows(text, message):
    """Does the text of a reply have the message's reasoning, which the answer may say again?"""
    reasoning, answer = reasoning_of(message)
    return not reasoning or text.count(reasoning) > answer.count(reasoning)


def render_reply(messages, tools, chat):
    """(text, spans) of a conversation that ends with the reply as the target produces it, reasoning included.

    Templates of reasoning models drop what stands before </think> from every turn: right for the history, but it loses
    the reasoning of the last reply. Then the text is the generation prompt, and behind it what the target answers.
    """
    template, last = chat.template, messages[-1]
    text = render(chat.tokenizer, messages, tools, **template.options)
    if template.shared_ends and not text.endswith(template.ends):
        text += template.ends[1 if last.get("tool_calls") else 0]
    spans = find_spans(text, template, chat.opening)
    if "tool_calls" in last or not spans or shows(text[spans[-1][0] :], last):
        return text, spans
    if "</think>" not in str(chat.tokenizer.chat_template):
        return text, spans
    reasoning, content = reasoning_of(last)
    if text.startswith("<think></think>", spans[-1][0]):  # the template has a place for it, and no blanks around it
        text = text[: spans[-1][0]] + f"<think>{reasoning}" + text[spans[-1][0] + len("<think>") :]
        return text, find_spans(text, template, chat.opening)
    prompt = render(chat.tokenizer, messages[:-1], tools, add_generation_prompt=True, **template.options)
    prompt = re.sub(r"(<think>\n?)?\Z", "<think>\n", prompt, count=1)
    text = f"{prompt}{reasoning}\n</think>\n\n{content.strip()}{template.ends[0]}"
    return text, find_spans(text, template, chat.opening)


def chat_spans(row, chat):
    """(text, spans) of a row with messages, and whether the reasoning of the last one is left out."""
    messages, tools = conversations.read_conversation(row)
    content = json.dumps([messages, tools], ensure_ascii=False)
    for marker in chat.template.headers + chat.template.ends:
        # No text may contain one: a prompt could declare itself supervised, a reply end too early.
        if json.dumps(marker.strip(), ensure_ascii=False)[1:-1] in content:
            raise conversations.Rejected("marker inside content", repr(marker))
    last, messages = messages[-1], arrange(messages, chat)
    others = [message | {"content": "x"} if message["role"] == "tool" else message for message in messages]
    try:
        text, spans = render_reply(messages, tools, chat)
        other, other_spans = render_reply(others, tools, chat) if others != messages else (text, spans)
    except Exception as error:  # whatever the template's own code raises on this row concerns this row only
        raise conversations.Rejected("template error", f"{type(error).__name__}: {error}") from None
    # An unknown template may close a call by a marker of its own, so that the span would run on.
    if [text[start:end] for start, end in spans] != [other[start:end] for start, end in other_spans]:
        raise conversations.Rejected("turns not marked", "a tool's output would be supervised")
    replies = [message for message in messages if message["role"] == "assistant"]
    if len(spans) != len(replies):
        raise conversations.Rejected(
            "turns not marked", f"{len(spans)} marked replies for {len(replies)} assistant turns"
        )
    for message, (start, end) in zip(replies, spans, strict=True):
        names = [call.get("function", call).get("name") for call in message.get("tool_calls", ())]
        if any(str(name) not in text[start:end] for name in names):
            raise conversations.Rejected("calls left out", f"the chat template shows no call of {names}")
    if messages[-1].get("cut"):  # an answer that was cut has no end to learn
        content = messages[-1]["content"].strip()
        start = text.rfind(content, *spans[-1])
        if start < 0:
            raise conversations.Rejected("turns not marked", "an answer that was cut is not shown as it is")
        spans[-1] = (spans[-1][0], start + len(content))
    return text, spans, not shows(text[slice(*spans[-1])], last)


def encode(text, spans, encoder):
    """(ids int32 [T], mask uint8 [T]) from one encoding: supervised is a token whose characters all lie in one span.

    Blanks behind the span do not count: the marker at its end may be a token that swallows them.
    """
    encoding = encoder.encode(text, add_special_tokens=False)
    starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=np.uint8)
    for start, end in spans:
        inside = (ends <= end) | (starts < end) & (ends <= BLANKS.match(text, end).end())
        # A token of no characters stands behind what was trimmed off it, so at the span's start it is still prompt.
        mask |= (starts >= start) & inside & ((ends > starts) | (ends > start))
    return np.array(encoding.ids, dtype=np.int32), mask


def tokenise(raw, chat):
    """(ids, mask, number of tokens cut off, whether the last reply's reasoning is left out) of one row, given as the
    bytes of its line. Raises Rejected.
    """
    silent = False
    try:
        row = json.loads(raw.decode() or "{}")
        json.dumps(row, ensure_ascii=False).encode() if b"\\u" in raw else None  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise conversations.Rejected("not JSON", error) from None
    if not isinstance(row, dict):
        raise conversations.Rejected("not an object", type(row).__name__)
    if "rejected_for" in row:  # it could not be regenerated
        raise conversations.Rejected(*row["rejected_for"])
    if row.get("input_ids") is not None:
        ids, mask, size = row["input_ids"], row.get("loss_mask"), chat.encoder.get_vocab_size()
        lists = isinstance(ids, list) and isinstance(mask, list) and len(ids) == len(mask)
        if not lists or not all(type(value) is int for value in ids + mask) or not set(mask) <= {0, 1}:
            raise conversations.Rejected(
                "bad tokens", "input_ids (integers) and loss_mask (0 or 1) must be lists of one length"
            )
        if ids and not 0 <= min(ids) <= max(ids) < size:
            raise conversations.Rejected("bad tokens", f"token ids {min(ids)} to {max(ids)}, the tokenizer has {size}")
        ids, mask = np.array(ids, dtype=np.int32), np.array(mask, dtype=np.uint8)
        if chat.only_last and mask.any():  # the last run of ones is the last turn
            mask[: np.flatnonzero(np.diff(mask, prepend=0) == 1)[-1]] = 0
    else:
        text, spans, is_chat = row.get("text"), [], "conversations" in row or "messages" in row
        if not chat.tokenizer.chat_template and (is_chat or chat.template is None):
            raise conversations.Rejected(
                "no chat template in the tokenizer", "needed to render messages, or for the markers of auto"
            )
        if is_chat:
            text, spans, silent = chat_spans(row, chat)
        elif isinstance(text, str):
            spans = find_spans(text, chat.template, chat.opening)
        elif row:
            raise conversations.Rejected("unknown form", f"fields {', '.join(row)}")
        ids, mask = encode(text or "", spans[-1:] if chat.only_last else spans, chat.encoder)
    if not len(ids):
        raise conversations.Rejected("empty", "no text")
    ids, mask, cut = ids[: chat.max_length], mask[: chat.max_length], max(0, len(ids) - chat.max_length)
    if not mask.any():
        raise conversations.Rejected("no supervised token", f"within {chat.max_length} tokens" if cut else "")
    return ids, mask, cut, silent


def tokenise_row(row, chat):
    """For datasets' map: columns of a row; without tokens, but with cause and detail, if it is rejected."""
    ids, mask, cut, silent, cause, detail = np.zeros(0, np.int32), np.zeros(0, np.uint8), 0, False, "", ""
    try:
        ids, mask, cut, silent = tokenise(row["raw"], chat)
    except conversations.Rejected as rejected:
        cause, detail = rejected.args[0], str(rejected.args[1])[:200]
    values = {"input_ids": ids, "loss_mask": mask, "length": len(ids), "cut": cut, "silent": silent}
    return values | {"cause": cause, "detail": detail}


# ---------------------------------------------------------------------------- does the template fit the tokenizer?
PROBE = [{"role": "user", "content": "Qone"}, {"role": "assistant", "content": "Aone"},
         {"role": "user", "content": "Qtwo"}, {"role": "assistant", "content": "Atwo"}]  # fmt: skip

CALL = {"id": "call_0", "type": "function", "function": {"name": "probe_call", "arguments": {"key": "value"}}}

CALL_PROBE = [PROBE[0], {"role": "assistant", "content": None, "reasoning": None, "tool_calls": [CALL]},
              {"role": "tool", "content": "out", "tool_call_id": "call_0"}, PROBE[1] | {"reasoning": None}]  # fmt: skip


def fits(text, template):
    """Does the rendered probe show both of its replies, each closed by an end marker?"""
    end = "|".join(map(re.escape, template.ends))
    text += template.ends[0] if template.shared_ends else ""
    parts = [text[start:stop] for start, stop in find_spans(text, template)]
    found = [re.search(rf"(Aone|Atwo)\s*(?:{end})\Z", part) and re.findall("Aone|Atwo", part) for part in parts]
    return found == [["Aone"], ["Atwo"]]


def find_call_form(chat):
    """The call_form with which the template shows a call whole: some drop calls beside a content, or cannot do without
    one, some want the arguments as text, and quote them twice if they are. The first one if it shows none.
    """
    forms = [(None, False), ("", False), (None, True), ("", True)]
    for form in forms:
        shaped = chat._replace(call_form=form)
        with contextlib.suppress(Exception):  # the template is foreign code
            text, spans = render_reply(arrange(CALL_PROBE, shaped), None, shaped)
            call = text[spans[0][0] : spans[0][1]]
            if len(spans) == 2 and "probe_call" in call and "value" in call and "\\" not in call:
                return form
    return forms[0]


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
    chat = Chat(tokenizer, encoder, TEMPLATES.get(name), "", (None, False), "text", max_length, only_last)
    if not tokenizer.chat_template:  # only rows rendered or tokenised beforehand can be used
        return chat
    try:
        text, prompt = render(tokenizer, PROBE), render(tokenizer, PROBE[:1], add_generation_prompt=True)
        templates = TEMPLATES | {"auto": derive_template(tokenizer, text, prompt)}
        texts = {
            known: render(tokenizer, PROBE, **template.options) for known, template in templates.items() if template
        }
    except Exception as error:  # the template is foreign code
        common.fail(
            f"the tokenizer's chat template does not render a plain conversation: {type(error).__name__}: {error}"
        )
    fitting = [known for known, text in texts.items() if fits(text, templates[known])]
    if name == "auto" and fitting:  # a known family comes first: it also brings markers that the probe does not show
        name = fitting[0]
    template = templates[name]
    if name not in fitting:
        wanted = f"{' or '.join(map(repr, template.headers))} ... {template.ends[0]!r}" if template else "markers"
        others = dict.fromkeys([*fitting, "auto"])
        remedy = f"use --chat_template {' or '.join(others)}" if fitting else "give rows with input_ids and loss_mask"
        common.fail(f"chat_template {name}: no {wanted} in what the tokenizer renders: {text[:200]!r}; {remedy}")
    prompt = render(tokenizer, PROBE[:1], add_generation_prompt=True, **template.options)
    behind = [prompt.rpartition(header)[2] for header in template.headers if header in prompt]
    opening = min(behind, key=len, default="")
    at_once = template.options.get("enable_thinking") is False or "</think>" in opening
    thoughts = "dropped" if at_once else "field" if READS_THOUGHTS.search(str(tokenizer.chat_template)) else "text"
    chat = chat._replace(template=template, opening=opening, thoughts=thoughts)
    return chat._replace(call_form=find_call_form(chat))


# ---------------------------------------------------------------------------- building the prepared folder
def build_split(source, files, chat, options, num_samples, num_proc, cache, again=None):
    """(Dataset of the rows kept, list of the rejected rows) of one source; cut: number of tokens cut off a row.

    again: for answer_rows, where the target's own answers are, what the server calls it, and the flags.
    """
    from datasets import Dataset, Features, List, Value

    def table(read, *given):
        yield from ({"line": line, "raw": raw} for line, raw in read(*given))

    rows = functools.partial(table, conversations.read_rows, source, files, cache / "hub")
    data = Dataset.from_generator(rows, cache_dir=str(cache / "raw"), fingerprint="raw")
    if num_samples and num_samples < len(data):
        data = data.select(np.sort(np.random.RandomState(options["seed"]).permutation(len(data))[:num_samples]))
    if again:
        lines, path = data["line"][:], again[0]
        regeneration.answer_rows(lines, lambda index: data[index]["raw"], *again)
        rows = functools.partial(table, regeneration.answered_rows, lines, path)
        data = Dataset.from_generator(rows, cache_dir=str(cache / "answers"), fingerprint="answers")
    columns = {"line": Value("int64"), "input_ids": List(Value("int32")), "loss_mask": List(Value("uint8"))}
    columns |= {"length": Value("int32"), "cut": Value("int64"), "silent": Value("bool"), "cause": Value("string")}
    columns |= {"detail": Value("string")}
    workers = min(num_proc, len(data) // MIN_ROWS_PER_PROCESS)
    data = data.map(
        functools.partial(tokenise_row, chat=chat),
        remove_columns=["raw"],
        features=Features(columns),
        num_proc=workers if workers > 1 else None,
        cache_file_name=str(cache / "tokens.arrow"),
        load_from_cache_file=False,
        desc=source,
        new_fingerprint="tokens",  # else datasets would hash the tokenizer
    )
    total, lengths = len(data), np.array(data["length"][:])
    rejected = data.select(np.flatnonzero(lengths == 0)).select_columns(["line", "cause", "detail"]).to_list()
    data = data.select(np.flatnonzero(lengths)).select_columns(["input_ids", "loss_mask", "length", "cut", "silent"])
    limit = options["max_rejected_ratio"]
    if limit is None:
        limit = conversations.PRESETS[source].rejected if source in conversations.PRESETS else 0.01
    if not len(data) or len(rejected) > limit * total:
        first = {row["cause"]: row["line"] for row in reversed(rejected)}
        counts = Counter(row["cause"] for row in rejected).most_common()
        causes = ", ".join(f"{count} {cause} (first: line {first[cause]})" for cause, count in counts)
        share = f"{len(rejected)} of {total} rows rejected ({len(rejected) / total:.1%}, max_rejected_ratio {limit:g})"
        common.fail(f"{source}: {share if len(data) else f'none of {total} rows can be used'}: {causes}")
    return data, [{"file": source, **row} for row in rejected]


def build(sources, chat, options, num_proc, config, folder, caches, again=None):
    """Write the prepared folder; config gets the counts and is written last, so that it vouches for all the rest.

    again: folder of the target's own answers, what the server calls it, and the flags; None keeps the replies.
    """
    from datasets import DatasetDict, disable_progress_bars

    if not sys.stderr.isatty():  # in a log file a bar is noise
        disable_progress_bars()
    splits, rejected, vocabulary = {}, {}, 1 + max(chat.encoder.get_vocab().values())
    for split, (source, files) in sources.items():
        cache, samples = caches / split, options["num_samples"] if split == "train" else None
        cache.mkdir(parents=True)
        answers = again and (again[0] / f"{split}.jsonl", *again[1:])
        splits[split], rejected[split] = build_split(source, files, chat, options, samples, num_proc, cache, answers)
    if options["validation_ratio"]:
        data, rows = splits["train"], len(splits["train"])
        if (size := max(1, round(rows * options["validation_ratio"]))) >= rows:
            common.fail(f"validation_ratio {options['validation_ratio']} leaves none of {rows} rows to train on")
        order = np.random.RandomState(options["seed"]).permutation(rows)
        splits = {"train": data.select(np.sort(order[size:])), "validation": data.select(np.sort(order[:size]))}
    DatasetDict(splits).remove_columns(["cut", "silent"]).save_to_disk(str(folder))
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
            "reasoning_left_out": int(np.count_nonzero(data["silent"][:])),
            "rejected": Counter(row["cause"] for row in rejected.get(split, ())),
        }  # fmt: skip
        if part["reasoning_left_out"]:
            print(
                f"{split}: {part['reasoning_left_out']:,} rows without the reasoning of their last reply: the target "
                "is asked to answer at once, or its chat template does not show it"
            )
        print(
            f"{split}: {part['rows']:,} rows, {part['supervised_tokens']:,} of {part['tokens']:,} tokens supervised, "
            f"longest row {part['longest']:,}, {part['truncated']:,} truncated; "
            f"rejected: {dict(part['rejected']) or 'none'}"
        )
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for rows in rejected.values() for row in rows]
    common.write_atomic(folder / "rejected.jsonl", "".join(lines))
    common.write_atomic(folder / "data_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def prepare(dataset, output_path, target_model_path, *, validation_dataset=None, dataset_path=None,
            chat_template="llama3", max_length=2048, num_samples=None, train_only_last_turn=False, validation_ratio=0.0,
            num_proc=None, max_rejected_ratio=None, seed=0, trust_remote_code=False, regenerate=None):  # fmt: skip
    """Write the prepared folder, or keep it if its fingerprint is the one wanted. Returns its data_config as a dict.

    dataset: name of a preset or path of a JSON Lines file. regenerate: the flags of REGENERATE_FLAGS, or None, which
    keeps the replies. One process calls this, the others wait and use open_data.
    """
    names = {"train": str(dataset)} | ({"validation": str(validation_dataset)} if validation_dataset else {})
    output, known = Path(output_path).expanduser().absolute(), [*TEMPLATES, "auto"]
    foreign = not (stored := output / "data_config.json").is_file() and (output.is_file() or any(output.glob("*")))
    for wrong, message in (
        (chat_template not in known, f"chat_template {chat_template}: known are {', '.join(known)}"),
        (not 0 <= validation_ratio < 1, f"validation_ratio {validation_ratio} must be in [0, 1)"),
        (not 0 <= (max_rejected_ratio or 0) <= 1, f"max_rejected_ratio {max_rejected_ratio} must be in [0, 1]"),
        (validation_ratio and validation_dataset, "validation_ratio and validation_dataset: give one of them"),
        (dataset_path and not any(conversations.PRESETS[x].hub for x in names.values() if x in conversations.PRESETS),
         f"dataset_path is a copy of a preset's hub repository, but dataset is {dataset}"),
        (foreign, f"output_path {output} holds something that is not a prepared data set: choose another folder"),
    ):  # fmt: skip
        if wrong:
            common.fail(message)
    sources = {split: (name, conversations.find_files(name, dataset_path, split)) for split, name in names.items()}
    tokenizer = target_files.load_tokenizer(target_model_path, trust_remote_code)
    chat = make_chat(tokenizer, chat_template, max_length, bool(train_only_last_turn))
    options = {"max_length": max_length, "num_samples": num_samples, "train_only_last_turn": bool(train_only_last_turn)}
    options |= {"validation_ratio": validation_ratio, "max_rejected_ratio": max_rejected_ratio, "seed": seed % 2**32}
    inputs = [
        list(map(common.hash_file, files)) or common.hash_of(conversations.pydoc_lines())
        for _, files in sources.values()
    ]
    ingredients = options | {
        "format_version": dataloader.FORMAT_VERSION,
        "presets": [name for name in names.values() if name in conversations.PRESETS],
        "inputs": inputs, "tokenizer": target_files.hash_tokenizer(tokenizer),
        "chat_template": [chat_template, *(chat.template or ())],
    }  # fmt: skip
    if regenerate:
        regenerate.template_options = chat.template.options if chat.template else {}  # the server has to render so too
        ingredients["regenerate"] = regeneration.settings_of(regenerate, target_model_path)
    fingerprint = common.hash_of(ingredients)
    if stored.is_file() and json.loads(stored.read_text()).get("fingerprint") == fingerprint:
        print(f"{output}: reused, made of the same input, tokenizer and options (fingerprint {fingerprint[:12]})")
        return dataloader.open_data(output)[1]
    again = regenerate and regeneration.open_answers(
        regenerate, target_model_path, output, dict(zip(names, inputs, strict=True))
    )
    config = {
        "format_version": dataloader.FORMAT_VERSION,
        "fingerprint": fingerprint,
        "ingredients": ingredients,
        "splits": {},
    }
    config |= {"dataset": names, "target_model_path": str(target_model_path)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    scratch = output.with_name(f".{output.name}.building")  # renamed, so that a killed build never looks complete
    caches = (
        Path(huggingface_hub.constants.HF_HOME) / "eagle3" / common.hash_of(str(output))[:16]
    )  # `output` may be mounted

    def clear():
        for path in (scratch, caches):
            shutil.rmtree(path, ignore_errors=True)

    clear()
    try:
        build(sources, chat, options, min(num_proc or cores, cores), config, scratch / "new", caches, again)
        if output.exists():
            output.rename(scratch / "old")
        (scratch / "new").rename(output)
    finally:
        clear()
    data, config = dataloader.open_data(output)
    ids, mask = (np.array(data["train"][0][name]) for name in ("input_ids", "loss_mask"))
    borders = [0, *np.flatnonzero(np.diff(mask)) + 1, len(ids)]
    parts = [("⟦{}⟧" if mask[a] else "{}").format(tokenizer.decode(ids[a:b])) for a, b in itertools.pairwise(borders)]
    print(f"the first row, supervised between ⟦ and ⟧:\n{''.join(parts)[:1500]}\nwritten to {output}")
    return config


# ---------------------------------------------------------------------------- command line
FLAGS = {
    "input": [
        ("dataset", str, ..., f"preset ({', '.join(conversations.PRESETS)}) or path of a JSON Lines file"),
        ("dataset_path", str, None, "local copy of the preset's hub repository, instead of a download"),
        ("validation_dataset", str, None, "JSON Lines file, or a preset that has such a split"),
        ("target_model_path", str, ..., "folder or hub id; only the tokenizer is loaded"),
        ("trust_remote_code", common.boolean, False, "let the tokenizer run code of its own"),
    ],
    "what becomes of it": [
        ("output_path", str, ..., "folder to write"),
        ("chat_template", str, "llama3", f"{', '.join(TEMPLATES)} or auto, which finds it out"),
        ("max_length", int, 2048, "tokens; longer rows are truncated at the right", 2),
        ("num_samples", int, None, "rows of the training input, taken at random; none: all", 1),
        ("train_only_last_turn", common.boolean, False, "supervise only the last assistant turn of each row"),
        ("validation_ratio", float, 0.0, "share of the rows kept back for validation"),
        ("max_rejected_ratio", float, None, "share of unusable rows; none: 0.01; sharegpt, eaglechat 0.1"),
        ("seed", int, 0, "of num_samples and validation_ratio"),
        ("num_proc", int, None, "processes, at most one a core; none: one a core", 1),
    ],
    "replies of the target itself": regeneration.REGENERATE_FLAGS,
}


def parse_args(argv=None):
    return common.parse_flags(__doc__, FLAGS, argv)


def main(args):
    options = {**vars(args)}
    regenerate = argparse.Namespace(**{name: options.pop(name) for name, *_ in regeneration.REGENERATE_FLAGS})
    if not args.regenerate_endpoint:
        given = [name for name, _, default, *_ in regeneration.REGENERATE_FLAGS if getattr(args, name) != default]
        if given:
            common.fail(f"{', '.join(given)}: without effect as long as no --regenerate_endpoint is given")
        regenerate = None
    return prepare(**options, regenerate=regenerate)


if __name__ == "__main__":
    main(parse_args())
