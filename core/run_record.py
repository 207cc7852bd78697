"""What a run writes about itself: run.json with its provenance, metrics.jsonl, curves.png, trackers, printed lines."""

import atexit
import datetime
import errno
import importlib.metadata
import io
import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from core import common, optimization, ranks, target_model

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy", "safetensors", "accelerate")

TRACKER_SECONDS = 60  # that training waits at most for the trackers to open, and at its end for them to finish


REPOSITORY = Path(__file__).resolve().parents[1]


def run_id(folder):
    """The id in the run.json of a folder, or None."""
    return read_settings(folder).get("run_id")


def read_settings(folder):
    """The run.json of a folder; {} if there is none or a damaged one."""
    try:
        return dict(json.loads((folder / "run.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def continued_folder(flags):
    """The folder with run.json and metrics.jsonl of the run that a checkpoint continues, or None without metrics.

    It is output_dir once that holds them of the same run, else the checkpoint's own folder.
    """
    folders = (Path(flags["output_dir"]), Path(flags["resume_from_checkpoint"]).resolve().parent)
    folders = [folder for folder in folders if (folder / "metrics.jsonl").exists()]
    for folder in folders:
        if run_id(folder) == run_id(folders[-1]):
            return folder
    return None


def ask_git(*words, expected=0):
    """What git prints about this repository, or None without git, a repository or a commit.

    expected: the exit code.
    """
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(REPOSITORY), *words]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return done.stdout if done.returncode == expected else None


def edited_source(trainer, step):
    """{file name: text} that is needed beside the commit to repeat a start that continues after `step`.

    If the tree is edited, the difference to the commit, new modules included, and the trainer's source; without git the
    latter alone; else nothing. Each start that continues a run has names of its own.
    """
    difference = ask_git("diff", "--binary", "HEAD", "--", ".")
    new = ask_git("ls-files", "--others", "--exclude-standard", "--", ":(glob)*.py", ":(glob)core/*.py") or ""
    for name in new.splitlines():  # a difference to nothing has exit code 1
        difference = (difference or "") + (ask_git("diff", "--no-index", "--", "/dev/null", name, expected=1) or "")
    if difference == "":
        return {}
    trainer = Path(trainer)
    suffix = f"_{step:08d}" if step else ""
    files = {f"{trainer.stem}{suffix}.py": trainer.read_text()}
    if difference:
        files[f"source{suffix}.diff"] = difference
    return files


def run_settings(flags, data_config, step, source_files=()):
    """run.json of a start that goes on behind `step`; the earlier ones stay under "earlier_starts".

    It is the same run, by its id, unless it goes on elsewhere from a checkpoint behind which the run itself went on.
    flags: given and derived ones, by name; source_files: names of the files of `edited_source`, beside run.json.
    """
    commit = ask_git("rev-parse", "HEAD")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    continued = continued_folder(flags) if step else None
    earlier = []
    key = os.urandom(8).hex()
    before = read_settings(continued) if continued else {}
    if continued and not before and dist.get_rank() == 0:
        print(f"{continued / 'run.json'} cannot be read: earlier starts are not in the new one", file=sys.stderr)
    if before:
        earlier = [*before.pop("earlier_starts", []), before]
        checkpoint = Path(flags["resume_from_checkpoint"]).resolve()
        went_on = any(path.name > checkpoint.name for path in checkpoint.parent.glob("step_*"))
        if continued.resolve() == Path(flags["output_dir"]).resolve() or not went_on:
            key = before.get("run_id", key)
    return {
        "argv": sys.argv,
        "flags": flags,
        "versions": {"python": sys.version.split()[0]} | versions,
        "git_commit": commit.strip() if commit else None,
        "source_files": sorted(source_files),
        "world_size": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "data_fingerprint": data_config["fingerprint"],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "run_id": key,
        "starts_behind_step": step,
        "continues": str(continued) if continued else None,
        "earlier_starts": earlier,
    }


def begin(trainer, flags, data_config, step):
    """run.json of this start, as run_settings makes it; rank 0 writes it, and what an edited tree needs beside it.

    trainer: path of the trainer's source.
    """
    files = ranks.on_first_rank(lambda: edited_source(trainer, step))
    settings = run_settings(flags, data_config, step, files)
    if dist.get_rank() == 0:
        for name, text in (files | {"run.json": as_text(settings)}).items():
            common.write_atomic(Path(flags["output_dir"]) / name, text)
    return settings


def as_text(settings):
    """run.json as text."""
    return json.dumps(settings, indent=2) + "\n"


def summary(args, run, config, layers, draft, target, data, data_config, covered, shape, recipes=None):
    """The lines printed once at the start: what was derived, and from what; covered: share of supervised tokens.

    shape: what the trainer says of its draft ("ttt_length 7"). recipes: {value of --recipe: {flag: value}}.
    """
    world = dist.get_world_size()
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    rows = {split: len(part) for split, part in data.items()}
    train_rows = data_config["splits"]["train"]
    row_tokens = train_rows["tokens"] / train_rows["rows"]
    batch = f"{run.draft_micro_batch_size} x {run.draft_accumulation_steps} accumulated x {world} ranks"
    if args.total_seq_len:
        batch = f"as many a forward as have {args.total_seq_len} tokens, assigned to {world} ranks"
    attention = draft.attention_backend
    if attention != args.attention_backend:
        attention += " instead of flex_attention, which has no backward pass on CPUs: the same numbers"
    lines = {
        "ranks": f"world {world} = dp {run.dp_size} x tp {args.tp_size}, {torch.get_num_threads()} threads each",
        "target": target_model.share_of_weights(target, args, run.target_sharding, row_tokens),
        "data": f"{rows}, fingerprint {data_config['fingerprint'][:12]}",
        "batch": f"{args.draft_global_batch_size} sequences a step = {batch}; target forward {args.batch_size}",
        "steps": f"{run.steps_per_epoch} an epoch, {run.total_steps} in all, warm-up {run.scheduler_warmup_steps}, "
        f"{args.scheduler_type} to step {run.scheduler_total_steps}",
        "draft": f"layers {config['num_hidden_layers']} x {config['model_type']}, {trained:,} parameters trained, "
        f"{shape}, auxiliary layers {layers}",
        "attention": attention,
        "vocabulary": f"{config['draft_vocab_size']} of {config['vocab_size']} tokens, {covered:.2%} of the supervised",
    }
    if recipes and args.recipe:
        chosen = [f"{flag} {str(getattr(args, flag)).lower()}" for flag in recipes[args.recipe]]
        lines["recipe"] = f"{args.recipe}: {', '.join(chosen)}"
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def open_swanlab(args, settings):
    import swanlab

    if os.environ.get("SWANLAB_MODE") == "local":  # without this very version it would write nothing, and not say so
        board = next(line for line in importlib.metadata.requires("swanlab") if line.startswith("swanboard"))
        try:
            found = importlib.metadata.version("swanboard")
        except importlib.metadata.PackageNotFoundError:
            found = None
        if not board.startswith(f"swanboard=={found};"):
            raise ImportError("SWANLAB_MODE=local needs pip install 'swanlab[dashboard]'")
    run = swanlab.init(
        project=os.environ.get("SWANLAB_PROJ_NAME", "eagle3"),
        name=args.run_name,
        log_dir=args.log_dir,
        config=settings,
        id=settings["run_id"],
        resume="allow",
    )

    def log(values, step):
        run.log(values, step=step)  # it knows the last step of each name

    return log, run.finish


def open_wandb(args, settings):
    import wandb

    Path(args.log_dir).mkdir(parents=True, exist_ok=True)  # it would go elsewhere
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "eagle3"),
        name=args.run_name,
        dir=args.log_dir,
        config=settings,
        id=settings["run_id"],
        resume="allow",
        allow_val_change=True,
    )
    first = run.step  # the server's next one; offline 0, so that a start's own folder holds the complete run

    def log(values, step):
        if step >= first:
            run.log(values, step=step)

    return log, run.finish


def open_tensorboard(args, settings):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    step = settings["starts_behind_step"]
    name = "-".join(filter(None, (args.run_name, settings["run_id"])))
    folder = str(Path(args.log_dir) / name)
    held = set()
    if step and Path(folder).is_dir():
        events = EventAccumulator(folder, {"scalars": 0}).Reload()  # 0: all of them
        held = {(event.step, name) for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    # What an interrupted start wrote of later steps is not shown.
    writer = SummaryWriter(folder, purge_step=step + 1)
    writer.add_text("settings", "```\n" + json.dumps(settings, indent=2) + "\n```", step)

    def log(values, at):
        for name, value in values.items():
            if at > step or (at, name) not in held:
                writer.add_scalar(name, value, at)
        writer.flush()

    return log, writer.close


def open_mlflow(args, settings):
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    folder = Path(args.log_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}")
    title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "eagle3")
    experiment = client.get_experiment_by_name(title)
    experiment = experiment.experiment_id if experiment else client.create_experiment(title)
    # It gives ids itself: ours is a tag. A service that has begun a run for this process names it.
    named = os.environ.get("MLFLOW_RUN_ID")
    ours = settings["run_id"]
    found = [client.get_run(named)] if named else client.search_runs([experiment], f"tags.run_id = '{ours}'")
    run = found[0] if found else client.create_run(experiment, run_name=args.run_name)
    key = run.info.run_id
    held = set()
    if run.data.tags.get("run_id") == ours:
        client.update_run(key, status="RUNNING")
        held = {(row.step, name) for name in run.data.metrics for row in client.get_metric_history(key, name)}
    else:
        client.set_tag(key, "run_id", ours)
        client.log_batch(key, params=[Param(name, str(value)[:500]) for name, value in settings["flags"].items()])

    def log(values, step):
        now = round(time.time() * 1000)
        client.log_batch(key, [Metric(name, x, now, step) for name, x in values.items() if (step, name) not in held])

    return log, lambda: client.set_terminated(key)


def open_trackio(args, settings):
    os.environ.setdefault("TRACKIO_DIR", str(Path(args.log_dir).resolve() / "trackio"))  # read when it is imported
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    name = "-".join(filter(None, (args.run_name, settings["run_id"])))  # it knows a run by its name
    run = trackio.init(project="eagle3", name=name, config=settings, resume="allow")
    rows = SQLiteStorage.get_logs("eagle3", run=name)
    held = {(row["step"], name) for row in rows for name in row}
    last = -1
    if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):  # they tell the last step alone
        last = -1 if run._initial_last_step is None else run._initial_last_step

    def log(values, step):
        values = {name: value for name, value in values.items() if step > last and (step, name) not in held}
        if values:
            run.log(values, step=step)

    return log, run.finish


TRACKERS = {
    "swanlab": open_swanlab, "wandb": open_wandb, "tensorboard": open_tensorboard, "mlflow": open_mlflow,
    "trackio": open_trackio,
}  # fmt: skip


def complete_flags(args):
    """The flags of a training with report_to as a list, and log_dir; ends the program at an unknown tracker."""
    args.report_to = [name for name in args.report_to.split(",") if name not in ("", "none")]
    unknown = [name for name in args.report_to if name not in TRACKERS]
    if unknown:
        common.fail(f"report_to {','.join(unknown)}: choose from none, {', '.join(TRACKERS)}")
    args.log_dir = args.log_dir or str(Path(args.output_dir) / "logs")
    return args


class Tracker(threading.Thread):
    """A tracker in a thread of its own: foreign code, accounts and networks must not end the training, nor stop it.

    One that fails is reported and left out from then on.
    """

    def __init__(self, name, args, settings, rows):
        super().__init__(daemon=True, name=name)
        self.args = args
        self.settings = settings
        self.rows = rows  # [(values, step)] of earlier starts
        self.opened = threading.Event()
        self.queue = queue.SimpleQueue()  # of (values, step); None: the end
        self.start()

    def run(self):
        try:
            log, close = TRACKERS[self.name](self.args, self.settings)
            self.opened.set()
            for values, step in itertools.chain(self.rows, iter(self.queue.get, None)):
                log(values, step)
            close()
        except (Exception, SystemExit) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, ModuleNotFoundError):
                reason += f": pip install {self.name}"
            tqdm.write(f"{self.name} fails, training goes on without it: {reason}", file=sys.stderr)
        self.opened.set()


def join(threads):
    """Wait for threads, all together at most TRACKER_SECONDS. Returns the names of those that go on."""
    end = time.monotonic() + TRACKER_SECONDS
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0))
    return [thread.name for thread in threads if thread.is_alive()]


class Record:
    """Where measured values go on rank 0: metrics.jsonl, the trackers, the terminal. Elsewhere it does nothing."""

    def __init__(self, args, settings, total_steps):
        self.is_main = dist.get_rank() == 0
        if not self.is_main:
            return
        step = settings["starts_behind_step"]
        path = Path(args.output_dir) / "metrics.jsonl"
        rows = []
        if settings.get("continues"):  # rows of later steps are measured again
            found, problem = parse_metrics(Path(settings["continues"], "metrics.jsonl").read_bytes())
            if problem:
                aside = common.put_aside(path, "damaged") if path.exists() else settings["continues"]
                print(
                    f"metrics.jsonl is damaged ({problem}): the rest is kept, all of it is in {aside}", file=sys.stderr
                )
            rows = [row for row in found if row["step"] <= step]
        common.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        self.file = path.open("ab", buffering=0)
        self.unwritten = b""
        self.open_trackers(args, settings, [(tracked(row), row["step"]) for row in rows])
        self.bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def open_trackers(self, args, settings, rows):
        self.stdin = sys.stdin
        if args.report_to:  # who has no account is not asked for one: nobody may be there to answer
            sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
        self.trackers = [Tracker(name, args, settings, rows) for name in dict.fromkeys(args.report_to)]
        end = time.monotonic() + TRACKER_SECONDS
        for tracker in self.trackers:
            if not tracker.opened.wait(max(end - time.monotonic(), 0)):
                print(f"{tracker.name} is not open after {TRACKER_SECONDS} s, training begins", file=sys.stderr)

    def row(self, split, step, epoch, values):
        """Write a row of metrics.jsonl, {name: number}, and hand it to the trackers."""
        if not self.is_main:
            return
        row = {"split": split, "step": step, "epoch": round(epoch, 6)}
        for name, value in values.items():
            row[name] = float(f"{value:.9g}") if isinstance(value, float) else value
        self.unwritten += f"{json.dumps(row)}\n".encode()
        if problem := self.write():
            print(f"{problem}; the rows are kept in memory", file=sys.stderr)
        for tracker in self.trackers:
            tracker.queue.put((tracked(row), step))

    def write(self, sync=False):
        """Append the rows that are not written yet, all of them or none. Returns "" or why that is not possible."""
        size = self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(self.unwritten) < len(self.unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(self.file.fileno())
        except OSError as error:
            self.file.truncate(size)
            return f"{self.file.name} cannot be written: {error.strerror}"
        self.unwritten = b""
        return ""

    def keep(self):
        """Bring the rows to the disk, as a checkpoint relies on them. Returns "" or why that is not possible."""
        return self.write(sync=True) if self.is_main else ""

    def advance(self):
        """Count an optimizer step on the bar."""
        if self.is_main:
            self.bar.update()

    def line(self, text):
        """Print a line above the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self, code=0):
        """Draw the curves and end the trackers. code: with which the program ends, should one of them hang."""
        if not self.is_main:
            return
        self.bar.close()
        if problem := self.write():
            print(f"{problem}: its last rows are lost", file=sys.stderr)
        self.file.close()
        for tracker in self.trackers:
            tracker.queue.put(None)
        self.draw()
        if late := ", ".join(join(self.trackers)):
            print(f"{late}: not done {TRACKER_SECONDS} s after the training, which ends now", file=sys.stderr)
            atexit.register(leave, code)
        sys.stdin = self.stdin

    def end_badly(self, count, folder):
        """End the program after `count` skipped steps in a row; folder: of the last good state, or None."""
        self.close(2)
        ranks.fail_together(
            f"{count} steps in a row are not finite, the last good state is {folder or 'not saved'}: look at the rows "
            "named above"
        )

    def draw(self):
        """Write curves.png; no picture is worth a run, and without matplotlib there is none."""
        path = Path(self.file.name).with_name("curves.png")
        try:
            path.write_bytes(draw_curves({path.parent.name: read_metrics(self.file.name)}))
        except (Exception, SystemExit) as error:
            path.unlink(missing_ok=True)
            print(f"{path} is not drawn: {error}", file=sys.stderr)


def leave(code):
    """End the process at once: what a tracker that hangs would do at exit hangs as well."""
    if ranks.Watch.running and not code:
        ranks.Watch.running.send("")  # to the other ranks: this is no failure
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tracked(row):
    """{name: number} of a row of metrics.jsonl, as trackers show it."""
    place = ("split", "step", "epoch")
    return {f"{row['split']}/{name}": x for name, x in row.items() if name not in place and x is not None}


def metrics_line(values):
    """The part of a printed line that training and evaluation share."""
    accuracy = " ".join(f"{x:.3f}" for name, x in values.items() if re.fullmatch(r"acc_\d+", name))
    return f"loss {values['loss']:.4f} | acc {accuracy} | chain_length {values['chain_length']:.3f}"


def log_steps(record, run, progress, rate, metric_values):
    """A row and a line about the steps since the last ones; metric_values(sums over ranks) -> {name: number}."""
    step = progress.step
    sums = optimization.reduce_sums(progress.sums)
    tokens = sums.pop("tokens")
    norms = [float(norm) for norm in progress.norms if norm is not None]
    values = metric_values(sums) | {
        "lr": rate,
        "grad_norm": sum(norms) / len(norms) if norms else None,
        "tokens_per_second": tokens / progress.spent,
        "seconds": progress.seconds,
    }
    progress.restart()
    record.row("train", step, step / run.steps_per_epoch, values)
    left = datetime.timedelta(seconds=round(progress.seconds / step * (run.total_steps - step)))
    norm = f"{values['grad_norm']:.3f}" if norms else "-"
    record.line(
        f"step {step}/{run.total_steps} {step / run.total_steps:.0%} | {metrics_line(values)} | "
        f"lr {rate:.2e} | grad_norm {norm} | {values['tokens_per_second']:.0f} tokens/s | left {left}"
    )


def read_metrics(path):
    """Rows of a metrics.jsonl, of the file or of the folder that has it; a last one that was cut off is left out."""
    path = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    try:
        rows, problem = parse_metrics(path.read_bytes())
    except OSError as error:
        common.fail(f"{path} cannot be read: {error}")
    if problem:
        common.fail(f"{path} cannot be read: {problem}")
    return rows


def parse_metrics(data):
    """(rows, "" or the first problem) of the bytes of a metrics.jsonl; damaged lines are left out."""
    rows = []
    problem = ""
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = problem or f"line {number}: {error}"
            continue
        if isinstance(row, dict) and "split" in row and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            problem = problem or f"line {number} is not a row with split and step"
    return rows, problem


def curve(rows, split, name):
    """Steps and values of a metric where a split's rows have one."""
    rows = [row for row in rows if row["split"] == split and row.get(name) is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]


def panels_of(runs):
    """{title of a panel: [(label, split, metric, style)]} of the picture of these runs."""
    names = {name for rows in runs.values() for row in rows for name in row if name.startswith("acc_")}
    names = sorted(names, key=lambda name: int(name.removeprefix("acc_")))
    if len(runs) > 1:  # the first and the last
        names = names[:1] + names[1:][-1:]
    accuracies = []
    for name in names:
        style = ":" if len(runs) > 1 and name != names[0] else "-"
        accuracies.append((name, "train", name, style))
    return {
        "loss": [
            ("training", "train", "loss", "-"),
            ("validation", "validation", "loss", "o"),
        ],
        "accuracy by step of the chain": accuracies,
        "acceptance length": [
            ("of the validation rows", "validation", "acceptance_length", "o-"),
            ("chain length in training", "train", "chain_length", ":"),
        ],
        "learning rate": [("", "train", "lr", "-")],
        "tokens/s": [("", "train", "tokens_per_second", "-")],
    }


def draw_panel(axis, title, curves, runs):
    """The curves of one panel: a single run's differ by colour, several runs have one colour each."""
    for number, rows in enumerate(runs.values()):
        for position, (label, split, name, style) in enumerate(curves):
            colour = number if len(runs) > 1 else position
            x, y = curve(rows, split, name)
            if len(x) == 1:  # a line needs two points
                style = "o"
            axis.plot(x, y, style, color=f"C{colour % 10}", label="" if number else label)
    axis.set(xlabel="optimizer step", ylabel=title)
    axis.grid(alpha=0.3)
    if any(label for label, *_ in curves):
        axis.legend(fontsize="small")


def draw_curves(runs):
    """PNG (bytes) of the curves of runs {name: rows of metrics.jsonl}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    *axes, legend = figure.subplots(2, 3).flat
    for axis, (title, curves) in zip(axes, panels_of(runs).items(), strict=True):
        draw_panel(axis, title, curves, runs)
    legend.axis("off")
    if len(runs) > 1:
        handles = []
        for number, name in enumerate(runs):
            handles += legend.plot([], [], color=f"C{number % 10}", label=name)
        legend.legend(handles=handles, loc="center")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
