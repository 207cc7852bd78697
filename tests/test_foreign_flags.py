"""Flags and command lines of other trainers' documentation: they run, or end with one line that says what to write."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig

import prepare_data
import prepare_hidden_states
import train_eagle3
from core import draft_config, foreign_flags
from helpers.commands import flags_of

HERE = Path(__file__).parent
FLAGS = [
    [cell.strip() for cell in line.split("|")]
    for line in (HERE / "foreign_flags.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
TARGET = ("--verifier-name-or-path", "--target-model-path", "--model-name-or-path", "--basepath")
DEFAULTS = [
    [cell.strip() for cell in line.split("|")]
    for line in (HERE / "cases" / "foreign_defaults.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
PAGE = (HERE.parent / "docs" / "other_trainers.md").read_text()


def parsed(capsys, script, argv):
    """(flags by name, "") or (None, the one line of the error)."""
    try:
        return vars(script.parse_args(argv)), ""
    except SystemExit as stopped:
        lines = capsys.readouterr().err.splitlines()
        assert stopped.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return None, lines[0]


@pytest.mark.parametrize(("flag", "happens"), [row[1:] for row in FLAGS])
def test_every_documented_flag_does_what_the_table_says(capsys, flag, happens):
    needed = [] if flag.startswith(TARGET) else ["--target_model_path", "M"]
    plain, _ = parsed(capsys, train_eagle3, needed or ["--target_model_path", "M"])
    written = [flag.split()] if flag.count(" ") != 1 else [flag.split(), [flag.replace(" ", "=")]]  # both ways
    for words in written:
        values, error = parsed(capsys, train_eagle3, [*needed, *words])
        if happens.startswith("refused: "):
            assert happens.removeprefix("refused: ") in error, error
        else:
            assert values is not None, error
            changed = {name: str(value) for name, value in values.items() if value != plain[name] and name != "log_dir"}
            name, _, value = happens.partition(" = ")
            assert happens == "nothing" or str(values[name]) == value
            assert changed.keys() <= {name}, "and nothing else changes"


def test_what_is_refused_is_one_line_about_all_of_it(capsys):
    argv = shlex.split(
        "--target-model-path M --min-pixels 1 --cache-dir c --speculator-type eagle3 --max-pixels=2 --batch-size 3"
    )
    _, error = parsed(capsys, train_eagle3, argv)
    text = "--min_pixels, --max_pixels: drafts are trained on text alone, drop it"
    assert error == f"error: {text}; --cache_dir: data are kept in output_dir/data, downloads in HF_HOME: drop it"


@pytest.mark.parametrize(
    ("script", "table"),
    [(train_eagle3, foreign_flags.OF_TRAINERS), (prepare_hidden_states, foreign_flags.OF_HIDDEN_STATES)],
    ids=["train_eagle3", "prepare_hidden_states"],
)
def test_no_flag_of_ours_is_taken_for_another_trainers(script, table):
    ours = [flag.removeprefix("--") for flag in flags_of(script)]
    for names, _, text in table:
        assert not [name for name in ours if re.fullmatch(names, name.removeprefix("no_"))], names
        if "prepare_data.py, which takes these" in text:
            assert {f"--{name}" for name in names.split("|")} <= set(flags_of(prepare_data))
        for flag in re.findall(r"--(\w+)", text):
            assert flag in ours, text
    assert not set(foreign_flags.ALIASES) & set(ours)


@pytest.mark.parametrize("data", ["./chats.jsonl", "chats.json"])
def test_hidden_states_of_conversations_need_them_prepared(capsys, data):
    flags = ["--target-model-path", "M", "--data-path", data, "--output-path", "H"]
    _, error = parsed(capsys, prepare_hidden_states, flags)
    assert error == f"error: data_path {data} is a file: give the folder that prepare_data.py makes of it"
    values, _ = parsed(capsys, prepare_hidden_states, [*flags[:3], "folder", *flags[4:], "--enable-aux-hidden-states"])
    assert values["data_path"] == "folder"


def test_every_row_of_both_tables_is_documented():
    """What nobody's documentation has is in no table of the trainer."""
    written = [re.match(r"--([\w-]+)", flag)[1].replace("-", "_") for _, flag, _ in FLAGS]
    for names, *_ in foreign_flags.OF_TRAINERS:
        assert any(re.fullmatch(names, name.removeprefix("no_")) for name in written), names
    assert set(foreign_flags.ALIASES) <= set(written)


def test_flags_that_mean_something_else_are_named_in_the_docs():
    """Those with a comment of their own in the table, and the flags to write instead."""
    table = (HERE / "foreign_flags.txt").read_text()
    differ = re.findall(r"^# differs: .*\n(?:#.*\n)*((?:[^#\n].*\n)+)", table, re.MULTILINE)
    names = set(re.findall(r"SpecForge +\| --([\w-]+)", "".join(differ)))
    assert names == {"batch-size", "draft-accumulation-steps", "total-steps", "eval-interval", "save-interval"}
    instead = {"draft_global_batch_size", "scheduler_total_steps", "total_steps", "eval_steps", "save_steps"}
    mentioned = {name.replace("-", "_") for name in re.findall(r"`--([\w-]+)", PAGE)}
    assert {name.replace("-", "_") for name in names} | instead <= mentioned


def same(one, other):
    """Whether two defaults, one at least as text, are the same."""
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        none = {"None": "none", "[]": "none"}
        return none.get(str(one), str(one)).lower() == str(other).lower()


def test_defaults_that_differ_are_in_one_table_of_the_docs():
    """Each documented default of others is ours, or in the table with theirs and ours; and nothing else is there."""
    ours = vars(train_eagle3.parse_args(["--target_model_path", "M"]))
    ours["chat_template"] = prepare_data.Options.chat_template  # what none means
    derived = draft_config.derive_config(LlamaConfig(), LlamaConfig())
    ours |= {flag: derived.get(key, False) for flag, key in draft_config.KEYS.items()}
    table = {}
    for line in re.findall(r"^\| `--.*\|$", PAGE, re.MULTILINE):
        flag, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        table[flag.strip("`-")] = dict(zip(("speculators", "SpecForge", "here"), cells, strict=False))
    different = set()
    for trainer, flag, default in DEFAULTS:
        written = flag.removeprefix("--").replace("-", "_")
        name = foreign_flags.ALIASES.get(written, written)
        default = foreign_flags.VALUES.get(name, {}).get(default, default)
        rows = [row for row in foreign_flags.OF_TRAINERS if re.fullmatch(row.names, name)]
        equal = same(ours[name], default) if name in ours else bool(re.fullmatch(rows[0].harmless, default))
        assert equal or table[name][trainer] == default, f"{name} of {trainer} is {default} in {table.get(name)}"
        different |= set() if equal else {name}
    assert len(different) > 20 and table.keys() - different == {"draft_global_batch_size", "total_steps"}
    for name, row in table.items():
        if name in ours:
            assert same(ours[name], row["here"]), f"{name} is {ours[name]} here, not {row['here']}"
        else:
            argv = ["--target_model_path", "M", f"--{name}", row["here"]]
            assert train_eagle3.parse_args(argv), "what changes nothing"
