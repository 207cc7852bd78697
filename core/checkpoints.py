"""checkpoints."""

import functools
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from core import common, draft_files, ranks, vocabulary

STATE, RANKS, SHARDS = "trainer_state.json", "ranks.safetensors", "deepspeed"

GENERATORS = {"torch", "python", "numpy", "numpy_gauss", "cuda"}


@dataclass
class Progress:
    """Where a training is, beside what the engine holds. The last five are of the steps that are not logged yet."""

    step: int = 0  # optimizer steps finished, those left out as well
    seconds: float = 0.0  # since the training began, all starts together
    best: list = None  # [value, step, name of the metric] of the best checkpoint
    evaluation_due: bool = False  # at this step, and not done yet
    bad: int = 0  # steps left out in a row
    spent: float = 0.0  # seconds of the steps that are not logged yet
    sums: torch.Tensor = 0.0  # [K, 4], of this rank
    chains: torch.Tensor = 0.0  # of this rank
    tokens: torch.Tensor = 0.0  # of this rank
    norms: list = field(default_factory=list)

    def restart(self, ttt_length, device):
        """Begin to sum up anew."""
        self.sums = torch.zeros(ttt_length, 4, dtype=torch.float64, device=device)
        self.chains, self.tokens = self.sums.new_zeros(()), torch.zeros((), dtype=torch.float64)
        self.norms, self.spent = [], 0.0


def draft_tensors(engine, d2t):
    """The draft's tensors on rank 0 (CPU), an empty dict elsewhere; under ZeRO-3 all ranks take part."""
    draft = engine.module
    with deepspeed.zero.GatheredParameters(list(draft.parameters()), enabled=engine.zero_optimization_stage() == 3):
        if dist.get_rank() != 0:
            return {}
        tensors = {name: p.detach().to("cpu", copy=True) for name, p in draft.named_parameters()}
    vocab_size = draft.config["vocab_size"]
    if draft.config["draft_vocab_size"] < vocab_size:
        tensors |= {"d2t": d2t.cpu(), "t2d": torch.zeros(vocab_size, dtype=torch.bool)}
        tensors["t2d"][vocabulary.target_ids(tensors["d2t"])] = True
    return tensors


def engine_kind(config):
    """What of DeepSpeed's configuration decides whether shards that were written with it can be read."""
    zero = config.get("zero_optimization", {})
    place = zero.get("offload_optimizer", {}).get("device", "none")
    optimizer = {"none": "AdamW", "cpu": "DeepSpeedCPUAdam"}.get(place, "AdamW on nvme")
    precision = "bf16" if config["bf16"]["enabled"] else "fp32"
    return {"precision": precision, "optimizer": optimizer, "zero_stage": zero.get("stage", 0)}


def generator_states():
    """This rank's random number generators, as tensors by name."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1]),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_generators(states):
    """Undo what has happened since `generator_states`."""
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(states["numpy_gauss"])))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def sync(path):
    """Bring a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def measure_file(path):
    """[bytes, CRC-32] of a file."""
    crc = 0
    with path.open("rb") as file:
        for part in iter(lambda: file.read(2**24), b""):
            crc = zlib.crc32(part, crc)
    return [path.stat().st_size, crc]


def write_shards(engine, building):
    """DeepSpeed's shards of all ranks. What a rank cannot write is returned as text: it must not miss a collective."""
    writer, problems = engine.checkpoint_engine, []
    write = writer.save

    def save(state_dict, path):
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(building).free / 1e9
            problems.append(f"{path} cannot be written, {free:.3f} GB are free: {str(error).splitlines()[0]}")

    engine._copy_recovery_script = lambda folder: None  # scripts that belong to DeepSpeed, not to a checkpoint
    writer.save = save
    try:
        engine.save_checkpoint(building, SHARDS, {"universal_checkpoint_info": {}}, save_latest=False)
    finally:
        del writer.save
    return problems


def first_problem(problems):
    """The first problem of any rank, or None."""
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, problems)
    return next(itertools.chain.from_iterable(every), None)


def write_checkpoint(engine, d2t, folder, state, mine):
    """A complete checkpoint, visible only when it is whole. All ranks call it; None, or why there is none.

    state: JSON that is the same for all ranks; mine: this rank's tensors by name. A checkpoint that is there already
    stays, as it is of the same step; anything else of its name is put aside.
    """
    if ranks.on_first_rank(functools.partial(is_complete, folder)):
        return None
    first, world = dist.get_rank() == 0, dist.get_world_size()
    building, every, problems = folder.with_name(f".{folder.name}.building"), [None] * world, []
    dist.all_gather_object(every, {**mine, **generator_states()})
    tensors = draft_tensors(engine, d2t)
    if first:
        try:
            shutil.rmtree(building, ignore_errors=True)
            (building / SHARDS).mkdir(parents=True)
            draft_files.write_draft(building, engine.module.config, tensors)
            save_file(
                {f"{rank}.{name}": x for rank, part in enumerate(every) for name, x in part.items()}, building / RANKS
            )
        except (OSError, SafetensorError, SystemExit) as error:  # the last with a line of its own
            problems.append(f"{building} cannot be written: {error}")
    problem = first_problem(problems) or first_problem(write_shards(engine, building))
    if not problem:
        problem = publish(building, folder, state)
    if first and problem:
        shutil.rmtree(building, ignore_errors=True)
    return problem


def is_complete(folder):
    """Whether a whole checkpoint has this name. What else has it gets another one."""
    if not folder.exists():
        return False
    state = read_state(folder)
    if state and not find_damage(folder, state):
        return True
    aside = next(
        path for i in itertools.count() if not (path := folder.with_name(f"damaged_{i}_{folder.name}")).exists()
    )
    folder.rename(aside)
    print(f"{folder} is not a complete checkpoint: it is {aside} now", file=sys.stderr)
    return False


def publish(building, folder, state):
    """Give a checkpoint that is written its name; the ranks bring its files to the disk and measure them together."""
    rank, problems, files = dist.get_rank(), [], {}
    paths = ranks.on_first_rank(lambda: [path for path in building.rglob("*") if path.is_file()])
    every = [None] * dist.get_world_size()
    try:
        for path in paths[rank :: len(every)]:
            sync(path)
            files[str(path.relative_to(building))] = measure_file(path)
    except OSError as error:
        problems.append(f"{path} cannot be written: {error}")
    dist.all_gather_object(every, files)
    problem = first_problem(problems)
    if rank == 0 and not problem:
        files = {name: numbers for part in every for name, numbers in part.items()}
        try:
            common.write_atomic(building / STATE, json.dumps({**state, "files": files}, indent=1) + "\n")
            for path in (building / SHARDS, building):
                sync(path)
            building.rename(folder)
            sync(folder.parent)
        except OSError as error:
            problems.append(f"{building} cannot be written: {error}")
    return problem or first_problem(problems)


def write_final(engine, d2t, folder, files):
    """The draft alone, with files {name: text}, in the place of what `folder` has. Ends the program if it cannot."""
    tensors = draft_tensors(engine, d2t)

    def write():
        building, old = (folder.with_name(f".{folder.name}.{what}") for what in ("building", "old"))
        try:
            for path in (building, old):
                shutil.rmtree(path, ignore_errors=True)
            draft_files.write_draft(building, engine.module.config, tensors)
            for name, text in files.items():
                common.write_atomic(building / name, text)
            if folder.exists():
                folder.rename(old)
            building.rename(folder)
            sync(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(building, ignore_errors=True)
            common.fail(f"{folder} cannot be written: {error}")

    ranks.on_first_rank(write)


def step_folder(output_dir, step):
    return Path(output_dir) / f"step_{step:08d}"


def link_newest(folder, best):
    """The links beside a checkpoint: `latest` to it, and `best` to that of best = [value, step, name] or None.

    On storage without symbolic links, as that of services may be, files with the checkpoint's name.
    """
    names = {"latest": folder.name} | ({"best": step_folder("", best[1]).name} if best else {})
    for name, target in names.items():
        if folder.with_name(target).exists():
            new = folder.with_name(f".{name}.building")
            new.unlink(missing_ok=True)
            try:
                new.symlink_to(target)
            except OSError:
                new.write_text(target)
            new.replace(folder.with_name(name))


def remove_old(output_dir, limit, best):
    """Remove the oldest checkpoints beyond `limit`, on one rank. The best stays, and folders with files of others."""
    for folder in checkpoints(output_dir)[limit:]:
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
        ours = {STATE, *(read_state(folder) or {"files": ()})["files"]}
        if there == ours and not (best and folder.name == step_folder("", best[1]).name):
            gone = folder.with_name(f".{folder.name}.building")  # no checkpoint any more, at once
            folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def save_step(engine, d2t, args, progress, record=None):
    """output_dir/step_XXXXXXXX with `latest`. Returns the folder, or None after a line if it cannot be written."""
    folder, within = step_folder(args.output_dir, progress.step), progress.step % args.steps_per_epoch
    state = {
        "step": progress.step, "epoch": progress.step / args.steps_per_epoch,
        "rows_read_in_epoch": within * args.draft_global_batch_size, "seconds": progress.seconds, "best": progress.best,
        "evaluation_due": progress.evaluation_due, "spent": progress.spent, "world_size": dist.get_world_size(),
        "norms": [float(norm) for norm in progress.norms if norm is not None], "flags": vars(args),
    }  # fmt: skip
    mine = {name: torch.as_tensor(getattr(progress, name)).cpu() for name in ("sums", "chains", "tokens")}
    lost = record.keep() if record else ""
    problem = first_problem([lost] if lost else []) or write_checkpoint(engine, d2t, folder, state, mine)
    if dist.get_rank() == 0 and problem:
        print(f"no checkpoint at step {progress.step}, what was saved before stays: {problem}", file=sys.stderr)
    elif dist.get_rank() == 0:
        try:
            link_newest(folder, progress.best)
            if args.save_total_limit:
                remove_old(args.output_dir, args.save_total_limit, progress.best)
        except OSError as error:
            print(f"{folder} is whole, but: {error}", file=sys.stderr)
    return None if problem else folder


def checkpoints(output_dir):
    """The folders step_*, the newest first."""
    return sorted(
        (path for path in Path(output_dir).glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)),
        key=lambda path: int(path.name[5:]),
        reverse=True,
    )


def read_state(folder):
    """trainer_state.json of a complete checkpoint, or None."""
    try:
        state = json.loads((Path(folder) / STATE).read_text())
        return state if {"step", "files", "flags", "world_size"} <= state.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def find_damage(folder, state):
    """What is wrong with a checkpoint's files; empty if nothing is."""
    for name, numbers in state["files"].items():
        try:
            if measure_file(Path(folder) / name) != numbers:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def find_checkpoint(folders):
    """(folder, state) of the first of these folders that is whole; those that are not are named. Twice None if none."""
    for folder in folders:
        state = read_state(folder)
        wrong = find_damage(folder, state) if state else f"{STATE} cannot be read"
        if not wrong:
            return folder, state
        print(f"{folder} is not a complete checkpoint, it is passed over: {wrong}", file=sys.stderr)
    return None, None


def find_state(args):
    """With --resume the trainer_state.json to go on from; its folder becomes resume_from_checkpoint. None: from step 0.

    The newest complete checkpoint of output_dir comes first, then resume_from_checkpoint.
    """
    if not args.resume or args.no_resume_from_checkpoint:
        return None
    given = args.resume_from_checkpoint
    elsewhere = [Path(given)] if given and (Path(given) / STATE).exists() else []
    folder, state = find_checkpoint(checkpoints(args.output_dir) + elsewhere)
    if not folder:
        rest = f"from the weights of {given}" if given else "from the beginning"
        print(f"resume: {args.output_dir} has no complete checkpoint, the training starts {rest}", file=sys.stderr)
        return None
    if folder not in elsewhere:  # an interruption may have come before them
        link_newest(folder, state["best"])
    args.resume_from_checkpoint, flags = str(folder), state["flags"]
    rest = "or start from its weights without --resume"
    for name in ("seed", "draft_global_batch_size", "ttt_length"):
        if flags[name] != getattr(args, name):
            common.fail(
                f"{folder} was trained with {name} {flags[name]}, not {getattr(args, name)}: they decide what its "
                f"remaining steps are; give the same, {rest}"
            )
    before, now = flags["engine"], args.engine
    if "nvme" in before["optimizer"]:
        common.fail(
            f"{folder} was trained with optimizer states on nvme, of which DeepSpeed restores only a part: start from "
            "its weights without --resume"
        )
    for name in ("precision", "optimizer"):
        if before[name] != now[name]:
            common.fail(
                f"{folder} was trained with {name} {before[name]}, deepspeed_config means {now[name]}: give the same, "
                f"{rest}"
            )
    stages = {before["zero_stage"], now["zero_stage"]}
    if len(stages) > 1 and stages != {1, 2}:
        stage, other = before["zero_stage"], now["zero_stage"]
        common.fail(
            f"{folder} was trained with ZeRO stage {stage}, deepspeed_config has stage {other}: DeepSpeed converts "
            f"only 1 and 2 into one another; give one that fits, {rest}"
        )
    return state


def remove_leftovers(output_dir):
    """Remove what an interruption left half-written or half-removed; while nobody writes."""
    for path in Path(output_dir).glob(".*.building"):
        path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


def read_shards(engine, args, state):
    """Weights, fp32 masters and optimizer of a checkpoint, whatever the number of ranks that wrote it."""
    folder, stage = Path(args.resume_from_checkpoint), args.engine["zero_stage"]
    same = (state["world_size"], state["flags"]["engine"]["zero_stage"]) == (dist.get_world_size(), stage)
    if same or stage == 0:  # which has no shards
        path, _ = engine.load_checkpoint(str(folder), SHARDS)
    else:
        other = Path(args.output_dir) / ".universal.building"

        def convert():
            shutil.rmtree(other, ignore_errors=True)
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
                       "--input_folder", folder / SHARDS, "--output_folder", other / SHARDS]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
                common.fail(f"{folder / SHARDS} cannot be converted for {dist.get_world_size()} ranks: {said[0]}")

        ranks.on_first_rank(convert)
        engine._config.load_universal_checkpoint = True
        path, _ = engine.load_checkpoint(str(other), SHARDS)
        engine._config.load_universal_checkpoint = False
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(other, ignore_errors=True)
    if not path:
        common.fail(f"DeepSpeed finds nothing to load in {folder / SHARDS}")


def read_ranks(folder, state):
    """This rank's tensors {name: tensor} of `write_checkpoint`, and its generators are set as they were.

    On another number of ranks rank 0 gets the sums over the ranks that there were, the others zeros.
    """
    tensors, rank = load_file(Path(folder) / RANKS), dist.get_rank()
    every = [{} for _ in range(state["world_size"])]
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        every[int(number)][name] = tensor
    if state["world_size"] == dist.get_world_size():
        set_generators(every[rank])
        return every[rank]
    names = every[0].keys() - GENERATORS
    return {name: sum(part[name] for part in every) * (rank == 0) for name in names}


def resume(engine, args, state):
    """The Progress of a checkpoint; the engine and the random number generators get what it holds."""
    read_shards(engine, args, state)
    names = "step", "seconds", "best", "evaluation_due", "spent", "norms"
    progress = Progress(**{name: state[name] for name in names})
    mine = read_ranks(args.resume_from_checkpoint, state)
    progress.sums, progress.chains = mine["sums"].to(engine.device), mine["chains"].to(engine.device)
    progress.tokens = mine["tokens"]
    return progress
