"""What the README, the flags' help and the examples say is so."""

import re
import subprocess
import sys

import pytest

import train_eagle3
from core import foreign_flags
from helpers import tiny
from helpers.commands import SCRIPTS, flags_of

ROOT = tiny.REPOSITORY
CORE = sorted((ROOT / "core").glob("*.py"))
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_flag_has_help_and_is_read(script):
    source = (ROOT / f"{script.__name__}.py").read_text()
    elsewhere = "".join(path.read_text() for path in CORE)
    for option, action in flags_of(script).items():
        if option.startswith("--") and option != "--help":
            assert action.help, option
            name = option[2:]
            row = f'("{name}", '  # that in FLAGS reads nothing
            handed_on = "**vars(args)" in source and name in source.replace(option, "").replace(row, "")
            read = re.search(rf"args\.{name}\b|\"{name}\"|'{name}'", source.replace(row, ""))
            assert read or handed_on or f"args.{name}" in elsewhere, f"{option} is never read"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_run_lines_in_docstrings_use_flags_that_exist(script):
    known = {module.__name__: flags_of(module) for module in SCRIPTS}
    text = script.__doc__.replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.search(r"\b(python|deepspeed) .*\.py", line)]
    assert lines, "no run line"
    for line in lines:
        name = re.search(r"(\w+)\.py", line)[1]
        for option in re.findall(r"(--\w+)", line.split(".py", 1)[1]):
            assert option in known[name], f"{option} in: {line}"


def test_readme_commands_name_files_and_flags_that_exist():
    known = {module.__name__: flags_of(module) for module in SCRIPTS}
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        for path in re.findall(r"(?:bash|python|deepspeed)(?: --\w+ \S+)* ([\w/]+\.(?:py|sh))", line):
            assert (ROOT / path).exists(), line
        script = re.search(r"(\w+)\.py(.*)", line)
        if script and script[1] in known:
            for option in re.findall(r"(--\w+)", script[2]):
                assert option in known[script[1]], line


OTHERS = {  # flags of programs that are not here: as their own --help has them
    "deepspeed": "hostfile include master_addr master_port no_ssh node_rank num_gpus",
    "torchrun": "master_addr nnodes node_rank nproc_per_node",
    "vllm": "kv_transfer_config max-model-len port reasoning-parser speculative-config speculative_config "
            "tensor-parallel-size dtype served-model-name",
    "sglang": "dtype model-path reasoning-parser speculative-algorithm speculative-draft-model-path "
              "speculative-eagle-topk speculative-num-draft-tokens speculative-num-steps tp-size",
    "az": "file resource-group set workspace-name", "swanlab": "id", "tensorboard": "logdir",
    "SpecForge": "max-num-steps",
    "pip, apt, conda": "channel disable-pip-version-check no-cache-dir no-install-recommends override-channels prefix "
                       "quiet yes version",
    "benchmarks and make_tiny_target": "block hidden_size layers ranks steps table vocab_size",
}  # fmt: skip


def test_flags_that_are_mentioned_anywhere_exist():
    """In README, examples, azureml/ and help texts: of a script of ours, an alias, or of a program named above."""
    paths = [path for name in ("examples", "azureml") for path in (ROOT / name).rglob("*") if path.is_file()]
    texts = {path: path.read_text() for path in (ROOT / "README.md", *paths)}
    known = {option[2:] for script in SCRIPTS for option in flags_of(script)} | set(foreign_flags.ALIASES)
    for script in SCRIPTS:
        texts |= {(script.__name__, option): action.help or "" for option, action in flags_of(script).items()}
    others, mentioned = set(" ".join(OTHERS.values()).split()), set()
    for where, text in texts.items():
        for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text):
            mentioned.add(name)
            assert name in others or name.replace("-", "_") in known, f"--{name} in {where}"
    assert len(mentioned & others) > 30 and len(mentioned) > 100


def test_files_that_are_mentioned_anywhere_exist():
    paths = [ROOT / "README.md", *ROOT.glob("*.py"), *CORE, *(ROOT / "examples").glob("*.*")]
    texts = {path: path.read_text() for path in paths}
    for where, text in texts.items():
        for name in re.findall(r"(?<![\w/.-])((?:core|examples|ds_configs|benchmarks|tests|azureml)/[\w./-]*\w)", text):
            assert (ROOT / name).exists(), f"{name} in {where}"
        for name in re.findall(r"(?<![\w/.-])([a-z_0-9]+\.py)\b", text):
            folders = ("", "core", "examples", "benchmarks", "tests", "tests/helpers")
            assert any((ROOT / folder / name).exists() for folder in folders), f"{name} in {where}"


def test_every_flag_and_every_example_occurs_in_a_test():
    texts = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != "test_docs.py"}
    words = set(re.findall(r"\w+", "\n".join(texts.values())))
    for script in SCRIPTS:
        for option in flags_of(script):
            if option.startswith("--") and option != "--help":
                assert {option[2:], option[2:].removeprefix("regenerate_")} & words, f"{script.__name__} {option}"
    for path in (ROOT / "examples").glob("run_*.sh"):
        assert any(f'"{path.name}"' in text for text in texts.values()), path


def test_readme_file_map_names_every_file_and_nothing_else():
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    section = README.split("## Files", 1)[1].split("\n## ", 1)[0]
    named = set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
    there = {path for path in tracked.stdout.split() if not path.startswith((".", "tests/")) and (ROOT / path).exists()}
    assert named - {"tests/"} == there


def test_readme_metrics_table_is_complete():
    section = README.split("## Metrics", 1)[1].split("\n## ", 1)[0]
    named = set(re.findall(r"`(\w+)`", section))
    values = train_eagle3.metric_values([[1.0, 1.0, 1.0, 1.0]] * 2, 1.0, [1.0, 0.8])
    families = {re.sub(r"_\d+$", "_i", name) for name in values}
    source = (ROOT / "train_eagle3.py").read_text() + (ROOT / "core" / "run_record.py").read_text()
    logged = {
        "lr",
        "grad_norm",
        "tokens_per_second",
        "seconds",
        "acceptance_length",
        "passes",
        "step",
        "epoch",
        "split",
    }
    assert all(f'"{name}"' in source for name in logged)
    assert families | logged <= named


def test_readme_lists_every_flag_of_the_trainer_in_its_group():
    section = README.split("## Flags", 1)[1].split("\n## ", 1)[0]
    table = re.findall(r"^\| ([\w ]+) \| (`.*`) \|$", section, re.MULTILINE)
    groups = {title: [name for name, *_ in rows] for title, rows in train_eagle3.FLAGS.items()}
    assert {title: sorted(re.findall(r"`(\w+)`", names)) for title, names in table} == {
        title: sorted(names) for title, names in groups.items()
    }


def test_each_file_at_the_root_is_a_command():
    assert {path.stem for path in ROOT.glob("*.py")} == {script.__name__ for script in SCRIPTS}
    for script in SCRIPTS:
        assert script.parse_args and script.main and script.__doc__


def test_readme_has_no_gaps():
    assert not re.search(r"TODO|FIXME|XXX|TINY_FIGURES|<!--", README)
    assert re.search(r"acceptance length after training: [2-7]\.\d+", README), "the tiny run's measured figures"


def test_requirements_are_exact():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)
    names = {line.split("==")[0] for line in lines}
    assert {"torch", "deepspeed", "transformers", "datasets", "numpy", "sentencepiece", "swanlab", "tqdm"} <= names


def test_help_of_every_script_is_printed_without_a_model():
    for script in SCRIPTS[:2]:
        command = [sys.executable, str(ROOT / f"{script.__name__}.py"), "--help"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and "--output_path" in result.stdout
