"""azureml/: the components and the pipeline against the service's tables, the trainer's parser, and the service's SDK.

How the service reads such files is stated here once more in plain words: `render` for a component's command, `resolve`
for a pipeline's references. The tables are in azureml_tables.txt.
"""

import argparse
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import import_target
import prepare_data
import train_eagle3
from core import draft_files
from helpers import tiny
from helpers.commands import flags_of

FOLDER = tiny.REPOSITORY / "azureml"
TRAINER, IMPORT = "component_draft_model_trainer", "component_model_import"
PIPELINE = "pipeline_draft_model"
# What an input of the pipeline or the component is called in the component or the trainer, where that differs.
OTHER_NAMES = {"training_batch_size": "batch_size", "output_model_path": "output_dir"}
# Types of the service and what stands for such an input in a command.
NUMBERS = {"integer": int, "number": float}
# What is documented as text and bound to a boolean.
TEXT_FOR_BOOLEAN = {"resume"}


def read(name):
    return yaml.safe_load((FOLDER / f"{name}.yml").read_text())


def tables():
    """{component: {"kind", "version", "input", "own", "output"}}, the last three {name: (type, default, ...)}."""
    found = {}
    for line in (tiny.REPOSITORY / "tests" / "azureml_tables.txt").read_text().splitlines():
        words = line.split()
        if line.startswith("["):
            name, version, kind = line.strip("[]").split()
            part = found[name] = {"kind": kind, "version": version, "input": {}, "own": {}, "output": {}}
        elif words and words[0] in ("input", "own"):
            documented, name, kind, default, optional, values = words
            values = None if values == "-" else values.split(",")
            part[documented][name] = (kind, None if default == "-" else default, optional == "optional", values)
        elif words and words[0] == "output":
            part["output"][words[1]] = words[2]
    return found


def as_text(value):
    """A value as the service puts it into a command; YAML's booleans become True and False there."""
    return str(value)


def render(component, values, outputs):
    """The command of a component: defaults where nothing is given, parts in $[[ ]] left out if a value is missing."""
    given = {name: row["default"] for name, row in component["inputs"].items() if "default" in row} | values

    def fill(text):
        text = re.sub(r"\$\{\{inputs\.(\w+)\}\}", lambda m: as_text(given[m[1]]), text)
        return re.sub(r"\$\{\{outputs\.(\w+)\}\}", lambda m: as_text(outputs[m[1]]), text)

    def part(match):
        names = re.findall(r"\$\{\{inputs\.(\w+)\}\}", match[1])
        return fill(match[1]) if all(name in given for name in names) else ""

    return fill(re.sub(r"\$\[\[(.*?)\]\]", part, component["command"]))


def resolve(pipeline, values, folder):
    """Run order and everything bound: yields (name, node, component, its inputs, its outputs) of a pipeline's nodes.

    values: what the job gives. folder: where outputs lie; those of the pipeline itself under "output".
    """
    given = {name: row["default"] for name, row in pipeline["inputs"].items() if "default" in row} | values
    made = {}
    for name, node in pipeline["jobs"].items():

        def bound(text):
            if match := re.fullmatch(r"\$\{\{parent\.inputs\.(\w+)\}\}", text):
                return given.get(match[1])
            job, output = re.fullmatch(r"\$\{\{parent\.jobs\.(\w+)\.outputs\.(\w+)\}\}", text).groups()
            return made[job][output]

        component = yaml.safe_load((FOLDER / node["component"]).read_text())
        made[name] = {output: folder / name / output for output in component["outputs"]}
        for output, text in node.get("outputs", {}).items():
            made[name][output] = folder / re.fullmatch(r"\$\{\{parent\.outputs\.(\w+)\}\}", text)[1]
        inputs = {key: value for key, text in node["inputs"].items() if (value := bound(text)) is not None}
        processes = bound(node["distribution"]["process_count_per_instance"]) if "distribution" in node else 1
        yield name, component, inputs, made[name], processes


# --- the tables ---


@pytest.mark.parametrize("name", [TRAINER, PIPELINE])
def test_inputs_and_outputs_are_those_documented(name):
    table, component = tables()[name], read(name)
    assert (component["name"], component["type"], component["version"]) == (name, table["kind"], table["version"])
    assert list(component["outputs"]) == list(table["output"])
    assert {name: row["type"] for name, row in component["outputs"].items()} == table["output"]
    inputs = table["input"] | table["own"]
    assert component["inputs"].keys() == inputs.keys()
    for key, (kind, default, optional, values) in inputs.items():
        row = component["inputs"][key]
        assert (row["type"], row["optional"]) == (kind, optional), key
        assert row["description"].endswith("."), key
        convert = NUMBERS.get(kind, lambda text: text == "true" if kind == "boolean" else text)  # noqa: B023
        assert row.get("default") == (None if default is None else convert(default)), key
        assert values is None or row["enum"][: len(values)] == values, key  # the trainer may know more
        assert (values is None) == ("enum" not in row), key


def test_tables_are_complete():
    assert [len(part["input"]) for part in tables().values()] == [27, 35]


# --- the trainer's parser ---


def options_of(command):
    """[(--flag, text)] of a command line of `python script.py`, as the shell splits it."""
    words = shlex.split(command)
    assert words[0] == "python" and len(words) % 2 == 0, words
    return list(zip(words[2::2], words[3::2], strict=True))


def test_every_input_is_given_to_the_trainer_once():
    component, known = read(TRAINER), flags_of(train_eagle3)
    outside = re.sub(r"\$\[\[.*?\]\]", "", component["command"])
    for name, row in component["inputs"].items():
        reference = f"${{{{inputs.{name}}}}}"
        assert component["command"].count(reference) == 1, name
        assert (reference in outside) == (not row["optional"]), name
        assert re.search(rf"--{name} '?{re.escape(reference)}'?(?=[\s\]])", component["command"]), name
        assert f"--{name}" in known, name
        paths = row["type"].startswith("uri_")
        assert (f"'{reference}'" in component["command"]) == paths, f"{name}: paths may have spaces"
    assert set(re.findall(r"inputs\.(\w+)", component["command"])) == set(component["inputs"])
    assert re.findall(r"outputs\.(\w+)", component["command"]) == ["output_model_path"]
    assert component["command"].split()[1] == "train_eagle3.py"


def other_value(name, row):
    """A value that is not the default and that the trainer accepts."""
    if "enum" in row:
        return row["enum"][-1]
    if row["type"] == "boolean":
        return True
    if row["type"] in NUMBERS:
        return row.get("default", 0) + (3 if row["type"] == "integer" else 0.25)
    return f"/mnt/some where/{name}"


def test_values_reach_the_trainer():
    component = read(TRAINER)
    values = {name: other_value(name, row) for name, row in component["inputs"].items()}
    options = options_of(render(component, values, {"output_model_path": "/mnt/out put"}))
    assert len(options) == len(dict(options)) == len(values) + 1
    args = vars(train_eagle3.parse_args([word for option in options for word in option]))
    for name, value in values.items():
        assert args[name] == value and type(args[name]) in (type(value), float), name
    assert args["output_dir"] == "/mnt/out put"


def test_defaults_are_the_trainers_or_the_difference_is_stated():
    component, text = read(TRAINER), (FOLDER / f"{TRAINER}.yml").read_text()
    command = render(component, {"target_model_path": "T"}, {"output_model_path": "O"})
    given = vars(train_eagle3.parse_args([word for option in options_of(command) for word in option]))
    own = vars(train_eagle3.parse_args(["--target_model_path", "T", "--output_dir", "O"]))
    differ = {name for name in own if given[name] != own[name]}
    stated = {name for name in component["inputs"] if "The trainer's own default is none" in comment_of(name, text)}
    assert differ == stated == {"chat_template", "dp_size", "draft_accumulation_steps"}
    assert all(own[name] is None for name in differ)


def comment_of(name, text):
    """The comment lines of an input's block."""
    block = re.search(rf"^  {name}:\n((?:    .*\n)+)", text, re.MULTILINE)[1]
    return " ".join(re.findall(r"^ *# (.*)$", block, re.MULTILINE))


def accepts(action, value):
    """Whether the trainer takes this value for the flag."""
    try:
        action.type(str(value))
    except argparse.ArgumentTypeError:
        return False
    return True


@pytest.mark.parametrize("name", [TRAINER, PIPELINE])
def test_values_and_limits_are_the_trainers(name):
    flags = flags_of(train_eagle3)
    limits = 0
    for key, row in read(name)["inputs"].items():
        flag = flags.get(f"--{OTHER_NAMES.get(key, key)}")
        if not flag:
            continue
        choices = [*prepare_data.TEMPLATES, "auto"] if key == "chat_template" else flag.choices
        if key in TEXT_FOR_BOOLEAN and row["type"] == "string":
            assert [flag.type(text) for text in row["enum"]] == [True, False], key
        else:
            assert (sorted(row["enum"]) if "enum" in row else None) == (sorted(choices) if choices else None), key
        if row["type"] in NUMBERS:
            limits += "min" in row
            least = row.get("min", -1000)
            assert accepts(flag, least), key
            assert "min" not in row or not accepts(flag, least - 1), key
    assert limits > 5


def test_the_pipeline_and_its_component_agree():
    component, pipeline = read(TRAINER)["inputs"], read(PIPELINE)["inputs"]
    differences = {}
    for name, row in pipeline.items():
        inner = component.get(OTHER_NAMES.get(name, name))
        keys = ("type", "default", "enum", "min", "optional")
        if inner and [row.get(key) for key in keys] != [inner.get(key) for key in keys]:
            differences[name] = [key for key in keys if row.get(key) != inner.get(key)]
    assert differences == {"total_steps": ["default"], "resume": ["type", "default", "enum"]}


# --- references ---


def test_every_reference_of_the_pipeline_resolves():
    pipeline, text = read(PIPELINE), (FOLDER / f"{PIPELINE}.yml").read_text()
    used = re.findall(r"\$\{\{(.*?)\}\}", text)
    assert {name for name in used if name.startswith("parent.inputs.")} == {
        f"parent.inputs.{name}" for name in pipeline["inputs"]
    }
    assert len(used) == len(set(used)), "something is bound twice"
    assert [name for name in used if name.startswith("parent.outputs.")] == ["parent.outputs.output_model_path"]
    components = {name: yaml.safe_load((FOLDER / node["component"]).read_text())
                  for name, node in pipeline["jobs"].items()}  # fmt: skip
    for reference in used:
        if reference.startswith("parent.jobs."):
            _, _, job, _, output = reference.split(".")
            assert output in components[job]["outputs"]
            assert list(components).index(job) < len(components) - 1
    for name, node in pipeline["jobs"].items():
        component = components[name]
        assert set(node["inputs"]) == set(component["inputs"]), name  # all of them, and no other
        assert set(node.get("outputs", {})) <= set(component["outputs"])
        for key, reference in node["inputs"].items():
            source = reference.strip("${}").split(".")
            kind = (pipeline["inputs"][source[2]] if source[1] == "inputs" else
                    components[source[2]]["outputs"][source[4]])["type"]  # fmt: skip
            assert kind == component["inputs"][key]["type"] or (key in TEXT_FOR_BOOLEAN and kind == "string"), key
            assert source[1] == "jobs" or OTHER_NAMES.get(source[2], source[2]) == key
    training = pipeline["jobs"]["draft_model_training"]
    assert training["distribution"]["type"] == "pytorch"
    assert "number_of_gpu" in training["distribution"]["process_count_per_instance"]
    assert "num_nodes" in training["resources"]["instance_count"]
    for name, node in pipeline["jobs"].items():
        assert node["compute"] == f"${{{{parent.inputs.compute_{name}}}}}"
        assert node["resources"]["instance_type"] == f"${{{{parent.inputs.instance_type_{name}}}}}"


@pytest.mark.parametrize("name", [TRAINER, IMPORT])
def test_code_and_environment_are_there(name):
    component = read(name)
    code = (FOLDER / component["code"]).resolve()
    assert code == tiny.REPOSITORY and (code / shlex.split(component["command"])[1]).is_file()
    context = FOLDER / component["environment"]["build"]["path"]
    assert "COPY requirements.txt" in (context / "Dockerfile").read_text()
    assert (context / "requirements.txt").read_bytes() == (tiny.REPOSITORY / "requirements.txt").read_bytes()


def test_the_job_gives_what_the_pipeline_has():
    job, pipeline = read("job"), read(PIPELINE)
    assert FOLDER / job["component"] == FOLDER / f"{PIPELINE}.yml"
    for name, value in job["inputs"].items():
        row = pipeline["inputs"][name]
        if isinstance(value, dict):
            assert value["type"] == row["type"]
        else:
            assert type(value) is {"integer": int, "number": float}.get(row["type"], str)
            assert value in row.get("enum", [value])
    models = {"huggingface_id", "pytorch_model_path", "mlflow_model_path"}
    assert len(models & job["inputs"].keys()) == 1
    named = re.findall(r"#\s+(\w+): \{type: (\w+), path", (FOLDER / "job.yml").read_text())
    assert {name for name, _ in named} == models - job["inputs"].keys()
    assert all(pipeline["inputs"][name]["type"] == kind for name, kind in named)


def test_import_without_a_source_names_the_inputs_of_the_component(capsys):
    component = read(IMPORT)
    options = options_of(render(component, {}, {"output_dir": "out"}))
    with pytest.raises(SystemExit):
        import_target.parse_args([word for option in options for word in option])
    line = capsys.readouterr().err
    assert line.startswith("error: no model is given") and line.count("\n") == 1
    assert all(name in line for name in component["inputs"])


def test_import_takes_the_first_of_its_sources_that_is_given():
    component, order = read(IMPORT), ["pytorch_model_path", "mlflow_model_path", "huggingface_id"]
    assert set(component["inputs"]) == set(order)
    known = flags_of(import_target)
    for first, name in enumerate(order):
        command = render(component, {name: f"the {name}" for name in order[first:]}, {"output_dir": "out put"})
        options = options_of(command)
        assert {option for option, _ in options} <= set(known)
        args = import_target.parse_args([word for option in options for word in option])
        assert (args.target_model_path, args.output_path) == (f"the {name}", "out put")


# --- it trains ---


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a target and conversations as the service would mount them."""
    folder = tmp_path_factory.mktemp("azure") / "with a space"
    folder.mkdir()
    tiny.write_target(folder / "target", layers=7)
    tiny.write_jsonl(folder / "train.jsonl", tiny.conversations(9))
    tiny.write_jsonl(folder / "validation.jsonl", tiny.conversations(3))
    return folder


def refuse_below(folder, monkeypatch):
    """Let no link be made and no mode be changed in a folder, as on storage that a service mounts."""
    for name in ("symlink", "link", "chmod"):
        real = getattr(os, name)

        def call(*args, real=real, **options):
            if any(str(folder) in os.path.abspath(os.fspath(arg)) for arg in args if isinstance(arg, (str, Path))):
                raise OSError(errno.ENOSYS, "Function not implemented")
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)


@pytest.mark.slow
def test_the_command_of_the_defaults_trains_onto_mounted_storage(inputs, tmp_path, monkeypatch):
    component, out = read(TRAINER), tmp_path / "out put"
    values = {"target_model_path": inputs / "target", "dataset_train_split": inputs / "train.jsonl",
              "dataset_validation_split": inputs / "validation.jsonl"}  # fmt: skip
    command = render(component, values, {"output_model_path": out})
    refuse_below(tmp_path, monkeypatch)
    with pytest.raises(OSError, match="not implemented"):
        (tmp_path / "link").symlink_to("anything")
    monkeypatch.chdir(FOLDER / component["code"])
    args = train_eagle3.parse_args([word for option in options_of(command) for word in option])
    train_eagle3.main(args)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(row["split"], row["step"]) for row in rows] == [("validation", 2), ("train", 4), ("validation", 4)]
    assert draft_files.check_draft(out / "final") == [] and (out / "latest").read_text() == "step_00000004"
    settings = json.loads((out / "run.json").read_text())["flags"]
    assert (settings["dp_size"], settings["draft_accumulation_steps"], settings["max_length"]) == (1, 8, 2048)


def start(command, ranks, log):
    """Run a component's command as the service does: the line in a shell, once per rank, with the ranks' variables."""
    port, environment = str(23000 + os.getpid() % 9000), {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    names = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    with log.open("w") as file:
        processes = [
            subprocess.Popen(["timeout", "250", "bash", "-c", command], cwd=tiny.REPOSITORY, stdout=file, stderr=file,
                             env={**environment, **names, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]  # fmt: skip
        codes = [process.wait() for process in processes]
    assert codes == [0] * ranks, log.read_text()[-3000:]
    return log.read_text()


@pytest.mark.slow
def test_the_job_runs_from_an_mlflow_model_to_a_draft(inputs, tmp_path):
    model, job, pipeline = tmp_path / "registered", read("job"), read(PIPELINE)
    for place, names in (("data/model", "*"), ("data/tokenizer", "*token*"), ("data/tokenizer", "*.jinja")):
        (model / place).mkdir(parents=True, exist_ok=True)
        for path in (inputs / "target").glob(names):
            shutil.copy(path, model / place)
    for path in [*(model / "data/model").glob("*token*"), *(model / "data/model").glob("*.jinja")]:
        path.unlink()
    (model / "MLmodel").write_text("flavors: {}\n")
    given = {name: value for name, value in job["inputs"].items() if not isinstance(value, dict)}
    del given["huggingface_id"]
    given |= {"mlflow_model_path": model, "chat_template": "llama3", "number_of_gpu_to_use_draft_model_training": 2}
    given |= {f"dataset_{split}_split": inputs / f"{split}.jsonl" for split in ("train", "validation")}
    printed = {}
    for _ in range(2):  # the second time it goes on with what is there
        for name, component, values, outputs, ranks in resolve(pipeline, given, tmp_path):
            printed[name] = start(render(component, values, outputs), ranks, tmp_path / f"{name}.log")
        given |= {"resume": "true", "num_epochs": 3}
    out = tmp_path / "output_model_path"
    assert "copied" in printed["model_import"] and "resumed" in printed["draft_model_training"]
    assert "dp_size 1 is replaced by 2" in printed["draft_model_training"]
    settings = json.loads((out / "run.json").read_text())
    assert settings["world_size"] == 2 and settings["starts_behind_step"] == 4
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    validated, trained = [("validation", step) for step in (2, 4, 6)], [("train", step) for step in (4, 6)]
    assert [(row["split"], row["step"]) for row in rows] == [
        validated[0], trained[0], validated[1], trained[1], validated[2]
    ]  # fmt: skip
    assert json.loads((out / "step_00000006" / "trainer_state.json").read_text())["step"] == 6
    assert draft_files.check_draft(out / "final") == []


# --- the service's own SDK ---


@pytest.fixture(scope="module")
def sdk():
    return pytest.importorskip("azure.ai.ml", reason="azure-ai-ml, the service's SDK, is not installed")


@pytest.mark.parametrize("name", [TRAINER, IMPORT, PIPELINE])
def test_the_sdk_loads_and_accepts_the_components(sdk, name):
    component, mine = sdk.load_component(FOLDER / f"{name}.yml"), read(name)
    checked = component._validate()
    assert checked.passed, checked.error_messages
    assert component.name == name and set(component.inputs) == set(mine["inputs"])
    for key, row in mine["inputs"].items():
        theirs = component.inputs[key]
        assert (theirs.type, bool(theirs.optional), theirs.default) == (
            row["type"], row["optional"], row.get("default")
        ), key  # fmt: skip
        assert list(theirs.enum or []) == row.get("enum", []), key
    assert {key: value.type for key, value in component.outputs.items()} == {
        key: value["type"] for key, value in mine["outputs"].items()
    }
    if name != PIPELINE:
        assert component.command == mine["command"] and Path(component.code) in (Path(".."), tiny.REPOSITORY)


def test_the_sdk_loads_and_accepts_the_job(sdk):
    job = sdk.load_job(FOLDER / "job.yml")
    checked = job._validate()
    assert checked.passed, checked.error_messages
    sent, pipeline = job._to_rest_object().properties, read(PIPELINE)  # what the service gets
    assert list(sent.jobs) == list(pipeline["jobs"])
    for name, node in pipeline["jobs"].items():
        assert {key: value["value"] for key, value in sent.jobs[name]["inputs"].items()} == node["inputs"]
        assert sent.jobs[name]["computeId"] == node["compute"] and sent.jobs[name]["resources"] == node["resources"]
    process_count = pipeline["jobs"]["draft_model_training"]["distribution"]["process_count_per_instance"]
    assert sent.jobs["draft_model_training"]["distribution"] == {
        "distribution_type": "PyTorch", "process_count_per_instance": process_count
    }  # fmt: skip
    defaults = {name for name, row in pipeline["inputs"].items() if "default" in row}
    assert set(sent.inputs) == defaults | set(read("job")["inputs"])


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (TRAINER, "--seed ${{inputs.seed}}", "--seed ${{inputs.speed}}"),
        (TRAINER, "${{outputs.output_model_path}}", "${{outputs.output_dir}}"),
        (TRAINER, "default: 2048", "default: two"),
        (TRAINER, "code: ..", "code: ../nowhere"),
        (PIPELINE, "      target_model_path: ", "      target_path: "),
        (PIPELINE, "component: ./component_model_import", "component: ./component_import"),
    ],
)
def test_the_sdk_notices_what_is_wrong(sdk, tmp_path, name, old, new):
    """So that its consent means something. Values outside an enum, and references to nothing, it does not notice."""
    folder = tmp_path / "azureml"
    shutil.copytree(FOLDER, folder)

    def accepts(text):
        (folder / f"{name}.yml").write_text(text)
        try:
            return sdk.load_component(folder / f"{name}.yml")._validate().passed
        except Exception:  # of several kinds
            return False

    text = (folder / f"{name}.yml").read_text()
    assert text.count(old) == 1 and accepts(text) and not accepts(text.replace(old, new))


def test_what_the_sdk_uploads_is_what_the_commands_need(sdk):
    from azure.ai.ml._utils._asset_utils import get_ignore_file, get_upload_files_from_folder

    def uploaded(folder):
        files = get_upload_files_from_folder(str(folder), ignore_file=get_ignore_file(str(folder)))
        return {name for _, name in files}

    names = uploaded(tiny.REPOSITORY)
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "ds_configs"], cwd=tiny.REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    needed = {name for name in tracked if "/" not in name or name.startswith("ds_configs/")}
    assert needed <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "output", "data", "examples", "benchmarks")]
    assert not [name for name in names if name.startswith(".") or "__pycache__" in name]
    assert uploaded(FOLDER / "environment") == {"Dockerfile", "requirements.txt"}
