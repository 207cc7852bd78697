"""Turn conversations into tokens and a loss mask: the data set that every later stage reads.

In:  a preset (sharegpt, gsm8k, pydoc, ...) or a data set in any form of docs/data.md, with rows {"conversations" or
     "messages": [{"role", "content"} or {"from", "value"}, ...], "tools"}, {"text"} or {"input_ids", "loss_mask"}; a
     tokenizer.
Out: --output_path: train/ and validation/ in Arrow (input_ids int32; loss_mask uint8, 1 = the assistant's, its
     end-of-turn token included; length int32), data_config.json (fingerprint, its ingredients, counts), token_freq.pt
     ({token id: count} of train's supervised tokens), rejected.jsonl. The same ingredients are not built twice.

    python prepare_data.py --dataset pydoc --target_model_path TARGET   # to data/pydoc
    python prepare_data.py --dataset chats.jsonl --target_model_path meta-llama/Llama-3.1-8B-Instruct \
        --output_path data/chats --max_length 4096 --validation_ratio 0.01
    python prepare_data.py --dataset chats.jsonl --target_model_path meta-llama/Llama-3.1-8B-Instruct \
        --output_path data/own --regenerate local   # the target's own replies; deepspeed prepare_data.py: on all GPUs
    python prepare_data.py ... --regenerate_endpoint http://localhost:8000/v1   # from a server
"""

import contextlib
import dataclasses
import itertools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from core import (
    claims,
    common,
    conversation_files,
    conversations,
    dataloader,
    ranks,
    regeneration,
    rejected_rows,
    rendering,
    slots,
    target_files,
)

MIN_ROWS_PER_PROCESS = 500  # for fewer, starting a process takes longer than its share of the rows

BLANKS = re.compile(r"\s*")

CHATML = rendering.Template(("<|im_start|>assistant\n",), ("<|im_end|>",))

# After a tool's output the reply follows without the assistant's own marker.
DEEPSEEK = rendering.Template(
    ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁end｜>"), ("<｜end▁of▁sentence｜>",)
)

TEMPLATES = {
    "llama3": rendering.Template(("<|start_header_id|>assistant<|end_header_id|>\n\n",), ("<|eot_id|>", "<|eom_id|>")),
    "llama4": rendering.Template(("<|header_start|>assistant<|header_end|>\n\n",), ("<|eot|>", "<|eom|>")),
    "qwen": CHATML,
    "qwen3-thinking": CHATML._replace(options={"enable_thinking": True}),
    "qwen3-instruct": CHATML._replace(options={"enable_thinking": False}),
    "gpt-oss": rendering.Template(("<|start|>assistant",), ("<|return|>", "<|end|>", "<|call|>"), joins_channels=True),
    "deepseek-r1-distill": DEEPSEEK,
    "deepseek-v3": DEEPSEEK,
    "phi3": rendering.Template(("<|assistant|>\n",), ("<|end|>",)),
    "phi4": rendering.Template(("<|im_start|>assistant<|im_sep|>",), ("<|im_end|>",)),
    "gemma": rendering.Template(("<start_of_turn>model\n",), ("<end_of_turn>",)),
    "glm": rendering.Template(("<|assistant|>",), ("<|user|>", "<|observation|>"), shared_ends=True),
    "kimi-k2": rendering.Template(("<|im_assistant|>assistant<|im_middle|>",), ("<|im_end|>",)),
}


# ==================== One row: from JSON to tokens and mask ==========================================================


class Tokens(NamedTuple):
    """ids int32 [T], mask uint8 [T]; cut: tokens beyond max_length; reasoning_lost: that of the last reply."""

    ids: np.ndarray
    mask: np.ndarray
    cut: int
    reasoning_lost: bool


def encode(text, spans, encoder):
    """(ids int32 [T], mask uint8 [T]) from one encoding: a token is supervised if its characters lie in one span.

    Blanks after the span do not count: the marker at its end may be a token that swallows them.
    """
    encoding = encoder.encode(text, add_special_tokens=False)
    starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=np.uint8)
    for start, end in spans:
        end_of_blanks = BLANKS.match(text, end).end()
        inside = (ends <= end) | (starts < end) & (ends <= end_of_blanks)
        # A token without characters follows what was trimmed off it; at the start of the span it is still prompt.
        mask |= (starts >= start) & inside & ((ends > starts) | (ends > start))
    return np.array(encoding.ids, dtype=np.int32), mask


def parse_row(raw):
    """The object in the bytes of a line. Raises Rejected."""
    row = conversations.parse_line(raw)
    if not isinstance(row, dict):
        raise conversations.Rejected("not an object", type(row).__name__)
    if "rejected_for" in row:  # it could not be regenerated
        raise conversations.Rejected(*row["rejected_for"])
    return row


def read_tokens(row, chat):
    """(ids, mask) of a row that holds both."""
    ids = row["input_ids"]
    mask = row.get("loss_mask")
    if isinstance(mask, list):
        mask = [int(value) if value in (True, False) else value for value in mask]
    are_lists = isinstance(ids, list) and isinstance(mask, list) and len(ids) == len(mask)
    if not are_lists or not all(type(value) is int for value in ids + mask) or not set(mask) <= {0, 1}:
        detail = "input_ids (integers) and loss_mask (0 or 1) must be lists of one length"
        raise conversations.Rejected("bad tokens", detail)
    size = chat.encoder.get_vocab_size()
    if ids and not 0 <= min(ids) <= max(ids) < size:
        raise conversations.Rejected("bad tokens", f"token ids {min(ids)} to {max(ids)}, the tokenizer has {size}")
    ids = np.array(ids, dtype=np.int32)
    mask = np.array(mask, dtype=np.uint8)
    if chat.only_last and mask.any():
        starts_of_turns = np.flatnonzero(np.diff(mask, prepend=0) == 1)
        mask[: starts_of_turns[-1]] = 0
    return ids, mask


def read_text(row, chat):
    """(text, spans, whether the reasoning of the last reply is lost) of a row of messages or of rendered text."""
    text = row.get("text")
    is_chat = conversations.has_turns(row)
    if not chat.tokenizer.chat_template and (is_chat or chat.template is None):
        raise conversations.Rejected("no chat template in the tokenizer", chat.missing)
    if is_chat:
        return rendering.render_row(row, chat)
    if isinstance(text, str):
        spans = rendering.find_spans(text, chat.template, chat.opening)
        return text, spans[-1:] if chat.only_last else spans, False
    if row:
        remedy = "name two of them by --prompt_column and --response_column, if they are questions and answers"
        raise conversations.Rejected("unknown form", f"fields {', '.join(row)[:100]}: {remedy}")
    return "", [], False


def tokenise(raw, chat):
    """The Tokens of one row, given as the bytes of its line. Raises Rejected."""
    row = parse_row(raw)
    conversations.check_trained(row)
    reasoning_lost = False
    if row.get("input_ids") is not None:
        ids, mask = read_tokens(row, chat)
    else:
        text, spans, reasoning_lost = read_text(row, chat)
        ids, mask = encode(text, spans, chat.encoder)
    if not len(ids):
        raise conversations.Rejected("empty", "no text")
    if not mask.any():
        raise conversations.Rejected("no supervised token", "")
    if mask.argmax() >= chat.max_length:
        detail = f"its first supervised token follows {mask.argmax()} tokens, --max_length is {chat.max_length}"
        raise conversations.Rejected(rejected_rows.BEYOND, detail)
    cut = max(0, len(ids) - chat.max_length)
    return Tokens(ids[: chat.max_length], mask[: chat.max_length], cut, reasoning_lost)


def tokenise_row(row, chat):
    """For datasets' map: the columns of a row; a rejected one has no tokens, but cause and detail."""
    cause = detail = ""
    try:
        tokens = tokenise(row["raw"], chat)
    except conversations.Rejected as rejected:
        tokens = Tokens(np.zeros(0, np.int32), np.zeros(0, np.uint8), 0, False)
        cause = rejected.args[0]
        detail = str(rejected.args[1])[:200]
    return {
        "input_ids": tokens.ids,
        "loss_mask": tokens.mask,
        "length": len(tokens.ids),
        "cut": tokens.cut,
        "reasoning_lost": tokens.reasoning_lost,
        "cause": cause,
        "detail": detail,
    }


# ==================== Does the template fit the tokenizer? ===========================================================

PROBE = [
    {"role": "user", "content": "Qone"},
    {"role": "assistant", "content": "Aone"},
    {"role": "user", "content": "Qtwo"},
    {"role": "assistant", "content": "Atwo"},
]

CALL = {"id": "call_0", "type": "function", "function": {"name": "probe_call", "arguments": {"key": "value"}}}

CALL_PROBE = [
    PROBE[0],
    {"role": "assistant", "content": None, "reasoning": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "out", "tool_call_id": "call_0"},
    PROBE[1] | {"reasoning": None},
]

CALL_FORMS = [
    rendering.CallForm(None),
    rendering.CallForm(""),
    rendering.CallForm(None, arguments_as_text=True),
    rendering.CallForm("", arguments_as_text=True),
]

READS_REASONING = re.compile(r"""reasoning_content|(?:\.|\[['"])(?:reasoning|thinking)\b""")


def fits(text, template):
    """Does the rendered probe show both of its replies, each closed by an end marker?"""
    end = "|".join(map(re.escape, template.ends))
    if template.shared_ends:
        text += template.ends[0]
    found = []
    for start, stop in rendering.find_spans(text, template):
        part = text[start:stop]
        is_closed = re.search(rf"(Aone|Atwo)\s*(?:{end})\Z", part)
        found.append(re.findall("Aone|Atwo", part) if is_closed else None)
    return found == [["Aone"], ["Atwo"]]


def find_call_form(chat):
    """The CallForm with which the template shows a complete call; None if none does.

    Some templates drop calls beside a content, or need one; some want the arguments as text, and quote them twice
    otherwise.
    """
    for form in CALL_FORMS:
        shaped = dataclasses.replace(chat, call_form=form)
        with contextlib.suppress(Exception):  # the template is foreign code
            messages = rendering.arrange(CALL_PROBE, shaped)
            text, spans = rendering.render_reply(messages, None, shaped)
            start, end = spans[0]
            call = text[start:end]
            if len(spans) == 2 and "probe_call" in call and "value" in call and "\\" not in call:
                return form
    return None


def derive_template(tokenizer, text, prompt):
    """The markers in the rendered probe and generation prompt, for a family that TEMPLATES does not name; or None.

    Header: what the generation prompt has after the question, as far as it precedes both replies, without what closes
    the question if that can be told apart. Ends: the first special token after each reply.
    """
    found = re.search("Qone(.*?)Aone(.*?)Qtwo(.*?)Atwo(.*)", text, re.DOTALL)
    if not found:
        return None
    before_one, after_one, before_two, after_two = found.groups()
    header = os.path.commonprefix([prompt.rpartition("Qone")[2], before_one, before_two])
    question = rendering.render(tokenizer, PROBE[:1])
    if len(prompt) > len(question):
        header = header.removeprefix(question.rpartition("Qone")[2])
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted(specials, key=len, reverse=True)
    special = re.compile(r"\s*(" + "|".join(map(re.escape, longest_first)) + ")")
    matches = [special.match(after_two), special.match(after_one)]
    ends = dict.fromkeys(match[1] for match in matches if match and match[1])
    return rendering.Template((header,), tuple(ends)) if header.strip() and ends else None


def choose_template(tokenizer, name):
    """The Template of that name, or one that fits for auto; ends the program if its markers do not occur."""
    try:
        text = rendering.render(tokenizer, PROBE)
        prompt = rendering.render(tokenizer, PROBE[:1], add_generation_prompt=True)
        templates = TEMPLATES | {"auto": derive_template(tokenizer, text, prompt)}
        fitting = []
        for known, template in templates.items():
            if template and fits(rendering.render(tokenizer, PROBE, **template.options), template):
                fitting.append(known)
    except Exception as error:  # the template is foreign code
        problem = f"{type(error).__name__}: {error}"
        common.fail(f"the tokenizer's chat template does not render a plain conversation: {problem}")
    if name == "auto" and fitting:  # a known family comes first: it also has markers that the probe does not show
        name = fitting[0]
    template = templates[name]
    if name in fitting:
        return template
    wanted = "markers"
    if template:
        wanted = f"{' or '.join(map(repr, template.headers))} ... {template.ends[0]!r}"
    remedy = "give rows with input_ids and loss_mask"
    if fitting:
        remedy = f"use --chat_template {' or '.join(dict.fromkeys([*fitting, 'auto']))}"
    common.fail(f"chat_template {name}: no {wanted} in what the tokenizer renders: {text[:200]!r}; {remedy}")


def make_chat(tokenizer, name, max_length, only_last):
    """The Chat of a tokenizer and a chat_template. Ends the program if the template's markers do not occur."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.post_processor = None
    encoder.no_truncation()
    encoder.no_padding()
    tokenizer, missing = rendering.with_own_template(tokenizer, name, TEMPLATES.get(name))
    if missing:  # only rows rendered or tokenised beforehand can be used
        return rendering.Chat(tokenizer, encoder, TEMPLATES.get(name), max_length, only_last, missing=missing)
    template = choose_template(tokenizer, name)
    prompt = rendering.render(tokenizer, PROBE[:1], add_generation_prompt=True, **template.options)
    openings = [prompt.rpartition(header)[2] for header in template.headers if header in prompt]
    opening = min(openings, key=len, default="")
    thoughts = "text"
    if template.options.get("enable_thinking") is False or "</think>" in opening:
        thoughts = "dropped"
    elif READS_REASONING.search(str(tokenizer.chat_template)):
        thoughts = "field"
    chat = rendering.Chat(tokenizer, encoder, template, max_length, only_last, opening, thoughts)
    call_form = find_call_form(chat)
    return dataclasses.replace(chat, call_form=call_form or CALL_FORMS[0], shows_calls=call_form is not None)


def check_template(sources, chat):
    """End the program if the tokenizer has no chat template and the first row of a source needs one."""
    for source in sources.values() if chat.missing else ():
        _, raw = next(source.rows())
        with contextlib.suppress(conversations.Rejected):
            row = parse_row(raw)
            if row.get("input_ids") is None and (conversations.has_turns(row) or chat.template is None):
                common.fail(f"{source.name}: its rows need a chat template; the tokenizer has none, {chat.missing}")


# ==================== The prepared folder ============================================================================


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags beside input, target and output. regenerate: None keeps the replies of the data."""

    validation_dataset: str | None = None
    dataset_path: str | None = None
    dataset_config: str | None = None
    train_split: str | None = None
    validation_split: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    chat_template: str = "auto"
    max_length: int = 2048
    num_samples: int | None = None
    train_only_last_turn: bool = False
    validation_ratio: float = 0.0
    num_proc: int | None = None
    max_rejected_ratio: float | None = None
    seed: int = 0
    trust_remote_code: bool = False
    regenerate: regeneration.Settings | None = None

    def permutation(self, count):
        """The numbers below count in an order that the seed fixes."""
        return np.random.RandomState(self.seed % 2**32).permutation(count)


def as_table(folder, name, read, *given):
    """Dataset of the (line, bytes) that read(*given) yields; it lies in `folder`."""
    from datasets import Dataset, Features, Value

    def rows():
        for line, raw in read(*given):
            yield {"line": line, "raw": raw}

    columns = Features({"line": Value("int64"), "raw": Value("large_binary")})
    return Dataset.from_generator(rows, features=columns, cache_dir=str(folder / name), fingerprint=name)


def read_source(source, options, num_samples, cache, answers_path, answers):
    """Dataset of the source's rows as bytes, with the target's own replies if there are `answers`."""
    data = as_table(cache, "raw", source.rows)
    if num_samples and num_samples < len(data):
        data = data.select(np.sort(options.permutation(len(data))[:num_samples]))
    if not answers:
        return data
    lines = data["line"][:]

    def read(index):
        return data[index]["raw"]

    regeneration.answer_rows(lines, read, answers_path, answers)
    return as_table(cache, "answers", regeneration.answered_rows, lines, answers_path)


def tokenise_table(data, chat, source, num_proc, cache):
    """Dataset of line, tokens and cause for a Dataset of rows as bytes."""
    from datasets import Features, List, Value

    columns = {
        "line": Value("int64"),
        "input_ids": List(Value("int32")),
        "loss_mask": List(Value("uint8")),
        "length": Value("int32"),
        "cut": Value("int64"),
        "reasoning_lost": Value("bool"),
        "cause": Value("string"),
        "detail": Value("string"),
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(num_proc or cores, cores, len(data) // MIN_ROWS_PER_PROCESS)
    return data.map(
        tokenise_row,
        fn_kwargs={"chat": chat},
        remove_columns=["raw"],
        features=Features(columns),
        num_proc=workers if workers > 1 else None,
        cache_file_name=str(cache / "tokens.arrow"),
        load_from_cache_file=False,
        desc=source.name,
        new_fingerprint="tokens",  # otherwise datasets hashes the tokenizer
    )


def choose_limit(source, options):
    """The share of rows that may be rejected."""
    preset = conversations.PRESETS.get(source.name)
    if options.max_rejected_ratio is None:
        return preset.rejected if preset else 0.01
    return options.max_rejected_ratio


def split_validation(data, options):
    """The splits of the training rows, a share of them kept back for validation."""
    rows = len(data)
    size = max(1, round(rows * options.validation_ratio))
    if size >= rows:
        common.fail(f"validation_ratio {options.validation_ratio} leaves none of {rows} rows to train on")
    order = options.permutation(rows)
    return {"train": data.select(np.sort(order[size:])), "validation": data.select(np.sort(order[:size]))}


def count_tokens(data, size):
    """Number of supervised tokens by token id, int64 [size]."""
    counts = np.zeros(size, dtype=np.int64)
    for batch in data.with_format("arrow").iter(batch_size=1000):
        ids = batch["input_ids"].combine_chunks().flatten().to_numpy()
        mask = batch["loss_mask"].combine_chunks().flatten().to_numpy()
        counts += np.bincount(ids[mask == 1], minlength=size)
    return counts


def describe_split(split, data, supervised, rejected):
    """The counts of a split for data_config.json; printed as well."""
    lengths = np.array(data["length"][:])
    causes, apart = rejected_rows.count(rejected)
    part = {
        "rows": len(data),
        "tokens": int(lengths.sum()),
        "supervised_tokens": supervised,
        "longest": int(lengths.max()),
        "largest_token": dataloader.largest_token(data),
        "truncated": int(np.count_nonzero(data["cut"][:])),
        "reasoning_left_out": int(np.count_nonzero(data["reasoning_lost"][:])),
        "rejected": causes,
        "left_out": apart,
    }
    if part["reasoning_left_out"]:
        print(
            f"{split}: {part['reasoning_left_out']:,} rows without the reasoning of their last reply: the target "
            "is asked to answer at once, or its chat template does not show it"
        )
    print(
        f"{split}: {part['rows']:,} rows, {part['supervised_tokens']:,} of {part['tokens']:,} tokens supervised, "
        f"longest row {part['longest']:,}, {part['truncated']:,} truncated; "
        f"{rejected_rows.describe(rejected)}"
    )
    return part


def build(sources, chat, options, config, folder, caches, answers, listed):
    """Write the prepared folder. config gets the counts and is written last: it vouches for everything else.

    listed: where rejected rows are listed if there are too many.
    """
    from datasets import DatasetDict, disable_progress_bars

    if not sys.stderr.isatty():  # in a log file a progress bar is noise
        disable_progress_bars()
    splits = {}
    rejected = {}
    for split, source in sources.items():
        cache = caches / split
        cache.mkdir(parents=True)
        samples = options.num_samples if split == "train" else None
        rows = read_source(source, options, samples, cache, answers and answers.file(split), answers)
        table = tokenise_table(rows, chat, source, options.num_proc, cache)
        lengths = np.array(table["length"][:])
        unusable = table.select(np.flatnonzero(lengths == 0)).select_columns(["line", "cause", "detail"])
        rejected[split] = [source.place(row.pop("line")) | row for row in unusable.to_list()]
        splits[split] = table.select(np.flatnonzero(lengths)).remove_columns(["line", "cause", "detail"])
        limit = choose_limit(source, options)
        rejected_rows.check(source, len(splits[split]), rejected[split], limit, listed)
    slots.check_slots(sources["train"].name, splits["train"])
    if options.validation_ratio:
        splits = split_validation(splits["train"], options)
    DatasetDict(splits).remove_columns(["cut", "reasoning_lost"]).save_to_disk(str(folder))
    describe(splits, rejected, chat, config, folder)
    rejected_rows.write(folder / "rejected.jsonl", itertools.chain(*rejected.values()))
    config["files"] = dataloader.measure_files(folder)
    common.write_sealed(folder / "data_config.json", config)


def describe(splits, rejected, chat, config, folder):
    """Write token_freq.pt, and the counts of the splits into config.

    Rows that were rejected before the training rows were split belong to neither part.
    """
    size = 1 + max(chat.encoder.get_vocab().values())
    for split, data in splits.items():
        counts = count_tokens(data, size)
        if split == "train":
            frequency = {int(token): int(counts[token]) for token in np.flatnonzero(counts)}
            torch.save(frequency, folder / "token_freq.pt")
        known = rejected[split] if rejected.keys() == splits.keys() else ()
        config["splits"][split] = describe_split(split, data, int(counts.sum()), known)
    if rejected.keys() != splits.keys():
        config["rejected"], config["left_out"] = rejected_rows.count(rejected["train"])
        print(f"before the rows were split: {rejected_rows.describe(rejected['train'])}")


# ==================== From input to output ===========================================================================


def check_options(options, names, output):
    """End the program with one line if the options do not go together."""
    known = [*TEMPLATES, "auto"]
    if options.chat_template not in known:
        common.fail(f"chat_template {options.chat_template}: known are {', '.join(known)}")
    if not 0 <= options.validation_ratio < 1:
        common.fail(f"validation_ratio {options.validation_ratio} must be in [0, 1)")
    if not 0 <= (options.max_rejected_ratio or 0) <= 1:
        common.fail(f"max_rejected_ratio {options.max_rejected_ratio} must be in [0, 1]")
    if options.validation_ratio and options.validation_dataset:
        common.fail("validation_ratio and validation_dataset: give one of them")
    if options.validation_split and not options.validation_dataset:
        common.fail(f"validation_split {options.validation_split}: give --validation_dataset as well")
    if options.prompt_column and not options.response_column and not options.regenerate:
        common.fail(f"prompt_column {options.prompt_column}: give --response_column as well")
    presets = [conversations.PRESETS[name] for name in names.values() if name in conversations.PRESETS]
    if options.dataset_path and not any(preset.hub for preset in presets):
        common.fail(f"dataset_path is a copy of a preset's hub repository, but dataset is {names['train']}")
    dataloader.check_replaceable(output)


def list_ingredients(sources, tokenizer, chat, options, target_model_path):
    """All that the prepared rows depend on; the fingerprint is its hash."""
    ingredients = {
        "max_length": options.max_length,
        "num_samples": options.num_samples,
        "train_only_last_turn": bool(options.train_only_last_turn),
        "validation_ratio": options.validation_ratio,
        "max_rejected_ratio": options.max_rejected_ratio,
        "seed": options.seed % 2**32,
        "format_version": dataloader.FORMAT_VERSION,
        "presets": [source.name for source in sources.values() if source.name in conversations.PRESETS],
        "columns": [options.prompt_column, options.response_column],
        "inputs": [source.hashes() for source in sources.values()],
        "tokenizer": target_files.hash_tokenizer(tokenizer),
        "chat_template": [options.chat_template, *(chat.template or ())],
    }
    if chat.tokenizer is not tokenizer:
        ingredients["own_template"] = common.hash_of(chat.tokenizer.chat_template)
    if options.regenerate:
        ingredients["regenerate"] = options.regenerate.about(target_model_path)
    return ingredients


def show_first_row(data, tokenizer):
    """Print the first row with what is supervised between ⟦ and ⟧."""
    ids = np.array(data["train"][0]["input_ids"])
    mask = np.array(data["train"][0]["loss_mask"])
    borders = [0, *np.flatnonzero(np.diff(mask)) + 1, len(ids)]
    parts = []
    for start, end in itertools.pairwise(borders):
        text = tokenizer.decode(ids[start:end])
        parts.append(f"⟦{text}⟧" if mask[start] else text)
    text = "".join(parts)
    print(f"the first row, supervised between ⟦ and ⟧:\n{text[:1500]}")


def default_output(dataset):
    """data/NAME for a data set."""
    name = Path(dataset).name
    while conversation_files.SUFFIXES.search(name):
        name = conversation_files.SUFFIXES.sub("", name)
    if not re.fullmatch(r"[\w.-]+", name):
        common.fail(f"dataset {dataset}: give --output_path")
    return str(Path("data", name))


def prepare(dataset, output_path, target_model_path, **options):
    """Write the prepared folder, or keep it if its fingerprint is the one wanted. Returns its data_config as a dict.

    dataset: a preset, file, folder, pattern or hub id. options: the fields of Options. One process calls this,
    the others wait and use open_data.
    """
    options = Options(**options)
    names = {"train": str(dataset)}
    if options.validation_dataset:
        names["validation"] = str(options.validation_dataset)
    output = Path(output_path).expanduser().resolve()  # the folder behind a link is replaced, not the link
    stored = output / "data_config.json"
    if not os.path.exists(stored):
        common.check_writable("output_path", output)
    check_options(options, names, output)
    sources = {}
    for split, name in names.items():
        sources[split] = conversation_files.open_source(name, split, vars(options))
    if "validation" in sources and {*map(str, sources["train"].files)} & {*map(str, sources["validation"].files)}:
        print("validation_dataset has files of the training data: an evaluation will be of what was trained")
    tokenizer = target_files.load_tokenizer(target_model_path, options.trust_remote_code)
    chat = make_chat(tokenizer, options.chat_template, options.max_length, bool(options.train_only_last_turn))
    check_template(sources, chat)
    if options.regenerate and chat.template:  # the server has to render as the data are rendered
        settings = dataclasses.replace(options.regenerate, template_options=chat.template.options)
        options = dataclasses.replace(options, regenerate=settings)
    ingredients = list_ingredients(sources, tokenizer, chat, options, target_model_path)
    fingerprint = common.hash_of(ingredients)
    if dataloader.is_of(output, fingerprint):
        print(f"{output}: reused, made of the same input, tokenizer and options (fingerprint {fingerprint[:12]})")
        return dataloader.open_data(output)[1]
    place = output if os.path.ismount(output) else output.parent  # in which folders are renamed
    if place == output and stored.exists():
        common.fail(f"output_path {output} is a mount point with other data, which cannot be replaced: empty it")
    common.check_writable("the folder of output_path", place)
    common.check_writable("HF_HOME", dataloader.caches_of(output).parent)
    answers = None
    if options.regenerate:
        inputs = dict(zip(names, ingredients["inputs"], strict=True))
        answers = regeneration.open_answers(
            options.regenerate, target_model_path, output, inputs, chat, options.trust_remote_code
        )
    same = [name for name, template in TEMPLATES.items() if template == chat.template]
    config = {
        "format_version": dataloader.FORMAT_VERSION,
        "chat_templates": list(dict.fromkeys([options.chat_template, *same])),  # names that mean the same
        "fingerprint": fingerprint,
        "ingredients": ingredients,
        "splits": {},
        "dataset": names,
        "target_model_path": str(target_model_path),
    }

    listed = output.with_name(f"{output.name}.rejected.jsonl")

    def write(folder, caches):
        build(sources, chat, options, config, folder, caches, answers, listed)

    with claims.only_writer(f"output_path {output.name} in", place, f".{output.name}.preparing"):
        dataloader.replace_folder(output, place, fingerprint, write)
    common.remove(listed)
    data, config = dataloader.open_data(output)
    show_first_row(data, tokenizer)
    print(f"written to {output}")
    return config


# ==================== Command line ===================================================================================


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    count = common.at_least(int, 1)
    add = parser.add_argument_group("input").add_argument
    presets = ", ".join(conversations.PRESETS)
    forms = "file, folder, pattern or hub id of JSON Lines, JSON, Parquet, Arrow, CSV"
    add("--dataset", required=True, help=f"preset ({presets}), or {forms}")
    add("--validation_dataset", help="the same, for validation; a preset that has such a split")
    conversation_files.add_preparation_flags(add)
    add("--target_model_path", required=True, help="folder or hub id; the tokenizer alone is loaded, unless it replies")
    add("--trust_remote_code", action=common.Switch, help="let the tokenizer run code of its own")
    add = parser.add_argument_group("output").add_argument
    templates = ", ".join(TEMPLATES)
    add("--output_path", help="folder to write; none: data/DATASET")
    add("--chat_template", default=Options.chat_template, help=f"{templates} or auto, which finds it out")
    length = common.at_least(int, 2)
    add("--max_length", type=length, default=Options.max_length, help="tokens; longer rows are truncated at the right")
    add("--num_samples", type=count, help="rows of the training input, taken at random; none: all")
    add("--train_only_last_turn", action=common.Switch, help="supervise only the last assistant turn of each row")
    add("--validation_ratio", type=float, default=0.0, help="share of the rows kept back for validation")
    add("--seed", type=common.SEED, default=0, help="of num_samples and validation_ratio")
    add("--num_proc", type=count, help="processes, at most one a core; none: one a core")
    regeneration.add_flags(parser)
    add("--local_rank", type=int, default=-1, help="set by the launcher; -1 = from LOCAL_RANK")
    return parser.parse_args(argv)


def main(args):
    settings = regeneration.read_flags(args)
    if not regeneration.join_ranks(settings, args.local_rank):
        return None
    config = prepare(
        args.dataset,
        args.output_path or default_output(args.dataset),
        args.target_model_path,
        validation_dataset=args.validation_dataset,
        chat_template=args.chat_template,
        max_length=args.max_length,
        num_samples=args.num_samples,
        train_only_last_turn=args.train_only_last_turn,
        validation_ratio=args.validation_ratio,
        num_proc=args.num_proc,
        seed=args.seed,
        trust_remote_code=args.trust_remote_code,
        regenerate=settings,
        **conversation_files.read_flags(args),
    )
    regeneration.dismiss_ranks()
    return config


if __name__ == "__main__":
    ranks.run_watched(main, parse_args())
