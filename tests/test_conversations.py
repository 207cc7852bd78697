"""Presets, each on a local copy in the hub's own layout and schema, from a file in data_sets/.

data_sets/PRESET.json: files {path in the repository: its rows}, expected: the conversations of the train split as
[[role, content], ...] each. Rows of a zip are a file each.
"""

import json
import zipfile
from pathlib import Path

import datasets
import pytest

import prepare_data
from core import conversation_files, conversations, dataloader
from helpers import tiny

FOLDER = Path(__file__).parent / "data_sets"
ON_THE_HUB = [name for name, preset in conversations.PRESETS.items() if preset.hub]


def write_copy(folder, name):
    """The preset's repository; returns its description."""
    about = json.loads((FOLDER / f"{name}.json").read_text())
    for path, rows in about["files"].items():
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(path))
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                for number, row in enumerate(rows):
                    archive.writestr(f"{path.stem}/{number:03}_000.json", json.dumps(row, indent=4))
        else:
            path.write_text(
                "".join(map("{}\n".format, map(json.dumps, rows))) if "l" in path.suffix else json.dumps(rows)
            )
    return about


def conversations_of(name, folder, split):
    source = conversation_files.open_source(name, split, {"dataset_path": folder})
    lines = [json.loads(line) for _, line in source.rows()]
    return [[[turn["role"], turn["content"]] for turn in conversations.read_conversation(row)[0]] for row in lines]


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_rows_of_the_original_schema(name, tmp_path):
    about = write_copy(tmp_path / "copy", name)
    assert conversations_of(name, tmp_path / "copy", "train") == about["expected"]
    if "validation" in conversations.PRESETS[name].files:
        (held_back,) = conversations_of(name, tmp_path / "copy", "validation")
        assert held_back not in about["expected"] and held_back[-1][0] == "assistant"


def test_every_preset_has_a_file_and_every_file_a_preset():
    assert {path.stem for path in FOLDER.iterdir()} == set(ON_THE_HUB) and len(ON_THE_HUB) >= 12


def test_from_the_hub_each_repository_is_asked_for_its_files(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, repo_type, allow_patterns, revision, **_):
        asked.append((repo, repo_type, tuple(allow_patterns), revision))
        write_copy(tmp_path / repo, "camel" if "camel" in repo else "math_qa")
        return tmp_path / repo

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    files = conversation_files.open_source("camel", "train", {}).files
    assert [path.name for path in files] == ["biology.zip", "chemistry.zip", "physics.zip"] * 3
    assert asked == [
        (f"camel-ai/{field}", "dataset", ("*.zip",), None) for field in ("biology", "chemistry", "physics")
    ]
    assert conversation_files.open_source("math_qa", "train", {}).files[0].name == "0000.parquet"
    assert asked[3][0] == "allenai/math_qa" and asked[3][3] == "refs/convert/parquet"


def test_a_copy_that_lacks_one_of_several_repositories_is_named(tmp_path, capsys):
    write_copy(tmp_path, "camel")
    (tmp_path / "chemistry.zip").unlink()
    with pytest.raises(SystemExit):
        conversation_files.open_source("camel", "train", {"dataset_path": tmp_path})
    assert "preset camel: 2 *.zip in" in (line := capsys.readouterr().err) and "camel-ai/chemistry" in line


def test_a_copy_with_other_columns_is_rejected_row_by_row(tmp_path, capsys):
    (tmp_path / "copy" / "main").mkdir(parents=True)
    rows = [{"prompt": "2+2?", "completion": "4"}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "copy" / "main" / "train-00000-of-00001.parquet"))
    tiny.tokenizer().save_pretrained(tmp_path / "target")
    with pytest.raises(SystemExit):
        prepare_data.prepare("gsm8k", tmp_path / "out", tmp_path / "target", dataset_path=tmp_path / "copy")
    assert (
        "none of 1 rows can be used: 1 unknown form (first: line 1: fields prompt, completion: name two of them"
        in capsys.readouterr().err
    )


def test_a_preset_with_its_own_validation_split(tmp_path):
    write_copy(tmp_path / "copy", "sciq")
    tiny.tokenizer().save_pretrained(tmp_path / "target")
    options = {"dataset_path": tmp_path / "copy", "validation_dataset": "sciq", "num_proc": 1}
    prepare_data.prepare("sciq", tmp_path / "out", tmp_path / "target", **options)
    data, config = dataloader.open_data(tmp_path / "out")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 2, "validation": 1}
    assert config["ingredients"]["presets"] == ["sciq", "sciq"]


def test_the_docs_name_every_preset_its_repository_and_whether_it_has_a_validation_split():
    page = (tiny.REPOSITORY / "docs" / "data.md").read_text()
    for name, preset in conversations.PRESETS.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        assert all(repository.rpartition("/")[2] in line for repository in preset.hub)
        assert line.startswith(f"| `{name}` +") == ("validation" in preset.files)
