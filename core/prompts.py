"""Prompts that a draft is measured on: conversations, benchmarks with categories and several turns, prepared rows.

In:  conversations (without the reply at their end) in any form of core/conversation_files.py, {"prompt": text},
     {"turns": [question, ...], "category": text} as MT-Bench has it, HumanEval's rows, a benchmark by its name, or a
     folder written by prepare_data.py (its validation rows, up to the last reply).
Out: Prompts: the token ids of the first turn, and of each next turn behind the target's reply to the one before.
"""

import collections
import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from core import common, conversation_files, conversations, dataloader, rendering, target_files

FINAL_CHANNEL = "<|channel|>final<|message|>"  # of gpt-oss

# ==================== Prompts ========================================================================================


@dataclass(frozen=True)
class Renderer:
    """Messages as tokens by the chat template of a tokenizer; options are variables of the template."""

    tokenizer: Any
    options: dict = field(default_factory=dict)

    def ids(self, messages, tools=None):
        """Token ids of the messages and the header of the reply to them. Raises Rejected without a template."""
        if not self.tokenizer.chat_template:
            raise conversations.Rejected("no chat template in the tokenizer", "name one with --chat_template")
        text = rendering.render(self.tokenizer, messages, tools, add_generation_prompt=True, **self.options)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(self, reply):
        """The text of a reply (token ids) as the next turn has it: of one in channels (gpt-oss) the final one."""
        _, channel, final = self.tokenizer.decode(reply).rpartition(FINAL_CHANNEL)
        if channel:
            return final.partition("<|")[0]
        text = self.tokenizer.decode(reply, skip_special_tokens=True)
        return text.rstrip("\ufffd")  # of a character that is cut


@dataclass(frozen=True)
class Prompt:
    """ids: tokens that the target replies to. questions: of the turns after this one, whose messages are `messages`."""

    ids: list
    category: str | None = None
    turn: int = 1
    messages: list = field(default_factory=list)
    questions: list = field(default_factory=list)
    renderer: Renderer | None = None

    def following(self, reply):
        """The Prompt of the next turn, behind the reply (token ids) to this one; None after the last turn."""
        if not self.questions:
            return None
        text = self.renderer.answer(reply)
        answer = {"role": "assistant", "content": text}
        messages = [*self.messages, answer, {"role": "user", "content": self.questions[0]}]
        ids = self.renderer.ids(messages)
        return replace(self, ids=ids, turn=self.turn + 1, messages=messages, questions=self.questions[1:])


# ==================== Benchmarks =====================================================================================


def questions(column, category=None):
    """A function from a row of a benchmark to {"turns", "category"}: its columns of questions and of the category."""

    def convert(row):
        asked = row[column]
        turns = asked if isinstance(asked, list) else [join_input(asked, row)]
        return {"turns": turns, "category": row.get(category)}

    return convert


def join_input(question, row):
    """An instruction with the input that Alpaca's rows have beside it."""
    return f"{question}\n\n{row['input']}" if row.get("input") else question


def mt_bench(row):
    """Questions of the hub's data set are in `prompt`, those of the original file in `turns`."""
    return questions("turns" if "turns" in row else "prompt", "category")(row)


TEST = {"validation": ("data/test-*.parquet", "*/test-*.parquet", "test.jsonl")}

# gsm8k is a preset of core/conversations.py, which has its test questions as well.
BENCHMARKS = {
    "mt_bench": conversations.Preset(
        hub=("HuggingFaceH4/mt_bench_prompts",),
        files={"validation": ("data/train-*.parquet", "raw/question.jsonl", "question.jsonl")},
        convert=mt_bench,
    ),
    "humaneval": conversations.Preset(
        hub=("openai/openai_humaneval",),
        files={"validation": ("openai_humaneval/test-*.parquet", "HumanEval.jsonl.gz")},
        convert=questions("prompt"),
    ),
    "math500": conversations.Preset(
        hub=("HuggingFaceH4/MATH-500",), files=TEST, convert=questions("problem", "subject")
    ),
    "alpaca": conversations.Preset(
        hub=("tatsu-lab/alpaca",),
        files={"validation": ("data/train-*.parquet", "alpaca_data.json")},
        convert=questions("instruction"),
    ),
}


def open_source(name, flags):
    """The rows of a benchmark by its name, or of a data set: conversation_files.Source."""
    benchmark = BENCHMARKS.get(name)
    if flags.get("dataset_path") and not benchmark and name not in conversations.PRESETS:
        common.fail(f"dataset_path {flags['dataset_path']}: {name} is no benchmark with a name: drop it")
    if not benchmark:
        return conversation_files.open_source(name, "prompt", flags)
    refused = ("prompt_column", "dataset_config", "prompt_split")
    what = "a benchmark, which knows its columns and splits"
    conversation_files.refuse_flags(name, what, refused, dict.fromkeys(refused) | flags)
    files = conversation_files.find_preset(name, benchmark, flags.get("dataset_path"), "prompt")
    return conversation_files.Source(name, files, benchmark.to_row)


# ==================== Reading ========================================================================================


def read_prompts(path, tokenizer, limit=None, options=None, **flags):
    """At most `limit` Prompts of a data set, a benchmark or a prepared folder; a bad row ends the program.

    With categories, the limit takes the first prompt of each, then the second of each, and so on.
    flags: of core/conversation_files.py. options: variables of the tokenizer's template. Of several replies of a
    conversation the last one is left out: templates of reasoning targets render earlier ones as history, without the
    thought that the target would begin.
    """
    if Path(path, "data_config.json").is_file():
        prompts = read_prepared_prompts(path, tokenizer, limit)
    else:
        source = open_source(str(path), flags)
        renderer = Renderer(tokenizer, options or {})
        found = (read_prompt(line, renderer, source.place(number)) for number, line in source.rows())
        prompts = take(filter(None, found), limit)
    if not prompts or not all(prompt.ids for prompt in prompts):
        common.fail(f"{path} has no prompts, or an empty one")
    return prompts


def take(found, limit):
    """The first `limit` of the Prompts (an iterator); of those with categories, as many of each as possible."""
    prompts = list(itertools.islice(found, limit))
    if not limit or not any(prompt.category for prompt in prompts):
        return prompts
    numbers = collections.defaultdict(itertools.count)  # of the prompts of each category
    return sorted([*prompts, *found], key=lambda prompt: next(numbers[prompt.category]))[:limit]


def read_prepared_prompts(folder, tokenizer, limit):
    """Prompts of the rows of a folder of prepare_data.py, up to the last reply."""
    data, config = dataloader.open_data(folder)
    if config["ingredients"]["tokenizer"] != target_files.hash_tokenizer(tokenizer):
        common.fail(
            f"{folder} was prepared with another tokenizer or chat template than the target's: prepare it again"
        )
    rows = data["validation" if "validation" in data else "train"]
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    prompts = []
    for row in rows:
        starts = np.flatnonzero(np.diff(row["loss_mask"], prepend=0) == 1)
        prompts.append(Prompt(row["input_ids"][: starts[-1]]))
    return prompts


def read_prompt(line, renderer, place):
    """The Prompt of one row; None if it has no question, as parts of split chats. A bad row ends the program."""
    where = f"line {place['line']} of {place['file']}"
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise conversations.Rejected("not an object", type(row).__name__)
        return read_row(row, renderer)
    except conversations.Rejected as error:
        if error.args[0] == conversations.UNANSWERED:
            print(f"{where} is left out: {conversations.UNANSWERED}")
            return None
        common.fail(f"{where} is not a prompt: {': '.join(map(str, error.args))}")
    except Exception as error:  # not JSON, or whatever the template's own code raises
        common.fail(f"{where} is not a prompt: {type(error).__name__}: {error}")


def read_row(row, renderer):
    """The Prompt of a row of JSON. Raises Rejected.

    That of a conversation ends with the last question, or with the output of a tool after it. HumanEval's rows, which
    have an `entry_point`, are questions; another {"prompt": text} is continued as it is, without the chat template.
    """
    turns = conversations.find_turns(row)
    category = row["category"] if isinstance(row.get("category"), str) else None
    if not turns:
        asked = questions_of(row)
        if asked:
            messages = [{"role": "user", "content": asked[0]}]
            ids = renderer.ids(messages)
            return Prompt(ids, category, messages=messages, questions=asked[1:], renderer=renderer)
        if isinstance(row.get("prompt"), str):
            return Prompt(renderer.tokenizer(row["prompt"])["input_ids"], category)
    if not conversations.has_turns(row):
        detail = f"fields {', '.join(row)[:100]}: name the one of the questions by --prompt_column"
        raise conversations.Rejected("unknown form", detail)
    opened = {name: conversations.with_reply(given) for name, given in turns.items()}
    messages, tools = conversations.read_conversation(row | opened)
    return Prompt(renderer.ids(messages[:-1], tools), category)


def questions_of(row):
    """The questions of a row that has nothing but questions, a turn each; [] for another row. Raises Rejected."""
    asked = row.get("turns")
    given = row.get("prompt")
    if asked is None and isinstance(given, list) and all(isinstance(text, str) for text in given):
        asked = given
    if asked is None and "entry_point" in row and isinstance(given, str):
        asked = [given]
    if asked is None:
        return []
    if not isinstance(asked, list) or not asked or not all(isinstance(text, str) and text.strip() for text in asked):
        raise conversations.Rejected("malformed questions", "a list of texts is expected")
    return asked


def check_tokens(path, prompts, vocab_size):
    """End the program if a prompt has a token that the target's embedding table does not have."""
    largest = max(max(prompt.ids) for prompt in prompts)
    if largest >= vocab_size:
        common.fail(
            f"{path} has token {largest}, the target's embedding table {vocab_size} rows: its tokenizer has tokens "
            "that the model does not have; leave such prompts out"
        )
