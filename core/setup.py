"""Setup: what can go wrong before a model loads, and what follows from the flags and the data.

Each function checks or derives one thing and ends the program with one line if it cannot. `args` is read-only from then
on: what is derived is a `Run` beside it.
"""

import contextlib
import math
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from core import (
    checkpoints,
    common,
    conversation_files,
    dataloader,
    draft_files,
    optimization,
    serving,
    slots,
    states,
    target_files,
    target_model,
    vocabulary,
)

PATHS = ("data_path", "token_freq_path", "d2t_path", "t2d_path")  # flags that name a file or folder to read

EVALUATING = ("save_best", "best_metric", "eval_interval", "eval_steps")  # flags that only a validation split gives use

POSITIVE = common.at_least(int, 1)
NATURAL = common.at_least(int, 0)
NOT_NEGATIVE = common.at_least(float, 0)


@dataclass(frozen=True)
class Run:
    """What follows from the flags and the data of a training; the same on every rank."""

    dp_size: int  # groups of ranks that share a copy of the target
    target_sharding: str  # how they share it: none, tp or zero3
    draft_micro_batch_size: int  # sequences per rank in one forward of the draft
    draft_accumulation_steps: int  # micro-batches per rank in one optimizer step
    steps_per_epoch: int  # optimizer steps
    total_steps: int
    scheduler_warmup_steps: int
    scheduler_total_steps: int
    engine: dict  # checkpoints.engine_kind of DeepSpeed's configuration
    fingerprints: dict  # of the data and the target
    resume_from_checkpoint: str | None  # folder that the training continues or the draft starts from

    def flags(self, args):
        """The flags as run.json and checkpoints keep them: what is derived in the place of what was given."""
        return vars(args) | asdict(self)

    def is_due(self, step, epochs, steps):
        """Whether something is due after `step`: at the end, every `epochs` epochs, every `steps` steps (0 = never)."""
        if step == self.total_steps or step % (epochs * self.steps_per_epoch) == 0:
            return True
        return steps > 0 and step % steps == 0


# ==================== Flags ==========================================================================================


def add_batch_flags(add):
    """The flags of batches that every trainer has; add: the add_argument of their group."""
    add("--num_epochs", type=POSITIVE, default=2, help="passes over the data")
    add("--total_steps", type=int, default=-1, help="optimizer steps; positive: instead of num_epochs, data repeat")
    add("--draft_global_batch_size", type=POSITIVE, default=8, help="sequences a step, all ranks")
    add("--draft_micro_batch_size", type=POSITIVE, default=1, help="sequences a rank in one forward")
    budget = "tokens of a micro-batch, instead of draft_micro_batch_size; 0 = off"
    add("--total_seq_len", type=NATURAL, default=0, help=budget)
    add("--draft_accumulation_steps", type=int, help="derived: global / (micro x ranks); another value is replaced")
    add("--num_workers", type=NATURAL, default=2, help="processes per rank that read ahead; 0 = none")
    add("--prefetch_factor", type=POSITIVE, default=4, help="optimizer steps that each reads ahead")
    add("--gradient_checkpointing", action=common.Switch, help="recompute the draft's layer in the backward pass")


def add_run_flags(add):
    """The flags that every trainer has; add: the add_argument of their group."""
    config = str(Path(__file__).resolve().parents[1] / "ds_configs" / "zero2.json")
    metrics = ("acceptance_length", "loss")
    add("--output_dir", default="./output", help="where everything is written")
    add("--log_steps", type=POSITIVE, default=50, help="optimizer steps between two log lines")
    add("--eval_interval", type=POSITIVE, default=1, help="epochs; the end is always evaluated")
    add("--save_interval", type=POSITIVE, default=1, help="epochs; the end is always saved")
    add("--eval_steps", type=NATURAL, default=0, help="optimizer steps; 0 = by epoch only")
    add("--save_steps", type=NATURAL, default=0, help="optimizer steps; 0 = by epoch only")
    add("--save_minutes", type=NOT_NEGATIVE, default=0, help="minutes between checkpoints; 0 = off")
    add("--save_total_limit", type=NATURAL, default=0, help="newest checkpoints kept, and the best; 0 = all")
    add("--save_best", action=common.Switch, help="save whenever best_metric is the best so far; `best` links to it")
    add("--best_metric", choices=metrics, default=metrics[0], help="of the validation split; a tie: the lower loss")
    add("--max_bad_steps", type=POSITIVE, default=10, help="non-finite steps in a row that end the run")
    add("--resume", action=common.Switch, help="continue the newest complete checkpoint of output_dir, if there is one")
    add(
        "--resume_from_checkpoint",
        help="with resume: if output_dir has none; without: draft to start from; or a run's folder",
    )
    add("--no_resume_from_checkpoint", action=common.Switch, help="start anew, even with resume; an old run is moved")
    add("--report_to", default="none", help="none, swanlab, wandb, tensorboard, mlflow, trackio; several by comma")
    add("--run_name", help="name of the run in the trackers; none: theirs")
    add("--log_dir", help="folder of the trackers' files; none: output_dir/logs")
    add("--seed", type=common.SEED, default=0, help="of initialisation and data order")
    add("--deterministic", action=common.Switch, help="GPU kernels that give the same bits in every run; slower")
    add("--dist_timeout", type=common.above_zero, default=20, help="minutes a collective may take")
    add("--deepspeed_config", default=config, help="ZeRO, precision, offload")
    add("--local_rank", type=int, default=-1, help="set by the launcher; -1 = from LOCAL_RANK")


@contextlib.contextmanager
def deterministic(wanted):
    """Kernels that give the same bits in every run, if wanted; CPUs have no others.

    Ends the program with a line where PyTorch has none. The variable counts if it is set before CUDA starts.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # DeepSpeed's padding must not become NaN
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if not wanted or "deterministic" not in str(error):
            raise
        common.fail(f"deterministic: {str(error).splitlines()[0]}: drop the flag")
    finally:
        if wanted:
            torch.use_deterministic_algorithms(False)


def check_flags(args):
    """End the program if flags contradict each other or the output folder; needs neither data nor a model."""
    if bool(args.d2t_path) != bool(args.t2d_path):
        common.fail("d2t_path and t2d_path belong together: give both or neither")
    has_data = bool(args.data_path or args.dataset_train_split)
    if (args.data_path and args.dataset_train_split) or not (has_data or args.dry_run):
        common.fail("give either dataset_train_split (conversations) or data_path (a folder of prepare_data.py)")
    if not has_data:
        check_without_data(args)
    if args.data_path and args.dataset_validation_split:
        common.fail("data_path brings its own validation split: drop dataset_validation_split")
    if args.data_path and (
        given := [name for name, value in conversation_files.read_flags(args).items() if value is not None]
    ):
        common.fail(f"{given[0]} is for conversations, data_path is prepared already: drop it")
    for name in PATHS:
        path = getattr(args, name)
        if path and not Path(path).exists():
            common.fail(f"{name} {path} does not exist")


def check_without_data(args):
    """End the program if a dry run without data has flags that need them."""
    for name in ("dataset_validation_split", "hidden_states_path", "vllm_endpoint"):
        if getattr(args, name):
            common.fail(f"{name} belongs to data: give dataset_train_split or data_path as well, or drop it")


def check_unread(args, default):
    """End the program, or print a line, if a given flag has no effect beside the others.

    default: {flag: its default}.
    """
    states.check_source_flags(args, default)
    given = {name for name, value in default.items() if getattr(args, name) != value}
    optimization.check_flags(args, given)
    if args.token_freq_path and args.d2t_path:
        common.fail("d2t_path and t2d_path are a complete mapping: drop token_freq_path, which one is built from")
    if args.total_seq_len and "draft_micro_batch_size" in given:
        common.fail("total_seq_len takes the place of draft_micro_batch_size: drop one of them")
    if args.scheduler_warmup_steps and args.warmup_ratio and "warmup_ratio" in given:
        common.fail("scheduler_warmup_steps takes the place of warmup_ratio: drop one of them")
    if args.scheduler_type != "cosine" and "scheduler_num_cosine_cycles" in given:
        common.fail(
            f"scheduler_num_cosine_cycles applies only to scheduler_type cosine, not {args.scheduler_type}: drop it"
        )
    if args.scheduler_type == "constant" and args.scheduler_total_steps:
        common.fail("scheduler_total_steps: scheduler_type constant has no end: drop it, or give total_steps")
    if not args.report_to and "run_name" in given:
        print("run_name is read by trackers alone, and report_to names none")


def check_validation(args, data, default):
    """Print a line if flags ask for evaluations of data without a validation split."""
    asked = [name for name in EVALUATING if getattr(args, name) != default[name]]
    if asked and "validation" not in data:
        print(f"{', '.join(asked)}: the data have no validation split, so nothing is evaluated and there is no best")


def check_output(args):
    """Whether output_dir holds an earlier run that has to be moved aside.

    Ends the program if it does and the flags ask neither to continue that run nor to move it. A dry run alone is moved
    unasked: the same flags make it again.
    """
    output = Path(args.output_dir)
    held = [path.name for path in output.glob("*") if re.fullmatch(r"metrics.jsonl|final|step_\d+", path.name)]
    if not held or (args.resume and not args.no_resume_from_checkpoint):
        return False
    if args.no_resume_from_checkpoint or held == [checkpoints.step_folder("", 0).name]:
        return True
    common.fail(
        f"output_dir {output} holds a run ({', '.join(sorted(held)[:3])}): continue it with --resume, move it aside "
        "with --no_resume_from_checkpoint, or give another folder"
    )


def micro_batch_size(args):
    """Sequences per rank in one forward of the draft; 1 with a budget of tokens, which DeepSpeed does not know."""
    return 1 if args.total_seq_len else args.draft_micro_batch_size


def accumulation_steps(args, world):
    """Micro-batches per rank in one optimizer step."""
    micro = micro_batch_size(args) * world
    batch = args.draft_global_batch_size
    steps = math.ceil(batch / micro)
    if batch % micro and not args.total_seq_len:
        fitting = [str(n) for n in (batch // micro * micro, steps * micro) if n]
        common.fail(
            f"draft_global_batch_size {batch} is not a multiple of draft_micro_batch_size "
            f"{args.draft_micro_batch_size} x {world} ranks = {micro}; nearest that fit: {' or '.join(fitting)}"
        )
    if args.draft_accumulation_steps not in (None, steps):
        print(f"draft_accumulation_steps {args.draft_accumulation_steps} is replaced by {steps}")
    return steps


# ==================== The draft and its data =========================================================================


def draft_source(args, checkpoint, state, fresh):
    """(checkpoint, configuration): the draft whose weights are read, and the file or folder that configures a new one.

    Both are None for a new draft with the derived configuration. checkpoint: a draft, or None; state: its
    trainer_state.json if the training continues it. fresh: {flag: value that only a new draft can have}.
    """
    if state:
        return checkpoint, None
    if not checkpoint:
        return None, args.draft_model_config
    if args.draft_model_config:
        common.fail(f"resume_from_checkpoint {checkpoint} has a draft's configuration: drop draft_model_config")
    if draft_files.has_weights(checkpoint):
        for name, value in fresh.items():
            if getattr(args, name) == value:
                common.fail(f"{name} {value}: the draft {checkpoint} brings its own: drop it")
        print(f"the training starts from the weights of {checkpoint}")
        return checkpoint, None
    print(f"{checkpoint} has a config.json alone: fresh weights")
    return None, checkpoint


def say_notes(config, text_config):
    """Print what an engine cannot serve as it is trained."""
    window = max(draft_files.windows(config))
    for note in serving.serving_notes(config):
        print(f"note: {note}")
    targets = getattr(text_config, "sliding_window", None)
    kinds = getattr(text_config, "layer_types", None) or ["sliding_attention"]
    if targets and targets != window and set(kinds) == {"sliding_attention"}:
        print(
            f"note: vLLM gives this draft the window of its target, {targets}: train it with --sliding_window {targets}"
        )


def check_data(args, config, folder, data, data_config, world, predictions=1):
    """End the program if the prepared data in `folder` do not fit the target, the flags or the ranks.

    config: the draft's, whose vocab_size is the target's; predictions: that a slot needs to be trained.
    """
    tokenizer = target_files.load_tokenizer(args.target_model_path, args.trust_remote_code)
    if data_config["ingredients"]["tokenizer"] != target_files.hash_tokenizer(tokenizer):
        common.fail(
            f"{folder} was prepared with another tokenizer or chat template than the target's: prepare it again"
        )
    dataloader.check_tokens(folder, data, data_config, config["vocab_size"])
    names = data_config["chat_templates"]
    if args.chat_template not in (None, "auto", *names):
        common.fail(
            f"{folder} was prepared with --chat_template {' or '.join(names)}, not {args.chat_template}: prepare it "
            "again, or leave --chat_template out"
        )
    longest = {split: part["longest"] for split, part in data_config["splits"].items()}
    most = max(longest.values())
    if most > args.max_length:
        common.fail(f"{folder} has rows of {most} tokens, max_length is {args.max_length}: give --max_length {most}")
    if 0 < args.total_seq_len < longest["train"]:
        common.fail(
            f"total_seq_len {args.total_seq_len} is less than the {longest['train']} tokens of a row of {folder}"
        )
    rows = len(data["train"])
    useful = slots.check_slots(folder, data["train"], predictions)
    if predictions > 1 and useful < rows:
        without = f"{rows - useful} of {rows} rows"
        print(f"{without} have no reply with {predictions + 1} tokens in a row: they teach nothing")
    if rows < world:
        common.fail(f"{rows} training sequences for {world} ranks: a rank would have none")


def vocabulary_mapping(args, config, folder, checkpoint):
    """d2t, int64 [Vd] offsets: the checkpoint's, from the files of the flags, or by the token counts of the data."""
    if not checkpoint:
        sizes = (config["draft_vocab_size"], config["vocab_size"])
        if args.token_freq_path and sizes[0] == sizes[1]:
            common.fail("token_freq_path is read to choose draft_vocab_size tokens: give that too, or drop it")
        if not folder and sizes[0] < sizes[1] and not (args.token_freq_path or args.d2t_path):
            common.fail(
                f"draft_vocab_size {sizes[0]} of {sizes[1]} without data: give token_freq_path, or d2t_path and "
                "t2d_path, or data"
            )
        counts = args.token_freq_path or Path(folder or "") / "token_freq.pt"
        return vocabulary.choose_mapping(*sizes, counts, args.d2t_path, args.t2d_path)
    _, tensors = draft_files.read_draft(checkpoint)
    d2t = tensors.get("d2t", torch.zeros(config["vocab_size"], dtype=torch.int64))
    if args.d2t_path or args.token_freq_path or args.draft_vocab_size not in (None, len(d2t)):
        print(f"the vocabulary mapping of {checkpoint} ({len(d2t)} tokens) is kept")
    return d2t


class Schedule(NamedTuple):
    """Optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    scheduler_warmup_steps: int
    scheduler_total_steps: int


def schedule(args, rows, default):
    """The Schedule of a training on `rows` sequences; 0 in a dry run, which takes no step.

    default: {flag: its default}.
    """
    per_epoch = max(math.ceil(rows / args.draft_global_batch_size), 1)
    total = args.total_steps if args.total_steps > 0 else args.num_epochs * per_epoch
    warmup = args.scheduler_warmup_steps
    if warmup is None or (warmup == 0 and args.warmup_ratio != default["warmup_ratio"]):  # others' default is 0 steps
        warmup = math.ceil(args.warmup_ratio * total)
    until = args.scheduler_total_steps or total
    if rows and warmup > until:
        common.fail(f"warm-up of {warmup} steps in a schedule of {until} steps")
    return Schedule(per_epoch, total, warmup, until)


# ==================== A training that is continued ===================================================================

# Flags that have to stay: they decide what the remaining steps of a training are.
DECISIVE = ("seed", "draft_global_batch_size", "muon_adjust_lr_fn")  # of every trainer
# Flags that may differ between the starts of one training without a word.
FREE = ("resume", "resume_from_checkpoint", "output_dir", "local_rank", "build_dataset_num_proc", "engine")


def check_resume(flags, run, folder, model_dir, state):
    """End the program if a checkpoint's data or target were others, or if it lacks an average; print what flags differ.

    flags: the resolved ones of this start; folder: of the prepared data; state: the checkpoint's trainer_state.json.
    """
    places = {"data": folder, "target": model_dir}
    checkpoint = run.resume_from_checkpoint
    remedy = "start from its weights without --resume"
    target_files.check_version(checkpoint, state["flags"]["fingerprints"]["target"], remedy)
    for name, fingerprint in run.fingerprints.items():
        before = state["flags"]["fingerprints"][name]
        if before not in (fingerprint, None):  # None: a dry run without data
            common.fail(f"{checkpoint} was trained with another {name} than {places[name]}: give the same, or {remedy}")
    if state["step"] and flags["ema_decay"] and not state["flags"].get("ema_decay"):
        common.fail(f"{checkpoint} has no average of its {state['step']} steps: give --ema_decay 0, or {remedy}")
    if state["step"] > run.total_steps:
        print(f"{checkpoint} has {state['step']} steps, total_steps is {run.total_steps}: nothing is left to train")
    changed = []
    for name, before in state["flags"].items():
        now = flags.get(name, before)
        if name not in FREE and now != before:
            changed.append(f"{name} {before} -> {now}")
    if changed:
        print(f"flags that differ from those of {checkpoint}: {', '.join(changed)}")


# ==================== All of it =======================================================================================


class Setup(NamedTuple):
    """What rank 0 finds out for all ranks before a model loads."""

    run: Run
    deepspeed_config: dict
    draft_config: dict
    layers: list  # auxiliary layers
    data_folder: str | None  # none: a dry run without data
    d2t: torch.Tensor  # [Vd]
    state: dict | None  # trainer_state.json of the checkpoint that is continued


def prepare(args, default, prepare_conversations, trainer):
    """Everything that can go wrong before a model loads, on rank 0; the Setup of all ranks.

    default: {flag: its default}; prepare_conversations(args) -> the folder of prepared data. trainer: the module with
    what belongs to one kind of drafts: DECISIVE, FRESH, check_flags, configure_draft, check_shape and predictions, as
    draft_config.
    """
    # --- flags ---
    world = dist.get_world_size()
    holds_old = check_output(args)
    check_flags(args)
    trainer.check_flags(args, default)
    check_unread(args, default)
    sharding = target_model.resolve_sharding(args, world)
    micro = micro_batch_size(args)
    accumulation = accumulation_steps(args, world)
    deepspeed_config = optimization.engine_config(args, micro, accumulation)
    engine = checkpoints.engine_kind(deepspeed_config, args.optimizer)
    if "nvme" in engine["optimizer"]:
        print("optimizer states on nvme: DeepSpeed restores only a part of them, this training cannot be resumed")

    # --- draft ---
    start, state = checkpoints.find_start(args, engine, DECISIVE + trainer.DECISIVE)
    if args.resume and not state and checkpoints.checkpoints(args.output_dir):  # none of them is complete
        holds_old = True
    checkpoint, source = draft_source(args, start, state, trainer.FRESH)
    model_dir = target_files.resolve_target(args.target_model_path)
    text_config, target_config = target_files.read_target_config(model_dir, args.trust_remote_code)
    target_model.check_heads(text_config, args.tp_size)
    target_model.check_weights(model_dir, target_config, args.trust_remote_code)
    config, layers = trainer.configure_draft(args, model_dir, text_config, target_config, checkpoint, source)
    trainer.check_shape(args, config)
    say_notes(config, text_config)

    # --- data ---
    folder = args.data_path
    if args.dataset_train_split:
        folder = prepare_conversations(args)
    data, data_config = dataloader.open_data(folder)
    if folder:
        dataloader.check_files(folder, data_config)
    if folder:
        check_data(args, config, folder, data, data_config, world, trainer.predictions(config))
        check_validation(args, data, default)
    d2t = vocabulary_mapping(args, config, folder, checkpoint)
    config["draft_vocab_size"] = len(d2t)

    # --- run ---
    steps = schedule(args, len(data.get("train", ())), default)
    run = Run(
        dp_size=world // args.tp_size,
        target_sharding=sharding,
        draft_micro_batch_size=micro,
        draft_accumulation_steps=accumulation,
        engine=engine,
        fingerprints={"data": data_config["fingerprint"], "target": target_files.hash_target(model_dir)},
        resume_from_checkpoint=checkpoint,
        **steps._asdict(),
    )
    if state:
        check_resume(run.flags(args), run, folder, model_dir, state)
    checkpoints.remove_leftovers(args.output_dir)
    if holds_old:
        moved = checkpoints.move_aside(args.output_dir, checkpoint)
        run = replace(run, resume_from_checkpoint=moved)
    return Setup(run, deepspeed_config, config, layers, folder, d2t, state)
