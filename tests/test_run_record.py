"""run.json says where a run's code comes from: with what is kept beside it an edited tree can be repeated."""

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from helpers import tiny, training
from helpers.resuming import arguments

NEW = "DEVIATION = 0.03\n"  # core/extra.py, which no commit has
EDIT = (
    "nn.init.normal_(module.weight, std=0.02)",
    "from core import extra\n\n                nn.init.normal_(module.weight, std=extra.DEVIATION)",
)


def git(folder, *words):
    identity = "-c", "user.name=test", "-c", "user.email=test@localhost"
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def copy_tree(folder):
    """The tracked files of this repository in a repository of their own."""
    for name in git(tiny.REPOSITORY, "ls-files", "*.py", "ds_configs").split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny.REPOSITORY / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")


def dry_run(tree, work, output):
    """The initial draft and run.json of a start of the trainer in a tree."""
    command = [sys.executable, "train_eagle3.py", *map(str, arguments(work, output, "--dry_run"))]
    done = subprocess.run(command, cwd=tree, env=tiny.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weights = load_file(output / "step_00000000" / "model.safetensors")
    return weights, json.loads((output / "run.json").read_text())


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.slow
def test_run_of_an_edited_tree_can_be_repeated_from_what_it_keeps(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    training.write_workspace(work)
    tree = tmp_path / "tree"
    copy_tree(tree)
    _, settings = dry_run(tree, work, tmp_path / "clean")
    assert settings["git_commit"] == git(tree, "rev-parse", "HEAD").strip()
    assert settings["source_files"] == [] and not list((tmp_path / "clean").glob("source*"))

    trainer = tree / "train_eagle3.py"
    assert EDIT[0] in trainer.read_text()
    trainer.write_text(trainer.read_text().replace(*EDIT))
    (tree / "core" / "extra.py").write_text(NEW)
    (tree / "scratch").mkdir()
    (tree / "scratch" / "note.py").write_text("a file of one's own is not the program's\n")
    edited, settings = dry_run(tree, work, tmp_path / "edited")
    assert settings["source_files"] == ["source.diff", "train_eagle3.py"]
    assert (tmp_path / "edited" / "train_eagle3.py").read_text() == trainer.read_text()

    again = tmp_path / "again"
    git(tmp_path, "clone", "-q", str(tree), str(again))
    git(again, "checkout", "-q", settings["git_commit"])
    assert EDIT[1] not in (again / "train_eagle3.py").read_text()
    git(again, "apply", str(tmp_path / "edited" / "source.diff"))
    assert (again / "core" / "extra.py").read_text() == NEW and not (again / "scratch").exists()
    repeated, settings = dry_run(again, work, tmp_path / "repeated")
    assert edited.keys() == repeated.keys() and all(edited[name].equal(repeated[name]) for name in edited)
    assert (tmp_path / "repeated" / "source.diff").read_text() == (tmp_path / "edited" / "source.diff").read_text()

    shutil.rmtree(again / ".git")
    _, settings = dry_run(again, work, tmp_path / "bare")
    assert settings["git_commit"] is None and settings["source_files"] == ["train_eagle3.py"]
    assert (tmp_path / "bare" / "train_eagle3.py").read_text() == trainer.read_text()
