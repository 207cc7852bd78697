"""Publishing a draft: the files arrive on the hub as they are, and what keeps them from it is one line."""

import json
import subprocess
import sys

import huggingface_hub
import pytest

import export_draft
from core import draft_files
from helpers import hub, tiny, written_drafts

FILES = ("README.md", "config.json", "model.safetensors")


@pytest.fixture
def server(monkeypatch):
    """A stand-in for the hub that this process talks to, with a token that may write to my-org."""
    with hub.stand_in(mine=["my-org"]) as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "mine")
        yield server


def export(*argv):
    export_draft.main(export_draft.parse_args([str(word) for word in argv]))


def content(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_an_export_is_uploaded_by_the_command_line(tmp_path):
    """With the variables of the library, and files of somebody else in the folder, which stay here."""
    draft = written_drafts.write(tmp_path / "draft")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "notes.txt").write_text("mine")
    command = [sys.executable, tiny.REPOSITORY / "export_draft.py", draft, "--format", "flat", "--output", "served"]
    command += ["--target_model_path", "org/target", "--push_to_hub", "my-org/a-draft", "--private"]
    with hub.stand_in(mine=["my-org"]) as server:
        variables = {"HF_ENDPOINT": server.url, "HF_TOKEN": "mine", "HF_HUB_OFFLINE": 0, "HF_HUB_DISABLE_XET": 1}
        done = subprocess.run(
            command, env=tiny.environment(**variables), cwd=tmp_path, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"uploaded to {server.url}/my-org/a-draft"
    repository = server.repositories["my-org/a-draft"]
    assert repository["files"] == content(tmp_path / "served")
    assert repository["private"] and repository["messages"] == ["Upload a draft"]
    assert list(server.objects.values()) == [content(tmp_path / "served")["model.safetensors"]]
    card = repository["files"]["README.md"].decode()
    assert '"model": "my-org/a-draft"' in card and "vllm serve org/target " in card


def test_an_exported_folder_is_uploaded_as_it_is_with_its_edited_card(server, tmp_path):
    export(written_drafts.write(tmp_path / "draft"), "--format", "flat", "--output", tmp_path / "served")
    card = tmp_path / "served" / "README.md"
    card.write_text(card.read_text() + "\nWritten by hand.\n")
    for _ in range(2):  # the second time it is there
        export(tmp_path / "served", "--push_to_hub", "my-org/a-draft")
    assert server.repositories["my-org/a-draft"]["files"] == content(tmp_path / "served")
    assert not server.repositories["my-org/a-draft"]["private"]


def test_a_public_repository_does_not_get_what_is_meant_to_be_private(server, tmp_path, capsys):
    export(written_drafts.write(tmp_path / "draft"), "--format", "flat", "--output", tmp_path / "served")
    server.repositories["my-org/public"] = {"private": False, "files": {}, "messages": []}
    error = tiny.fails(capsys, export, tmp_path / "served", "--push_to_hub", "my-org/public", "--private")
    assert "exists and is public" in error and not server.repositories["my-org/public"]["files"]


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        ("my-org/a-draft", "", "no token: run `hf auth login`"),
        ("my-org/a-draft", "expired", "the hub does not accept the token"),
        ("others/a-draft", "mine", "may not write there: take one with write access to others"),
        ("a-draft", "mine", "not of the form ORG/NAME"),
        ("my-org/a--draft", "mine", "is no name of a repository"),
    ],
)
def test_an_upload_that_is_refused_is_one_line(server, tmp_path, monkeypatch, capsys, name, token, expected):
    """The export is kept where the fault is the hub's; a fault that is seen at once comes before it."""
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    draft = written_drafts.write(tmp_path / "draft")
    argv = (draft, "--format", "flat", "--output", tmp_path / "served", "--push_to_hub", name)
    assert expected in tiny.fails(capsys, export, *argv)
    assert not server.repositories
    assert (tmp_path / "served").exists() == bool(server.requests)


def test_a_hub_that_cannot_be_reached_is_one_line(server, tmp_path, monkeypatch, capsys):
    draft = written_drafts.write(tmp_path / "draft")
    argv = (draft, "--format", "flat", "--output", tmp_path / "served", "--push_to_hub", "my-org/a-draft")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{tiny.free_port()}")
    error = tiny.fails(capsys, export, *argv)
    assert "the hub fails with ConnectError" in error and f"the draft is complete in {tmp_path / 'served'}" in error
    assert draft_files.check_draft(tmp_path / "served") == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in tiny.fails(capsys, export, *argv)


def test_what_goes_together(server, tmp_path, capsys):
    draft = written_drafts.write(tmp_path / "draft")
    to_hub = ("--push_to_hub", "my-org/a-draft")
    flat = ("--format", "flat", "--output", tmp_path / "served")
    for argv, expected in (
        ((draft, *to_hub), "has no README.md, the model card"),
        ((tmp_path, *to_hub), "is not a complete draft"),
        ((draft, *flat, "--private"), "--private is about"),
        (("--check", draft, *to_hub), "--check reads one folder"),
        ((draft, "--license", "mit", *to_hub), "are for the model card"),
        ((draft, *flat, "--evaluation", tmp_path), "no evaluation.json is there"),
    ):
        assert expected in tiny.fails(capsys, export, *argv), argv
    assert not server.requests and not (tmp_path / "served").exists()
    (tmp_path / "figures.json").write_text(json.dumps({"loss": 1.0}))
    error = tiny.fails(capsys, export, draft, *flat, "--evaluation", tmp_path / "figures.json")
    assert "has no acceptance_length" in error
