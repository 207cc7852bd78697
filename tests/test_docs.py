"""What the README, the pages of docs/, the flags' help and the examples say is so."""

import re
import subprocess
import sys

import pytest

from core import draft_config, foreign_flags
from helpers import tiny, training
from helpers.commands import SCRIPTS, flags_of

ROOT = tiny.REPOSITORY
CORE = sorted((ROOT / "core").glob("*.py"))
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *DOCS)}
README = PAGES["README.md"]


def flags(script):
    """{name: argparse action} of a command, without its dashes and without --help."""
    return {option[2:]: action for option, action in flags_of(script).items() if option.startswith("--") and
            option != "--help"}  # fmt: skip


KNOWN = {script.__name__: flags(script) for script in SCRIPTS}


# --- flags ---


def is_read(name, command, core):
    """Whether a flag's value is used: as args.NAME or flags["NAME"], or in the command as text or by **vars(args)."""
    declared = re.compile(rf'\("{name}", |--{name}\b')
    command, core = declared.sub("", command), declared.sub("", core)
    if name in draft_config.KEYS:  # read as the key of a draft's configuration that it stands for
        return "getattr(args, flag)" in core
    if re.search(rf"args\.{name}\b|flags\[\"{name}\"\]", command + core) or re.search(rf"[\"']{name}[\"']", command):
        return True
    return "**vars(args)" in command and name in command


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_flag_has_help_and_is_read(script):
    source = (ROOT / f"{script.__name__}.py").read_text()
    if script.__name__ == "train_dflash":  # which shares functions with the other trainer
        source += (ROOT / "train_eagle3.py").read_text()
    core = "".join(path.read_text() for path in CORE)
    for name, action in flags(script).items():
        assert action.help, name
        assert is_read(name, source, core), f"--{name} is never read"


def test_a_flag_that_is_not_read_is_found():
    for declared in ('("speed", int, 1, "help"),', 'add("--speed", type=int, help="speed of --speed")'):
        assert not is_read("speed", declared, declared)
        assert is_read("speed", declared + "\nargs.speed", "") and is_read("speed", declared, "args.speed")
        assert is_read("speed", declared, 'flags["speed"]')
        assert is_read("speed", declared + "\nprepare(**vars(args))\ndef prepare(speed):", "")


OTHERS = {  # flags of programs that are not here: as their own --help has them
    "deepspeed": "hostfile include master_addr master_port no_ssh node_rank num_gpus",
    "torchrun": "master_addr nnodes node_rank nproc_per_node",
    "vllm": "kv_transfer_config max-model-len port reasoning-parser speculative-config speculative_config "
            "tensor-parallel-size dtype served-model-name per-request-spec-decode-metrics",
    "sglang": "dtype model-path reasoning-parser speculative-algorithm speculative-draft-model-path "
              "speculative-eagle-topk speculative-num-draft-tokens speculative-num-steps tp-size",
    "SLURM": "ntasks-per-node", "docker": "shm-size",
    "az": "file resource-group set workspace-name", "swanlab": "id", "tensorboard": "logdir",
    "SpecForge": "max-num-steps",
    "pip, apt, conda": "channel disable-pip-version-check no-cache-dir no-install-recommends override-channels prefix "
                       "quiet yes version",
    "benchmarks/recipes.py": "add batch bf16 decode heldout heldout_column heldout_rows max_prompt_tokens rows seconds",
    "benchmarks and make_tiny_target": "block hidden_size layers other ranks rounds steps table vocab_size",
}  # fmt: skip


def test_flags_that_are_mentioned_anywhere_exist():
    """In pages, examples, azureml/ and help texts: of a command of ours, an alias, or of a program named above."""
    paths = [path for name in ("examples", "azureml") for path in (ROOT / name).rglob("*") if path.is_file()]
    texts = PAGES | {path: path.read_text() for path in paths}
    known = {name for names in KNOWN.values() for name in names} | {"help", *foreign_flags.ALIASES}
    for script, names in KNOWN.items():
        texts |= {(script, name): action.help or "" for name, action in names.items()}
    others, mentioned = set(" ".join(OTHERS.values()).split()), set()
    for where, text in texts.items():
        for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text):
            mentioned.add(name)
            assert name in others or name.replace("-", "_") in known, f"--{name} in {where}"
    assert len(mentioned & others) > 30 and len(mentioned) > 100


def test_every_flag_and_every_example_occurs_in_a_test():
    texts = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != "test_docs.py"}
    tables = [path.read_text() for path in (ROOT / "tests" / "cases").glob("*.txt")]
    words = set(re.findall(r"\w+", "\n".join([*texts.values(), *tables])))
    for script, names in KNOWN.items():
        for name in names:
            assert {name, name.removeprefix("regenerate_")} & words, f"{script} --{name}"
    for path in (ROOT / "examples").glob("run_*.sh"):
        assert any(f'"{path.name}"' in text for text in texts.values()), path


# --- commands ---


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_run_lines_in_docstrings_use_flags_that_exist(script):
    text = script.__doc__.replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.search(r"\b(python|deepspeed) .*\.py", line)]
    assert lines, "no run line"
    for line in lines:
        name = re.search(r"(\w+)\.py", line)[1]
        for option in re.findall(r"--(\w+)", line.split(".py", 1)[1]):
            assert option in KNOWN[name], f"--{option} in: {line}"


def test_commands_name_files_and_flags_that_exist():
    blocks = [block for text in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    assert len(blocks) >= 16
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        for path in re.findall(r"(?:bash|python|deepspeed)(?: --\w+ \S+)* ([\w/]+\.(?:py|sh))", line):
            assert (ROOT / path).exists(), line
        script = re.search(r"(\w+)\.py(.*)", line)
        if script and script[1] in KNOWN:
            for option in re.findall(r"--(\w+)", script[2]):
                assert option in KNOWN[script[1]], line


def test_each_file_at_the_root_is_a_command():
    assert {path.stem for path in ROOT.glob("*.py")} == set(KNOWN)
    for script in SCRIPTS:
        assert script.parse_args and script.main and script.__doc__


def test_help_of_every_script_is_printed_without_a_model():
    for script in SCRIPTS[:2]:
        command = [sys.executable, str(ROOT / f"{script.__name__}.py"), "--help"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and "--output_path" in result.stdout


# --- files and pages ---


def test_files_that_are_mentioned_anywhere_exist():
    paths = [*ROOT.glob("*.py"), *CORE, *(ROOT / "examples").glob("*.*"), *(ROOT / "azureml").glob("*.yml")]
    texts = PAGES | {path: path.read_text() for path in paths}
    folders = ("", "core", "examples", "benchmarks", "tests", "tests/helpers")
    top = "core|docs|examples|ds_configs|benchmarks|tests|azureml"
    for where, text in texts.items():
        for name in re.findall(rf"(?<![\w/.-])((?:{top})/[\w./-]*\w)", text):
            assert (ROOT / name).exists(), f"{name} in {where}"
        for name in re.findall(r"(?<![\w/.-])([a-z_0-9]+\.py)\b", text):
            assert any((ROOT / folder / name).exists() for folder in folders), f"{name} in {where}"


def test_pages_are_short():
    for name, text in PAGES.items():
        lines = text.splitlines()
        assert len(lines) <= (180 if name == "README.md" else 130), name
        assert [line for line in lines if len(line) > 120] == [], name


def test_every_page_is_linked_in_the_readme_and_every_link_resolves():
    """Each page in the index at the README's end; links to other pages of this repository, from wherever they are."""
    index = README.split("## Documentation", 1)[1]
    linked = set(re.findall(r"\((docs/\w+\.md)\)", index))
    assert linked == PAGES.keys() - {"README.md"}
    for name, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#]+)", text):
            path = (ROOT / name).parent / link
            assert path.exists(), f"{link} in {name}"


def test_the_tree_names_every_file_at_the_root_and_in_core():
    tree = README.split("## The code", 1)[1].split("```")[1]
    named = re.findall(r"^ *((?:core/)?\w+\.py) ", tree, re.MULTILINE)
    assert sorted(named) == sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.py"), *CORE))
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    assert set(re.findall(r"(\w+)/(?=\s)", tree)) <= folders


def test_recipes_and_configurations_are_listed():
    """Each recipe with a target in the README's table, each file of ds_configs/ and azureml/ on its page."""
    recipes = {f"examples/{path.name}" for path in (ROOT / "examples").glob("run_*.sh")}
    listed = set(re.findall(r"^\| `(examples/\w+\.sh)` \|", README, re.MULTILINE))
    assert recipes == listed | {"examples/run_tiny_online.sh"}
    for folder, page in (("ds_configs", "distributed"), ("azureml", "azure")):
        for path in (ROOT / folder).glob("*.*"):
            assert f"| `{folder}/{path.name}` |" in PAGES[f"docs/{page}.md"], path


def test_what_the_table_of_changes_names_is_there():
    rows = re.findall(r"^\| .+ \| (.*) \| `([\w/]+\.py)` \|$", README.split("## Changing it", 1)[1], re.MULTILINE)
    assert len(rows) >= 6
    for text, path in rows:
        source = (ROOT / path).read_text()
        other = re.search(r"`(\w+)` in `(core/\w+\.py)`", text)
        if other:
            assert re.search(rf"^(def {other[1]}\(|{other[1]} = )", (ROOT / other[2]).read_text(), re.MULTILINE), text
        for name in set(re.findall(r"`(\w+)(?:\([^`]*\))?`", text)):
            here = re.search(rf"^(def {name}\(|class {name}\b|{name} = )", source, re.MULTILINE)
            assert here or (other and other[1] == name), f"{name} in {path}"


def test_the_table_of_metrics_is_complete(work, tmp_path):
    """What a run writes is what the table has, with i for the steps of the training-time test."""
    table = re.findall(r"^\| `(\w+)` \|", PAGES["docs/metrics.md"].split("| metric |", 1)[1], re.MULTILINE)
    rows = training.run(work, tmp_path / "out", "--total_steps", 1, "--draft_global_batch_size", 1)
    written = {re.sub(r"_\d+$", "_i", name) for row in rows for name in row}
    trackers = {"swanlab", "wandb", "tensorboard", "mlflow", "trackio"}
    assert written - {"split", "step", "epoch"} == set(table) - trackers
    assert {"split", "step", "epoch"} <= set(re.findall(r"`(\w+)`", PAGES["docs/metrics.md"]))


def test_readme_has_no_gaps():
    for name, text in PAGES.items():
        assert not re.search(r"TODO|FIXME|XXX|TINY_FIGURES|<!--", text), name
    assert re.search(r"acceptance length after training: [2-7]\.\d+", README), "the tiny run's measured figures"


def test_figures_have_a_date_and_a_machine():
    """A page with measured seconds, MiB or acceptance names the date, the machine and torch's version."""
    for name in ("README.md", "docs/performance.md"):
        assert re.search(r"20\d\d-\d\d-\d\d", PAGES[name]) and "cores" in PAGES[name] and "torch 2." in PAGES[name], (
            name
        )


def test_what_is_not_measured_is_in_one_table():
    status = README.split("## Status", 1)[1].split("\n## ", 1)[0]
    assert "not measured yet" in status
    texts = PAGES | {path.name: path.read_text() for path in (ROOT / "examples").glob("*.sh")}
    for name, text in texts.items():
        rest = text.replace(status, "") if name == "README.md" else text
        assert not re.search(r"not\s(?:# )?(?:been )?measured\s(?:# )?yet", rest), name


def test_requirements_are_exact():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)
    names = {line.split("==")[0] for line in lines}
    assert {"torch", "deepspeed", "transformers", "datasets", "numpy", "sentencepiece", "swanlab", "tqdm"} <= names
