"""Checkpoints: written complete or not at all, found again, kept up to a limit, and read on another number of ranks.

Beside DeepSpeed's shards a checkpoint holds tensors by name, with a rule for another number of ranks:
- sums, one per rank: rank 0 gets the sum over the ranks that wrote them, the others zeros;
- averages of the weights, the same on every rank: every rank gets them;
- states of the random number generators, one set per rank: only for the same number of ranks.

How the model itself is written is up to the trainer: `write_draft(folder, tensors)` on rank 0.

    step_XXXXXXXX/trainer_state.json   Progress, flags, size and CRC-32 of every file, a hash of all this; written last
    step_XXXXXXXX/deepspeed/           DeepSpeed's shards, and ranks.safetensors: the tensors above
    step_XXXXXXXX/...                  what write_draft writes
"""

import contextlib
import datetime
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from core import common, ranks, waits

STATE = "trainer_state.json"
RANKS = "deepspeed/ranks.safetensors"  # engines that serve the folder read each *.safetensors beside config.json
SHARDS = "deepspeed"
CONVERSION = 3600  # seconds that shards may take to be converted for another number of ranks
STEP = r"step_\d{8,}"  # a checkpoint's name
OF_A_RUN = (  # names in output_dir, without prepared data and hidden states
    r"run\.json|(damaged_\d+_)?metrics\.jsonl|curves\.png|source.*\.diff|train_.*\.py|logs|final|"
    r"((damaged|copied)_\d+_)?(latest|best|step_\d+)"
)

# ==================== Progress =======================================================================================


@dataclass
class Progress:
    """Where a training is, beside what the engine holds."""

    step: int = 0  # optimizer steps finished, including those left out
    seconds: float = 0.0  # since the training began, over all starts
    best: list = None  # [value, step, name of the metric, loss] of the best checkpoint
    evaluation_due: bool = False  # at this step, and not done yet
    bad: int = 0  # steps left out in a row
    average: dict = field(default_factory=dict)  # averaged weights, fp32 by name, the same on every rank

    # Of the steps that are not logged yet:
    spent: float = 0.0  # seconds
    norms: list = field(default_factory=list)  # gradient norms
    sums: dict = field(default_factory=dict)  # float64 tensors by name, of this rank

    def add(self, sums):
        """Add one step's sums {name: tensor}."""
        self.sums = {name: self.sums.get(name, 0) + value for name, value in sums.items()}

    def count(self, batches, sums, problem, norm):
        """Count an optimizer step: its sums, tokens and gradient norm (None under ZeRO 0), or that it is skipped."""
        tokens = sum(len(batch.input_ids) for batch in batches)
        sums["tokens"] = sums["total"].new_full((), tokens)
        if problem:
            self.bad += 1
            sums = {name: torch.zeros_like(value) for name, value in sums.items()}
        else:
            self.bad = 0
            self.norms.append(norm)
        self.add(sums)

    def restart(self):
        """Begin a new interval between two log lines."""
        self.sums = {}
        self.norms = []
        self.spent = 0.0


def better(values, best, step, metric):
    """[value, step, metric, loss] of an evaluation {name: value} if it is the best so far, else None.

    best: that of the best one before, or None.
    """
    found = [values[metric], step, metric, values["loss"]]
    if not math.isfinite(found[0]) or not math.isfinite(found[3]):
        return None
    if best and best[2] == metric and order(found) <= order(best):
        return None
    return found


def order(best):
    """What is higher for a better evaluation. Equal acceptance lengths, as at the start, are decided by the loss."""
    value, _, metric, *rest = best
    if metric == "loss":
        return (-value,)
    loss = rest[0] if rest else math.inf  # older checkpoints do not have it
    return (value, -loss)


def seed_generators(seed):
    """Seed all of them: transformers' set_seed would import every trainer's package."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator_states():
    """This rank's random number generators, as tensors by name."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1]),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generators(states):
    """Set the generators to `generator_states`."""
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(states["numpy_gauss"])))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# ==================== What is written ================================================================================


def full_tensors(engine):
    """The model's parameters by name on rank 0 (CPU), {} elsewhere; under ZeRO-3 all ranks take part."""
    import deepspeed  # slow, and not needed to find checkpoints

    model = engine.module
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=engine.zero_optimization_stage() == 3):
        if dist.get_rank() != 0:
            return {}
        return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


def served_tensors(engine, progress):
    """The draft to be served, as `full_tensors`: averaged weights that the training keeps take the weights' place."""
    tensors = full_tensors(engine)
    for name in tensors.keys() & progress.average.keys():
        tensors[name] = progress.average[name].to("cpu", tensors[name].dtype, copy=True)
    return tensors


def engine_kind(config, optimizer):
    """What decides whether DeepSpeed's shards can be read: its configuration and the flag `optimizer`."""
    zero = config.get("zero_optimization", {})
    device = zero.get("offload_optimizer", {}).get("device", "none")
    optimizers = {"none": "AdamW", "cpu": "DeepSpeedCPUAdam"}
    adamw = optimizers.get(device, "AdamW on nvme")
    return {
        "precision": "bf16" if config["bf16"]["enabled"] else "fp32",
        "optimizer": f"Muon with {adamw}" if optimizer == "muon" else adamw,
        "zero_stage": zero.get("stage", 0),
    }


def sync(path):
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def first_problem(problem):
    """The first problem of any rank, or "". All ranks call it with their own, "" if there is none."""
    return next(filter(None, ranks.gather(problem)), "")


def copy_shards(engine, building):
    """[(path, state)] that DeepSpeed would write on this rank, copied to the host's memory. All ranks call it."""
    writer = engine.checkpoint_engine
    copied = []

    def copy(state_dict, path):
        copied.append((Path(path), common.map_parts(state_dict, torch.Tensor, to_host)))

    engine._copy_recovery_script = lambda folder: None  # scripts that belong to DeepSpeed, not to a checkpoint
    writer.save = copy
    try:
        engine.save_checkpoint(building, SHARDS, {"universal_checkpoint_info": {}}, save_latest=False)
    finally:
        del writer.save
    return copied


def to_host(tensor):
    """A copy of a tensor in the host's memory, which the training does not change."""
    return tensor.detach().to("cpu", copy=True)


def write_tensors(path, averages, gathered):
    """ranks.safetensors: averages, and sums and generators of every rank (gathered: [{name: tensor}])."""
    tensors = {f"same.{name}": tensor for name, tensor in averages.items()}
    for rank, own in enumerate(gathered):
        for name, tensor in own.items():
            tensors[f"{rank}.{name}"] = tensor
    save_file(tensors, path)


def own_tensors(progress):
    """This rank's sums and generators by name."""
    tensors = {f"sum.{name}": to_host(torch.as_tensor(value)) for name, value in progress.sums.items()}
    for name, tensor in generator_states().items():
        tensors[f"generator.{name}"] = tensor
    return tensors


class Saving:
    """A checkpoint that is being written: a thread of each rank writes what is given as copies.

    `publish` gives it its name. A complete checkpoint of this name stays, as it is of the same step; anything else of
    this name is renamed. All ranks make it and publish it; state: JSON, the same on all ranks.
    """

    def __init__(self, engine, folder, state, progress, write_draft):
        self.folder = folder
        self.building = folder.with_name(f".{folder.name}.building")
        self.state = state
        self.measured = {}  # {name: common.measure_file} of this rank's files
        self.problem = ""
        self.thread = threading.Thread(target=self.write, daemon=True)  # storage that hangs does not hold up the exit
        self.is_there = ranks.on_first_rank(lambda: is_complete(folder))
        if self.is_there:
            return
        self.is_main = dist.get_rank() == 0
        if self.is_main:
            self.make_folder()
        self.problem = first_problem(self.problem)
        if self.problem:
            return
        self.gathered = ranks.gather(own_tensors(progress))
        self.tensors = served_tensors(engine, progress)
        self.averages = {name: to_host(tensor) for name, tensor in progress.average.items()}
        self.shards = copy_shards(engine, self.building)
        self.write_draft = write_draft
        self.save = engine.checkpoint_engine.save
        self.thread.start()

    def make_folder(self):
        try:
            shutil.rmtree(self.building, ignore_errors=True)
            (self.building / SHARDS).mkdir(parents=True)
        except OSError as error:
            self.problem = f"{self.building} cannot be written: {error}"

    def write(self):
        """Write, flush and measure this rank's files; in the thread."""
        self.problem = f"{self.building} was not finished"  # whatever ends the thread
        try:
            if self.is_main:
                self.write_draft(self.building, self.tensors)
                write_tensors(self.building / RANKS, self.averages, self.gathered)
            for path, state in self.shards:
                self.save(state, str(path))
            files = [path for path, _ in self.shards]
            if self.is_main:
                files += [self.building / RANKS, *(path for path in self.building.iterdir() if path.is_file())]
            for path in files:
                sync(path)
                self.measured[str(path.relative_to(self.building))] = common.measure_file(path)
            self.problem = ""
        except SystemExit:  # which has printed its own line
            self.problem = f"{self.building} cannot be written"
        except Exception as error:  # what any of the libraries raises costs a checkpoint, not the training
            room = ""
            with contextlib.suppress(OSError):
                room = f", {shutil.disk_usage(self.folder.parent).free / 1e9:.3f} GB are free"
            self.problem = f"{self.building} cannot be written{room}: {common.first_line(error)}"

    def publish(self):
        """Wait for all ranks and give the checkpoint its name. Returns "" or the problem."""
        if self.is_there:
            return ""
        if self.thread.ident:
            with waits.waiting_for("the checkpoint that is written"):
                self.thread.join()
        gathered = ranks.gather(self.measured)
        problem = first_problem(self.problem)
        if dist.get_rank() == 0 and not problem:
            problem = self.rename({name: numbers for part in gathered for name, numbers in part.items()})
        problem = first_problem(problem)
        if dist.get_rank() == 0 and problem:
            shutil.rmtree(self.building, ignore_errors=True)
        return problem

    def rename(self, files):
        """Write the state with the measured files, and give the folder its name. Returns "" or the problem."""
        try:
            common.write_sealed(self.building / STATE, {**self.state, "files": files})
            sync(self.building / SHARDS)
            sync(self.building)
            self.building.rename(self.folder)
            sync(self.folder.parent)
        except OSError as error:
            return f"{self.building} cannot be written: {error}"
        return ""


def is_complete(folder):
    """Whether a complete checkpoint has this name. Anything else of this name is renamed."""
    if not folder.exists():
        return False
    _, problem = open_checkpoint(folder)
    if problem:
        aside = common.put_aside(folder, "damaged")
        print(f"{folder} is not a complete checkpoint: renamed to {aside}: {problem}", file=sys.stderr)
    return not problem


def write_final(engine, folder, files, progress, write_draft):
    """Replace `folder` by the draft alone, with files {name: text}. Ends the program if it cannot be written."""
    tensors = served_tensors(engine, progress)
    previous = folder.with_name(f".{folder.name}.old")

    def write():
        try:
            common.remove(previous)
            with common.building(folder) as building:
                write_draft(building, tensors)
                for name, text in files.items():
                    common.write_atomic(building / name, text)
                if folder.exists():
                    folder.rename(previous)
            sync(folder.parent)
            common.remove(previous)
        except (OSError, SafetensorError) as error:
            common.fail(f"{folder} cannot be written: {error}")

    ranks.on_first_rank(write)


# ==================== Which ones are kept ============================================================================


def step_folder(output_dir, step):
    return Path(output_dir) / f"step_{step:08d}"


def link_newest(folder, best):
    """The links beside a checkpoint: `latest` to it, and `best` to that of best = [value, step, name] or None.

    Storage without symbolic links, as some services have it, gets files with the checkpoint's name. A folder in the
    place of a link, as copying without links makes it, is renamed.
    """
    targets = {"latest": folder.name}
    if best:
        targets["best"] = step_folder("", best[1]).name
    for name, target in targets.items():
        if not folder.with_name(target).exists():
            continue
        new = folder.with_name(f".{name}.building")
        new.unlink(missing_ok=True)
        try:
            new.symlink_to(target)
        except OSError:
            new.write_text(target)
        link = folder.with_name(name)
        if link.is_dir() and not link.is_symlink():
            print(f"{link} is a folder, not a link: renamed to {common.put_aside(link, 'copied')}", file=sys.stderr)
        new.replace(link)


def remove_old(newest, limit, best):
    """Remove the oldest checkpoints beyond `limit` up to `newest`, the folder that was just saved.

    The best one stays, and folders with files of other origin. One behind the newest was passed over as damaged.
    """
    best_name = step_folder("", best[1]).name if best else None
    saved = [folder for folder in checkpoints(newest.parent) if folder.name <= newest.name]
    for folder in saved[limit:]:
        state = read_state(folder) or {"files": ()}
        written = {STATE, *state["files"]}
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
        if present != written or folder.name == best_name:
            continue
        removed = folder.with_name(f".{folder.name}.building")  # from the rename on it is no checkpoint
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


class Saver:
    """Saves output_dir/step_XXXXXXXX and the links while the training goes on, one at a time. All ranks call it.

    flags: all flags by name, given and derived. progress: the training's, whose best checkpoint is the one before
    again if one cannot be written. record: run_record.Record, whose rows a checkpoint relies on, or None.
    """

    def __init__(self, engine, flags, progress, write_draft, record=None):
        self.engine = engine
        self.flags = flags
        self.write_draft = write_draft
        self.record = record
        self.progress = progress
        self.best = progress.best  # of what is saved
        self.saving = None  # what is under way
        self.begun_at = time.monotonic()

    def is_due(self):
        """Whether the last checkpoint is save_minutes old."""
        return 0 < 60 * self.flags["save_minutes"] < time.monotonic() - self.begun_at

    def is_writing(self):
        """Whether this rank still writes."""
        return bool(self.saving and self.saving.thread.is_alive())

    def begin(self, progress):
        """Begin to save this, behind what is under way."""
        self.finish()
        self.begun_at = time.monotonic()
        unwritten = first_problem(self.record.keep() if self.record else "")
        state = state_of(progress, self.flags)
        folder = step_folder(self.flags["output_dir"], progress.step)
        if unwritten:
            self.report(unwritten, folder)
            return
        self.saving = Saving(self.engine, folder, state, progress, self.write_draft)

    def finish(self):
        """Wait for what is under way. Returns its folder, or None, after a line, if it cannot be written."""
        if not self.saving:
            return None
        saving = self.saving
        self.saving = None
        problem = saving.publish()
        self.report(problem, saving.folder)
        return None if problem else saving.folder

    def save(self, progress):
        """Save and wait; returns as `finish`."""
        self.begin(progress)
        return self.finish()

    def report(self, problem, folder):
        """Tell what has become of a checkpoint, and which one is the best then."""
        if problem:
            self.progress.best = self.best
        self.best = self.progress.best
        if dist.get_rank() == 0 and problem:
            print(
                f"no checkpoint at step {int(folder.name[5:])}, what was saved before stays: {problem}", file=sys.stderr
            )
        elif dist.get_rank() == 0:
            self.tidy(folder, self.best)
            if self.record:
                self.record.line(f"saved {folder}")

    def tidy(self, folder, best):
        """Link the newest and the best checkpoint, and remove those beyond the limit."""
        try:
            link_newest(folder, best)
            if self.flags["save_total_limit"]:
                remove_old(folder, self.flags["save_total_limit"], best)
        except OSError as error:
            print(f"{folder} is complete, but: {error}", file=sys.stderr)


def state_of(progress, flags):
    """What trainer_state.json says, without its files."""
    steps_per_epoch = flags["steps_per_epoch"]
    return {
        "step": progress.step,
        "epoch": progress.step / steps_per_epoch,
        "rows_read_in_epoch": progress.step % steps_per_epoch * flags["draft_global_batch_size"],
        "seconds": progress.seconds,
        "best": progress.best,
        "evaluation_due": progress.evaluation_due,
        "spent": progress.spent,
        "world_size": dist.get_world_size(),
        "norms": [float(norm) for norm in progress.norms if norm is not None],
        "flags": flags,
    }


def checkpoints(output_dir):
    """The folders step_*, the newest first."""
    folders = [path for path in Path(output_dir).glob("step_*") if re.fullmatch(STEP, path.name)]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


def move_aside(output_dir, draft):
    """Move what a run wrote in output_dir into a new folder there, and say so; prepared data stay.

    Returns the path of `draft`, a folder, a hub id or None: the folder may have been moved.
    """
    output = Path(output_dir)
    place = Path(draft).resolve() if draft and Path(draft).exists() else None  # links count only before the move
    aside = output / f"earlier_{datetime.datetime.now():%Y%m%d_%H%M%S_%f}"
    moved = [path for path in output.iterdir() if re.fullmatch(OF_A_RUN, path.name)]
    try:
        aside.mkdir()
        for path in moved:
            path.rename(aside / path.name)
    except OSError as error:
        common.fail(f"{output}: what an earlier run wrote cannot be moved to {aside}: {error.strerror}")
    print(f"what an earlier run wrote in {output} is now in {aside}", flush=True)
    if not place or Path(draft).exists():
        return draft
    if place.exists():  # a link to it has been moved
        return str(place)
    return str(aside / place.relative_to(output.resolve()))


def remove_leftovers(output_dir):
    """Remove what an interruption left half-written or half-removed; nobody may be writing."""
    for path in Path(output_dir).glob(".*.building"):
        if not re.fullmatch(rf"\.({STEP}|latest|best|final|universal)\.building", path.name):
            continue
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


# ==================== What is read ===================================================================================


def read_state(folder):
    """trainer_state.json of a checkpoint as it was written, or None."""
    try:
        return common.read_sealed(Path(folder) / STATE)
    except OSError:
        return None


def open_checkpoint(folder):
    """(state, "") of a complete checkpoint, else (state or None, the problem with it)."""
    state = read_state(folder)
    if not state:
        return None, f"{STATE} cannot be read, or is not as it was written"
    if re.fullmatch(STEP, folder.name) and folder.name != step_folder("", state["step"]).name:
        return state, f"{STATE} is of step {state['step']}"
    return state, find_gap(state) or common.find_damage(folder, state["files"])


def find_gap(state):
    """What a checkpoint lacks in its list of files; "" if nothing: the draft, and DeepSpeed's shards of all ranks."""
    needed = {name: re.escape(name) for name in ("config.json", "model.safetensors", RANKS)}
    stage = state["flags"]["engine"]["zero_stage"]
    needed["DeepSpeed's states of the model"] = rf"{SHARDS}/.*model_states\.pt"
    if stage == 3:
        for rank in range(state["world_size"]):
            needed[f"the model's states of rank {rank}"] = rf"{SHARDS}/.*pp_rank_{rank}_.*model_states\.pt"
    if stage:
        for rank in range(state["world_size"]):
            needed[f"the optimizer's states of rank {rank}"] = rf"{SHARDS}/.*pp_rank_{rank}_.*optim_states\.pt"
    for what, pattern in needed.items():
        if not any(re.fullmatch(pattern, name) for name in state["files"]):
            return f"it lacks {what}"
    return ""


def find_checkpoint(folders):
    """(folder, state) of the first folder that is a complete checkpoint, or (None, None). Names the others."""
    for folder in folders:
        state, problem = open_checkpoint(folder)
        if not problem:
            return folder, state
        print(f"{folder} is not a complete checkpoint, it is passed over: {problem}", file=sys.stderr)
    return None, None


def find_draft(path):
    """The folder of the draft that a path means; the path itself where that is something else, such as a hub id.

    It is a draft's folder, or the output folder of a run: `final` there, else its newest complete checkpoint. Files
    that name a checkpoint, as `latest` does on storage without links, are followed.
    """
    place = follow(path)
    if not place.is_dir() or (place / "config.json").exists():
        return str(path) if place == Path(path) else str(place)
    folder = place / "final"
    if not (folder / "config.json").exists():
        folder, _ = find_checkpoint(checkpoints(place))
    if not folder:
        earlier = max(place.glob("earlier_*"), default=None)
        where = f"; an earlier run is in {earlier}" if earlier else ""
        common.fail(
            f"{path} is neither a draft, with a config.json, nor an output folder with a complete checkpoint{where}"
        )
    print(f"{path}: the draft is {folder}")
    return str(folder)


def follow(path):
    """The path, or for a small file with the name of a folder beside it, as `link_newest` writes it, that folder."""
    path = Path(path)
    if path.is_file() and path.stat().st_size < 100:
        name = path.read_text(errors="replace").strip()
        if name.strip(".") and (path.parent / name).is_dir():
            return path.parent / name
    return path


def find_start(args, engine, decisive):
    """(folder, trainer_state.json) of the checkpoint to continue; without --resume or one of them (draft, None).

    draft: the folder whose weights the training starts from, or None. The newest complete checkpoint of output_dir
    comes first, then resume_from_checkpoint, a checkpoint or another run's output folder.
    engine: `engine_kind` of this start. decisive: names of the flags that have to be those of the checkpoint.
    """
    given = args.resume_from_checkpoint
    if not args.resume or args.no_resume_from_checkpoint:
        return given and find_draft(given), None
    elsewhere = []
    if given:
        place = follow(given)
        elsewhere = [place] if (place / STATE).exists() else checkpoints(place)
    folder, state = find_checkpoint(checkpoints(args.output_dir) + elsewhere)
    if not folder:
        start = "" if given else ", the training starts from the beginning"
        print(f"resume: {args.output_dir} has no complete checkpoint{start}", file=sys.stderr)
        return given and find_draft(given), None
    if folder not in elsewhere:  # an interruption may have come before the links
        link_newest(folder, state["best"])
    for name in decisive:
        before = state["flags"].get(name, getattr(args, name))  # an earlier version did not have all of them
        if before != getattr(args, name):
            common.fail(
                f"{folder} was trained with {name} {before}, not {getattr(args, name)}: it decides what "
                "the remaining steps are; give the same, or start from its weights without --resume"
            )
    check_engine(folder, state, engine)
    return str(folder), state


def check_engine(folder, state, engine):
    """End the program if a checkpoint's shards cannot be read by this `engine_kind` on this number of ranks."""
    written = state["flags"]["engine"]
    remedy = "or start from its weights without --resume"
    if "nvme" in written["optimizer"]:
        common.fail(
            f"{folder} was trained with optimizer states on nvme, of which DeepSpeed restores only a part: start from "
            "its weights without --resume"
        )
    for name in ("precision", "optimizer"):
        if written[name] != engine[name]:
            common.fail(
                f"{folder} was trained with {name} {written[name]}, this start means {engine[name]}: give the same, "
                f"{remedy}"
            )
    before = written["zero_stage"]
    stage = engine["zero_stage"]
    if "Muon" in engine["optimizer"] and stage and (before, state["world_size"]) != (stage, dist.get_world_size()):
        common.fail(
            f"{folder} was trained by Muon under ZeRO stage {before} on {state['world_size']} ranks, not stage {stage} "
            f"on {dist.get_world_size()}: DeepSpeed does not convert Muon's momentum; give the same, {remedy}"
        )
    if before != stage and {before, stage} != {1, 2}:
        common.fail(
            f"{folder} was trained with ZeRO stage {before}, deepspeed_config has stage {stage}: DeepSpeed converts "
            f"only 1 and 2 into one another; give one that fits, {remedy}"
        )


def convert_shards(shards, converted):
    """DeepSpeed's universal form of shards, which any number of ranks can read."""
    shutil.rmtree(converted.parent, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", shards, "--output_folder", converted]
    failed = f"{shards} cannot be converted for {dist.get_world_size()} ranks"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CONVERSION)
    except subprocess.TimeoutExpired:
        common.fail(f"{failed}: DeepSpeed's ds_to_universal has not ended after {CONVERSION} s")
    if done.returncode:
        output = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        common.fail(f"{failed}: {output[-1]}")


def read_shards(engine, folder, state, flags):
    """Weights, fp32 masters and optimizer of a checkpoint, whatever the number of ranks that wrote it."""
    shards = folder / SHARDS
    stage = flags["engine"]["zero_stage"]
    given = [{name: group[name] for name in group.keys() - {"params"}} for group in engine.optimizer.param_groups]
    same_world = state["world_size"] == dist.get_world_size()
    same_stage = state["flags"]["engine"]["zero_stage"] == stage
    if stage == 0 or (same_world and same_stage):  # stage 0 has no shards
        path, _ = engine.load_checkpoint(str(folder), SHARDS)
    else:
        universal = Path(flags["output_dir"]) / ".universal.building"
        ranks.on_first_rank(lambda: convert_shards(shards, universal / SHARDS))
        engine._config.load_universal_checkpoint = True
        path, _ = engine.load_checkpoint(str(universal), SHARDS)
        engine._config.load_universal_checkpoint = False
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(universal, ignore_errors=True)
    if not path:
        common.fail(f"DeepSpeed finds nothing to load in {shards}")
    for group, settings in zip(engine.optimizer.param_groups, given, strict=True):
        group.update(settings)  # rates and decays are those of the flags, not of the checkpoint


def read_tensors(folder, state):
    """(sums, average) of this rank, each {name: tensor}; sets the generators if the number of ranks is the same."""
    rank = dist.get_rank()
    average = {}
    sums = defaultdict(dict)  # by rank
    generators = defaultdict(dict)
    for key, tensor in load_file(folder / RANKS).items():
        if key.startswith("same."):
            average[key.removeprefix("same.")] = tensor
            continue
        writer, kind, name = key.split(".", 2)
        by_rank = {"sum": sums, "generator": generators}[kind]
        by_rank[int(writer)][name] = tensor
    if state["world_size"] == dist.get_world_size():
        set_generators(generators[rank])
        return sums[rank], average
    totals = {}
    for name in sums[0]:
        total = sum(sums[writer][name] for writer in range(state["world_size"]))
        totals[name] = total if rank == 0 else torch.zeros_like(total)
    return totals, average


def resume(engine, folder, state, flags):
    """The Progress of a checkpoint; the engine and the random number generators get what it holds.

    folder, state: as `find_start` returns them. flags: all flags of this start by name, given and derived.
    """
    folder = Path(folder)
    read_shards(engine, folder, state, flags)
    sums, average = read_tensors(folder, state)
    if not flags["ema_decay"]:  # it would not follow the weights
        average = {}
    return Progress(
        step=state["step"],
        seconds=state["seconds"],
        best=state["best"],
        evaluation_due=state["evaluation_due"],
        spent=state["spent"],
        norms=state["norms"],
        sums={name: tensor.to(engine.device) for name, tensor in sums.items()},
        average={name: tensor.to(engine.device) for name, tensor in average.items()},
    )
