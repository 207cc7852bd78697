"""Recipes compared at equal cost: drafts trained in several ways for a real target, ours and other trainers'.

In:  a target, conversations (their first questions are read; the target replies), and held-out prompts.
Out: --output: data/ (the target's own replies, prepared, with hidden states), runs/BUDGET/VARIANT/seed_N/ (drafts with
     their command and metrics), table_BUDGET.md, table_BUDGET.json, curves_BUDGET.png: acceptance against time.

    python benchmarks/recipes.py --target_model_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset chats.jsonl \
        --heldout mt_bench.jsonl --heldout_column turns --draft_vocab_size 8000 --output recipes --steps 500
    python benchmarks/recipes.py ... --seconds 300 --seeds 0 1 2 --variants ours specforge speculators
    python benchmarks/recipes.py ... --add "wide: --ttt_length 5 --learning_rate 3e-3"      # trains this one alone
    python benchmarks/recipes.py ... --table                                                # trains nothing

What is finished is kept: a second call adds variants or seeds, with the same data and settings. --seconds are those
of the processor that a training takes on CPUs, so that other work on the machine matters little, and of the clock on
GPUs; evaluations and the start are not counted. docs/recipes.md says how to read the table.
"""

import concurrent.futures
import contextlib
import io
import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import psutil
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import own_replies  # noqa: E402  (the root is not on the path of a script that lies here)
import recipes_table  # noqa: E402

import evaluate_draft  # noqa: E402
import train_eagle3  # noqa: E402
from core import common, dataloader, draft_files, ranks, slots, states, target_files, target_model  # noqa: E402

# Each row: the flags of train_eagle3.py in which a variant differs from its defaults. The learning rates that other
# trainers have as defaults are for larger targets: their recipes are also run at 1e-3, which suits small ones better.
SPECFORGE = (  # specforge 0.2.0: config/schema.py, TrainingConfig; optimizer.py; training/strategies/base.py
    "--scheduler_type cosine --warmup_ratio 0.015 --weight_decay 0 --max_grad_norm 0.5 --ttt_length 7 "
    "--ttt_step_loss_decay 0.8 --head_init random"
)
SPECULATORS = (  # speculators 0.9.0: train/config/schema.py; model.py (head); train/trainer.py (warm-up)
    "--optimizer muon --learning_rate 1e-3 --muon_lr 1e-3 --muon_momentum 0.95 --muon_weight_decay 0.1 "
    "--muon_ns_steps 5 --muon_adjust_lr_fn match_rms_adamw --weight_decay 0.01 --scheduler_type linear "
    "--warmup_ratio 0.01 --ttt_length 3 --ttt_step_loss_decay 1.0 --loss kl "
    "--norm_before_residual --norm_before_fc --norm_output --freeze_head"
)
SPECULATORS_DOCUMENTED = (  # its documentation of scripts/train.py, older: AdamW, one norm, noise
    "--optimizer adamw --learning_rate 1e-4 --weight_decay 0.01 --max_grad_norm 1.0 --scheduler_type linear "
    "--warmup_ratio 0.01 --ttt_length 3 --ttt_step_loss_decay 1.0 --loss kl --norm_before_residual --freeze_head "
    "--noise_std 0.05"
)
EAGLE = (  # github.com/SafeAILab/EAGLE: eagle/traineagle3/ds_config.json, main.py, cnets.py
    "--scheduler_type linear --warmup_ratio 0.015 --weight_decay 0 --max_grad_norm 0.5 --ttt_length 7 "
    "--ttt_step_loss_decay 0.8 --head_init random"
)
NORMS = "--norm_before_residual --norm_before_fc --norm_output"
MUON = "--optimizer muon --muon_lr 1e-3 --learning_rate 1e-3"
VARIANTS = {
    "ours": "--learning_rate 1e-3",
    "specforge": f"{SPECFORGE} --learning_rate 1e-4",
    "specforge_1e-3": f"{SPECFORGE} --learning_rate 1e-3",
    "speculators": SPECULATORS,
    "speculators_documented": SPECULATORS_DOCUMENTED,
    "eagle": f"{EAGLE} --learning_rate 5e-5",
    "eagle_1e-3": f"{EAGLE} --learning_rate 1e-3",
    "norms": f"--learning_rate 1e-3 {NORMS}",
    "muon": MUON,
    "muon_norms": f"{MUON} {NORMS}",
    "muon_norms_frozen": f"{MUON} {NORMS} --freeze_head",
    "muon_3.1": f"{MUON} --fc_norm --norm_output",
    "chain": "--learning_rate 1e-3 --chain_sampling",
    "survival": "--learning_rate 1e-3 --step_weights survival",
    "lk": "--learning_rate 1e-3 --loss lk",
    "lk_hybrid": "--learning_rate 1e-3 --loss lk_hybrid",
    "sequences": "--learning_rate 1e-3 --loss_average sequences",
    "ema": "--learning_rate 1e-3 --ema_decay 0.98",
    "muon_norms_chain": f"{MUON} {NORMS} --chain_sampling",
    "muon_norms_frozen_chain": f"{MUON} {NORMS} --freeze_head --chain_sampling",
    "muon_3.1_chain": f"{MUON} --fc_norm --norm_output --chain_sampling",
    "muon_norms_survival": f"{MUON} {NORMS} --step_weights survival",
    "muon_norms_chain_lk": f"{MUON} {NORMS} --chain_sampling --loss lk_hybrid",
    "speculators_2e-2": SPECULATORS.replace("--muon_lr 1e-3", "--muon_lr 2e-2"),
    "best": "--recipe best",
    "best_all_steps": "--recipe best --chain_sampling false",
    "best_adamw": "--recipe best --optimizer adamw --learning_rate 1e-3",
    "best_free_head": "--recipe best --freeze_head false",
    "best_lk_hybrid": "--recipe best --loss lk_hybrid",
    "best_survival": "--recipe best --chain_sampling false --step_weights survival",
    "best_sequences": "--recipe best --loss_average sequences",
    "best_ema": "--recipe best --ema_decay 0.98",
}
PILOT_STEPS = 20  # that measure the pace of a variant, the first half as a warm-up
TOLERANCE = 0.1  # a first run that misses the budget of seconds by more is repeated with the pace it had
DECODED = Path("decoded", "evaluation.json")  # of a run
DATA_SETTINGS = (  # flags that the data depend on
    "target_model_path", "dataset", "prompt_column", "rows", "heldout", "heldout_column", "heldout_rows",
    "max_prompt_tokens", "max_heldout_tokens", "max_new_tokens", "temperature",
)  # fmt: skip
RUN_SETTINGS = (  # flags that all trainings of a budget and their evaluation depend on
    "batch", "draft_vocab_size", "bf16", "trainer_flags", "evaluations", "num_draft_tokens",
)  # fmt: skip


# ==================== Processes ======================================================================================


def environment():
    """Variables of a training: those of here but a launcher's, one thread."""
    own = {name: value for name, value in os.environ.items() if name not in (*ranks.VARIABLES, "LOCAL_RANK")}
    return own | {"OMP_NUM_THREADS": "1"}


def options_of(log):
    """How a command of the repository is started that writes to this open file."""
    return {"cwd": ROOT, "env": environment(), "stdout": log, "stderr": subprocess.STDOUT}


def run(command, log):
    """Run a command of the repository; returns "" or, if it fails, why."""
    print(f"$ {shlex.join(command)}", flush=True)
    with open(log, "w") as file:
        done = subprocess.run([sys.executable, *command], check=False, **options_of(file))
    return f"{command[0]} ends with {done.returncode}: {last_line(log)} ({log})" if done.returncode else ""


def run_or_fail(command, log):
    """The same; ends the program if it fails."""
    if problem := run(command, log):
        common.fail(problem)


def last_line(log):
    """The line of a log that says what is wrong: the first error, else the last line."""
    lines = Path(log).read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[0].removeprefix("error: ")
    return lines[-1] if lines else "no output"


def read_clock(process):
    """Seconds of the processor (user and system) that a process has taken; of the clock if it trains on a GPU."""
    if torch.cuda.is_available():
        return time.monotonic()
    times = process.cpu_times()
    return times.user + times.system


def watch(command, log, metrics, until=None):
    """Run a training and note when each row of its metrics appears: (exit code, seconds of each row).

    until: number of rows after which it is killed.
    """
    marks = []
    with open(log, "w") as file:
        process = psutil.Popen([sys.executable, *command], **options_of(file))
    try:
        while process.poll() is None:
            with contextlib.suppress(psutil.Error, FileNotFoundError):
                seconds = read_clock(process)
                found = metrics.read_bytes().count(b"\n")
                marks += [seconds] * (found - len(marks))
            if until and len(marks) >= until:
                break
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    return process.returncode, marks


# ==================== Data ===========================================================================================


def keep_settings(args, names, folder):
    """Write the settings that a folder is made with; ends the program if it was made with others."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in names}
    stored = folder / "settings.json"
    if stored.exists():
        differ = [name for name, value in json.loads(stored.read_text()).items() if settings[name] != value]
        if differ:
            common.fail(f"{folder} was made with another {', '.join(differ)}: give the same, or another --output")
    common.write_atomic(stored, json.dumps(settings, indent=2) + "\n")


def write_data(args, folder):
    """The target's own replies, prepared, with their hidden states."""
    keep_settings(args, DATA_SETTINGS, folder)
    if (folder / "states" / "done").exists():
        return
    write_replies(args, folder)
    target = ["--target_model_path", args.target_model_path]
    prepared = str(folder / "prepared")
    rows = [str(folder / "train.jsonl"), "--validation_dataset", str(folder / "validation.jsonl")]
    command = ["prepare_data.py", *target, "--dataset", *rows, "--output_path", prepared, "--num_proc", "1"]
    run_or_fail(command, folder / "prepare_data.log")
    command = ["prepare_hidden_states.py", *target, "--data_path", prepared, "--output_path", str(folder / "states")]
    run_or_fail(command, folder / "prepare_hidden_states.log")
    (folder / "states" / "done").touch()


def write_replies(args, folder):
    """train.jsonl and validation.jsonl of the target's own replies; those that are there already are kept."""
    tokenizer = target_files.load_tokenizer(args.target_model_path, False)
    limit = args.max_prompt_tokens
    read = own_replies.read_prompts
    count = args.heldout_rows + args.rows
    questions = read(args.dataset, tokenizer, limit, count, args.prompt_column)
    held = questions[: args.heldout_rows]
    train = questions[args.heldout_rows :]
    if args.heldout:
        held = read(args.heldout, tokenizer, args.max_heldout_tokens, prompt_column=args.heldout_column) + held
    if not train or not held:
        common.fail(f"{len(train)} prompts to train on, {len(held)} held out: both are needed")
    model_dir = target_files.resolve_target(args.target_model_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").to(device).eval()
    ends = evaluate_draft.eos_token_ids(SimpleNamespace(model=model, config=model.config), tokenizer)
    for name, prompts, temperature in (("validation", held, 0.0), ("train", train, args.temperature)):
        path = folder / f"{name}.jsonl"
        own_replies.write_replies(
            path,
            model,
            prompts,
            sorted(ends),
            args.generation_batch_size,
            args.max_new_tokens,
            temperature,
        )


# ==================== Training =======================================================================================


def choose_variants(args):
    """{name: flags} of the variants that are asked for."""
    known = dict(VARIANTS)
    added = []
    for text in args.add:
        name, colon, flags = text.partition(":")
        if not colon or not name or "/" in name:
            common.fail(f'add {text}: write "NAME: flags of train_eagle3.py"')
        known[name.strip()] = flags.strip()
        added.append(name.strip())
    names = args.variants or added or list(VARIANTS)
    unknown = [name for name in names if name not in known]
    if unknown:
        common.fail(f"variants {', '.join(unknown)}: known are {', '.join(known)}")
    return {name: known[name] for name in dict.fromkeys([*names, *added])}


def base_flags(args):
    """The flags that all variants share."""
    data = Path(args.output).resolve() / "data"
    flags = [
        *("--target_model_path", args.target_model_path),
        *("--data_path", str(data / "prepared")),
        *("--hidden_states_path", str(data / "states")),
        *("--draft_global_batch_size", str(args.batch)),
        *("--draft_micro_batch_size", str(args.batch)),
        *("--num_workers", "0"),
        *("--eval_interval", "1000000"),
        *("--save_interval", "1000000"),
    ]
    if args.draft_vocab_size:
        flags += ["--draft_vocab_size", str(args.draft_vocab_size)]
    if args.bf16:
        flags += ["--precision", "bf16"]
    return flags + shlex.split(args.trainer_flags)


def trainer_command(args, flags, folder, steps, seed):
    """The command line of a training of so many steps, evaluated at most args.evaluations times.

    training_seconds needs a row of training at each step that is evaluated: log_steps divides eval_steps. The trainer
    logs and evaluates the last step in any case.
    """
    log_steps = max(steps // args.evaluations // 5, 1)
    eval_steps = math.ceil(steps / args.evaluations / log_steps) * log_steps
    return [
        "train_eagle3.py",
        *base_flags(args),
        *("--total_steps", str(steps)),
        *("--eval_steps", str(eval_steps)),
        *("--log_steps", str(log_steps)),
        *("--seed", str(seed)),
        *("--output_dir", str(folder)),
        *shlex.split(flags),
    ]


def refusal(args, flags):
    """The line with which this trainer refuses the flags as such, or ""."""
    errors = io.StringIO()
    command = trainer_command(args, flags, "none", 1, 0)
    with contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
        train_eagle3.parse_args(command[1:])
    return errors.getvalue().strip().removeprefix("error: ")


def measure_pace(args, name, flags, folder):
    """Seconds a step, from the second half of a short training that is killed; raises Refused."""
    common.remove(folder)
    folder.mkdir(parents=True)
    command = trainer_command(args, flags, folder / "run", PILOT_STEPS + 1, 0)
    command += ["--log_steps", str(PILOT_STEPS // 2), "--eval_steps", "0"]
    code, marks = watch(command, folder / "log.txt", folder / "run" / "metrics.jsonl", until=2)
    if len(marks) < 2:
        raise Refused(f"{name}: exit code {code}, {last_line(folder / 'log.txt')}")
    common.remove(folder)
    return (marks[1] - marks[0]) / (PILOT_STEPS // 2)


class Refused(Exception):
    """A variant that the trainer does not train; the argument says why."""


def train_run(args, name, flags, folder, steps, seed):
    """Train one seed of a variant and write done.json: its command and the seconds of each row of its metrics."""
    common.remove(folder)
    folder.mkdir(parents=True)
    command = trainer_command(args, flags, folder, steps, seed)
    log = folder.with_name(f"{folder.name}.log")
    print(f"{name}, seed {seed}: {steps} steps", flush=True)
    code, marks = watch(command, log, folder / "metrics.jsonl")
    if code:
        raise Refused(f"{name}: exit code {code}, {last_line(log)}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = training_seconds(rows, marks)
    for path in folder.glob("step_*"):  # optimizer states are large, final/ is what is measured
        common.remove(path)
    trainer_args = train_eagle3.parse_args(command[1:])
    done = {
        "command": f"OMP_NUM_THREADS=1 python {shlex.join(command)}",
        "flags": flags,
        "steps": steps,
        "seconds": seconds,
        "ttt_length": trainer_args.ttt_length,
        "chains": count_chains(trainer_args),
        "rows": rows,
    }
    common.write_atomic(folder / "done.json", json.dumps(done, indent=2) + "\n")
    return done


def count_chains(trainer_args):
    """Chains that an optimizer step starts on average: the slots of its first ttt_step."""
    data, _ = dataloader.open_data(trainer_args.data_path)
    _, chains = slots.measure_read(data["train"])
    return float(chains.mean()) * trainer_args.draft_global_batch_size


def training_seconds(rows, marks):
    """Seconds of training, without the start and evaluations, up to each row of the metrics.

    An evaluation lasts from the row of training of its step, which comes before its own, to its own. The start ends
    where the first rows would begin at the pace of the next ones.
    """
    marks = marks + [marks[-1]] * (len(rows) - len(marks)) if marks else [math.nan] * len(rows)
    evaluations = 0.0
    seconds = []
    trained = []  # (step, seconds) of rows of training
    for number, (row, mark) in enumerate(zip(rows, marks, strict=True)):
        if row["split"] == "validation":
            if rows[number - 1]["step"] != row["step"]:
                raise Refused(f"the evaluation at step {row['step']} has no row of training: give other log_steps")
            evaluations += mark - marks[number - 1]
        else:
            trained.append((row["step"], mark - evaluations))
        seconds.append(mark - evaluations)
    start = 0.0
    if len(trained) > 1:
        (first, at), (second, later) = trained[:2]
        start = at - (later - at) / (second - first) * first
    return [value - start for value in seconds]


def train_variant(args, name, flags, seed):
    """Train one seed of a variant unless that is done; returns why it is refused, or ""."""
    place = budget_folder(args) / name
    folder = place / f"seed_{seed}"
    try:
        if (folder / "done.json").exists():
            done = json.loads((folder / "done.json").read_text())
            if done["flags"] != flags:
                common.fail(f"{folder} was trained with {done['flags']}: remove it, or give the variant another name")
            return ""
        if args.steps:
            train_run(args, name, flags, folder, args.steps, seed)
            return ""
        stored = place / "steps.json"
        if stored.exists():
            train_run(args, name, flags, folder, json.loads(stored.read_text()), seed)
            return ""
        pace = measure_pace(args, name, flags, place / "pilot")
        steps = max(round(args.seconds / pace), 2)
        done = train_run(args, name, flags, folder, steps, seed)
        if abs(done["seconds"][-1] / args.seconds - 1) > TOLERANCE:  # its pace changes on the way
            steps = max(round(steps * args.seconds / done["seconds"][-1]), 2)
            train_run(args, name, flags, folder, steps, seed)
        common.write_atomic(stored, json.dumps(steps))
    except Refused as error:
        return str(error)
    return ""


def budget_folder(args):
    """Where the runs of a budget lie."""
    budget = f"steps_{args.steps}" if args.steps else f"seconds_{args.seconds:g}"
    return Path(args.output).resolve() / "runs" / budget


def train_all(args, variants):
    """Train what is missing, seed by seed; returns {name: why it is refused}."""
    refused = {name: line for name, flags in variants.items() if (line := refusal(args, flags))}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for seed in args.seeds:
            names = [name for name in variants if name not in refused]
            found = pool.map(lambda name, seed=seed: train_variant(args, name, variants[name], seed), names)
            refused |= {name: line for name, line in zip(names, found, strict=True) if line}
    for name, line in refused.items():
        print(f"refused by this trainer: {name}: {line}")
    return refused


# ==================== Evaluation =====================================================================================


def walk(args, folders):
    """Write walk.json of each run: what greedy decoding with args.num_draft_tokens drafts accepts of held-out replies.

    A training's own evaluation has as many drafts as it has steps of the training-time test: where these are as many,
    that is the value.
    """
    pending = []
    for folder in folders:
        done = json.loads((folder / "done.json").read_text())
        if done["ttt_length"] == args.num_draft_tokens:
            write_walk(folder / "walk.json", done["rows"][-1])
        elif not (folder / "walk.json").exists():
            pending.append(folder)
    if not pending:
        return
    trainer_args = walk_flags(args)
    device, model_dir, layers = open_target(args)
    data, data_config = dataloader.open_data(trainer_args.data_path)
    source = states.open_source(trainer_args, "none", model_dir, device, layers, data, data_config)
    for folder in pending:
        write_walk(folder / "walk.json", evaluate(folder, source, data["validation"], trainer_args))


def walk_decoded(args, folders):
    """Write walk_decoded.json of each run: the same walk over the very texts that were decoded with the draft.

    In half precision they leave the held-out replies, which were generated in batches, where tokens are nearly tied.
    """
    pending = [folder for folder in folders if (folder / DECODED).exists()]
    pending = [folder for folder in pending if not (folder / "walk_decoded.json").exists()]
    if not pending:
        return
    device, model_dir, layers = open_target(args)
    source = states.Online(target_model.load(model_dir, device, layer_ids=layers), batch_size=1)
    for folder in pending:
        rows = []
        for line in (folder / DECODED).with_name("generations.jsonl").read_text().splitlines():
            row = json.loads(line)
            row["length"] = len(row["input_ids"])
            rows.append({name: row[name] for name in ("input_ids", "loss_mask", "length")})
        texts = datasets.Dataset.from_list(rows)
        write_walk(folder / "walk_decoded.json", evaluate(folder, source, texts, walk_flags(args)))


def walk_flags(args):
    """The trainer's flags of a walk."""
    return train_eagle3.parse_args([*base_flags(args), "--ttt_length", str(args.num_draft_tokens)])


def open_target(args):
    """(device, the target's folder, auxiliary layers)"""
    device = ranks.start_distributed(20)
    model_dir = target_files.resolve_target(args.target_model_path)
    config, _ = target_files.read_target_config(model_dir, False)
    return device, model_dir, target_files.default_layer_ids(config.num_hidden_layers)


def evaluate(folder, source, rows, trainer_args):
    """The trainer's evaluation of a run's finished draft."""
    draft, d2t = evaluate_draft.load_draft(*draft_files.read_draft(folder / "final"), source.target)
    device = source.target.embedding.device
    engine = SimpleNamespace(module=draft, device=device, eval=draft.eval, train=draft.train)
    return train_eagle3.evaluate(engine, source, rows, d2t, trainer_args)


def write_walk(path, values):
    """Keep the acceptance length of an evaluation's values."""
    common.write_atomic(path, json.dumps({"acceptance_length": values["acceptance_length"]}) + "\n")


def decode(args, folder):
    """Real speculative decoding of the first args.decode held-out prompts, into decoded/evaluation.json."""
    if (folder / DECODED).exists():
        return
    command = [
        "evaluate_draft.py",
        *("--target_model_path", args.target_model_path),
        *("--draft_model_path", str(folder / "final")),
        *("--prompts", str(Path(args.output).resolve() / "data" / "prepared")),
        *("--num_prompts", str(args.decode)),
        *("--num_draft_tokens", str(args.num_draft_tokens)),
        *("--max_new_tokens", str(args.max_new_tokens)),
        *("--output", str(folder / "decoded")),
    ]
    if problem := run(command, folder / "decode.log"):
        print(f"not decoded: {problem}", flush=True)


# ==================== Command line ===================================================================================


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    positive = common.at_least(int, 1)
    natural = common.at_least(int, 0)
    add = parser.add_argument_group("target and data").add_argument
    add("--target_model_path", required=True, help="folder or hub id")
    add("--dataset", required=True, help="conversations in any form of prepare_data.py --dataset")
    add("--prompt_column", help="column of the questions, where rows are no conversations")
    add("--rows", type=positive, default=1600, help="conversations to train on: the first with short questions")
    add("--heldout", help="prompts to measure on, beside heldout_rows; as dataset")
    add("--heldout_column", help="the same as prompt_column, of heldout; turns for MT-Bench")
    add("--heldout_rows", type=natural, default=40, help="first conversations of dataset, not trained on")
    add("--max_prompt_tokens", type=positive, default=96, help="longer questions of dataset are left out")
    add("--max_heldout_tokens", type=positive, default=512, help="the same of heldout")
    add("--max_new_tokens", type=positive, default=128, help="tokens of a reply")
    add("--temperature", type=common.at_least(float, 0), default=0.0, help="of the replies that are trained on")
    add("--generation_batch_size", type=positive, default=128, help="replies that are generated together")
    add = parser.add_argument_group("trainings").add_argument
    add("--variants", nargs="+", help=f"of {', '.join(VARIANTS)}; none: those of add, else all")
    add("--add", nargs="+", default=[], help='further variants, each "NAME: flags of train_eagle3.py"')
    add("--steps", type=positive, help="optimizer steps of each training")
    add("--seconds", type=common.above_zero, help="of training, instead of steps")
    add("--seeds", type=common.SEED, nargs="+", default=[0, 1, 2], help="each is a training")
    add("--batch", type=positive, default=1, help="sequences a step")
    add("--draft_vocab_size", type=positive, help="tokens the draft can propose; none: all")
    add("--bf16", action=common.Switch, default=True, help="bf16 with fp32 master weights, on CPUs too")
    add("--trainer_flags", default="", help="further flags of train_eagle3.py, for all variants")
    add("--jobs", type=positive, default=1, help="trainings at a time, of one thread each")
    add = parser.add_argument_group("evaluation and output").add_argument
    add("--evaluations", type=positive, default=4, help="points of a curve")
    add("--num_draft_tokens", type=positive, default=7, help="drafts a pass, for all variants")
    add("--decode", type=natural, default=4, help="prompts that the first seed of each variant decodes; 0 = none")
    add("--references", nargs="+", default=["specforge_1e-3", "speculators", "eagle_1e-3"], help="compared with these")
    add("--output", default="recipes", help="folder to write")
    add("--table", action=common.Switch, help="no training: table and picture of what is there")
    args = parser.parse_args(argv)
    if bool(args.steps) == bool(args.seconds):
        common.fail("give either steps or seconds, the budget of each training")
    return args


def main(args):
    output = common.open_output(args.output)
    variants = choose_variants(args)
    refused = {}
    folder = budget_folder(args)
    if not args.table:
        write_data(args, output / "data")
        keep_settings(args, RUN_SETTINGS, folder)
        refused = train_all(args, variants)
        done = sorted(path.parent for path in folder.glob("*/seed_*/done.json"))
        decoded = [folder / name / f"seed_{args.seeds[0]}" for name in variants if args.decode]
        decoded = [path for path in decoded if path in done]
        walk(args, done)
        for path in decoded:
            decode(args, path)
        walk_decoded(args, decoded)
    runs = recipes_table.read_runs(folder)
    if not runs:
        common.fail(f"{folder} has no finished training")
    recipes_table.write(output, folder.name, runs, args.references, refused)


if __name__ == "__main__":
    main(parse_args())
