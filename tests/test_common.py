"""Command lines that end with one line, whatever the command is."""

from pathlib import Path

import pytest

from helpers import training
from helpers.commands import SCRIPTS

COMMANDS = {script.__name__: script for script in SCRIPTS}
LINES = (Path(__file__).parent / "cases" / "refused_flags.txt").read_text().splitlines()
ROWS = [[cell.strip() for cell in line.split("|")] for line in LINES if line and not line.startswith("#")]


@pytest.mark.parametrize(("command", "says"), ROWS)
def test_flags_that_cannot_be_are_refused_by_every_command(capsys, command, says):
    name, *words = command.split()
    assert says in training.refused(capsys, COMMANDS[name].parse_args, words)


def test_a_template_beside_rendered_rows_is_refused(work, capsys):
    """Before anything is loaded: neither the target nor the draft is there."""
    script = COMMANDS["evaluate_draft"]
    flags = ["--target_model_path", "absent", "--draft_model_path", "absent", "--prompts", str(work / "data")]
    args = script.parse_args([*flags, "--chat_template", "qwen"])
    assert "chat_template qwen: the rows of" in training.refused(capsys, script.main, args)
