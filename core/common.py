"""What all modules share: errors in one line, command lines, atomic files, hashes, parts of containers."""

import argparse
import concurrent.futures
import contextlib
import difflib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import zlib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NoReturn

import huggingface_hub
from huggingface_hub import constants

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}

# ==================== Errors and command lines =======================================================================


def fail(message) -> NoReturn:
    """Report an error that the user can fix: one line on stderr, exit code 2, no traceback."""
    line = " ".join(str(message).split("\n"))
    print(f"error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def first_line(error):
    """The first line of an error's text, or its type: MemoryError and others come without a text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default after the help of each flag."""

    def _get_help_string(self, action):
        if action.required:
            return f"{action.help} (required)"
        if action.dest == "help" or not action.option_strings:
            return action.help
        default = "none" if action.default is None else action.default
        if str(default).startswith("/"):  # the help does not depend on where the repository is
            default = Path(default).name
        return f"{action.help} (default: {default})".replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line, flags in snake or kebab case, and defaults in the help."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        self.written = {}  # {flag: another trainer's name of it on this command line}

    def error(self, message):
        for name, written in self.written.items():
            message = re.sub(rf"--{name}\b", f"--{written}", message)
        if message.startswith("unrecognized arguments"):
            message += self.close_flags(message)
        fail(re.sub(r"\Aargument --(\w+): (?=is )", r"\1 ", message))

    def close_flags(self, message):
        """The flags that may have been meant by those in a message, as the end of a line."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        unknown = re.findall(r"--\w+", message)
        for flag in unknown:
            if flag.removeprefix("--no_") in (known.removeprefix("--") for known in flags):
                return f" (write --{flag.removeprefix('--no_')} false)"
        close = [match for flag in unknown for match in difflib.get_close_matches(flag, flags, n=1, cutoff=0.75)]
        return f" (is {', '.join(close)} meant?)" if close else ""

    def parse_args(self, argv=None):
        args = super().parse_args(normalise_argv(sys.argv[1:] if argv is None else argv))
        for name, value in vars(args).items():
            if isinstance(value, str) and value.startswith("~/"):  # shells leave it alone in --flag=~/folder
                setattr(args, name, os.path.expanduser(value))
        return args


def normalise_argv(argv, aliases=None):
    """Flags from kebab-case to snake_case, then from aliases {alias: name} to names; values stay as they are."""

    def normalise(flag):
        name = flag[1].replace("-", "_")
        return "--" + (aliases or {}).get(name, name)

    return [re.sub(r"\A--([^=]+)", normalise, word) for word in argv]


def at_least(kind, least, most=None):
    """Type of a flag with a lower bound: at_least(int, 1); without an upper one it is finite."""

    def convert(text):
        value = kind(text)
        if not least <= value:  # nan is not
            raise argparse.ArgumentTypeError(f"is {value}; it must be at least {least}")
        if value == math.inf:
            raise argparse.ArgumentTypeError("is inf; it must be finite")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"is {value}; it must be at most {most}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type of a value that it cannot convert
    return convert


SEED = at_least(int, 0, 2**32 - 1)  # as NumPy takes it


def above_zero(text):
    """Type of a flag: a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"is {text}; it must be above 0")
    return value


def boolean(text):
    """True or false, in any spelling. Raises ArgumentTypeError."""
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


class Switch(argparse.Action):
    """Action of a flag that takes true, false, or no value, which means true."""

    def __init__(self, option_strings, dest, default=False, help=None):
        super().__init__(option_strings, dest, nargs="?", const=True, default=default, type=boolean, help=help)

    def __call__(self, parser, namespace, value, option_string=None):
        setattr(namespace, self.dest, value)


def without(args, *switches):
    """How to do without switches that a flag or a recipe has set, as the end of a line."""
    off = " ".join(f"--{name} false" for name in switches)
    recipe = f" beside --recipe {args.recipe}" if args.recipe else ""
    return f"write {off}{recipe}"


def format_table(lines):
    """Lines of texts, the header first, as a table in Markdown: the first column to the left, numbers to the right."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    table = []
    for first, *others in [lines[0], rule, *lines[1:]]:
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


# ==================== Files ==========================================================================================


def write_atomic(path, data):
    """Write bytes or str so that a reader sees the old file or the complete new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        error.filename = str(path)  # writing itself does not know it
        raise


@contextlib.contextmanager
def building(path):
    """A temporary path beside `path`, renamed to `path` at the end, removed after an error.

    A leftover of an interruption is removed first. `path` must not be an existing folder.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.building")
    remove(temporary)
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        remove(temporary)
        raise


def remove(path):
    """Remove a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def put_aside(path, prefix):
    """Rename a file or folder to PREFIX_N_NAME, with the first N that is free. Returns the new path."""
    names = (path.with_name(f"{prefix}_{i}_{path.name}") for i in itertools.count())
    aside = next(place for place in names if not os.path.lexists(place))
    return path.rename(aside)


def open_to_all(path):
    """Let others read a file, where the storage keeps such modes: safetensors makes its files private."""
    with contextlib.suppress(OSError):
        os.chmod(path, 0o644)


def check_writable(name, folder):
    """End the program unless `folder`, or the folder in which it will be created, takes files; name: of the flag."""
    folder = Path(folder)
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.stat()  # a file above it, a name that is too long
        existing = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
        with tempfile.TemporaryDirectory(dir=existing) as trial:  # results get their name when they are complete
            made = Path(trial, "building")
            made.mkdir()
            made.rename(Path(trial, "complete"))
    except OSError as error:
        fail_to_write(name, folder, error)


def disk_problem(error):
    """What an exception, or one that it follows from, says about a disk that cannot be written; "" if none does."""
    while error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return os.strerror(error.errno)
        error = error.__cause__ or error.__context__
    return ""


def fail_to_write(name, path, error) -> NoReturn:
    """End the program because of an OSError in writing to `path`, which the user gave as `name`."""
    reason = error.strerror
    if isinstance(error, FileExistsError | NotADirectoryError):
        reason = "a link that leads nowhere is in the way" if Path(path).is_symlink() else "a file is in the way"
    fail(f"{name} {path} cannot be written: {reason}")


@contextlib.contextmanager
def disk_errors_in_a_line():
    """End the program with one line that names the file which a disk does not take or give, wherever that happens."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS or not error.filename:
            raise
        fail(f"{error.filename}: {error.strerror}")


def open_output(path):
    """The folder `path` of --output, created if it does not exist; None for None."""
    if not path:
        return None
    check_writable("output", path)
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def read_object(path):
    """(the object of a JSON file, ""), or ({}, the problem with it)."""
    try:
        value = json.loads(Path(path).read_text())
    except OSError as error:
        return {}, f"it cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return {}, f"it is not JSON: {first_line(error)}"
    return (value, "") if isinstance(value, dict) else ({}, "it is not a JSON object")


def below(folder, name):
    """The path of a file that another one names; ValueError if that leads out of the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name} leads out of the folder")
    return Path(folder) / name


def hash_file(path):
    """sha256 of the content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(value):
    """sha256 of the value as JSON, in hex."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()


def measure_file(path):
    """[bytes, CRC-32] of a file."""
    crc = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            crc = zlib.crc32(part, crc)
    return [path.stat().st_size, crc]


def find_damage(folder, files):
    """The problem with files {name: measure_file} of a folder; "" if they are as they were written."""

    def look(name):
        try:
            return "" if measure_file(Path(folder) / name) == files[name] else f"{name} is not as it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"

    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # shared storage gives several readers more
        return next(filter(None, pool.map(look, files)), "")


def write_sealed(path, value):
    """An object as JSON with a hash of what it says, by which `read_sealed` sees whether it is as it was written."""
    value = json.loads(json.dumps(value))  # as it will be read
    write_atomic(path, json.dumps({**value, "hash": hash_of(value)}, indent=1, ensure_ascii=False) + "\n")


def read_sealed(path):
    """The object that `write_sealed` wrote, or None if it is not as it was written. OSError if it cannot be read."""
    try:
        value = json.loads(Path(path).read_text())
        return value if value.pop("hash") == hash_of(value) else None
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None


HUB_ID = r"\w[\w.-]*/[\w.-]+"


def download(repo, patterns, repo_type="model", revision=None, flag=None):
    """The folder of a hub repository's files that match; weights in sub-folders are second copies and left out.

    flag: what names the repository; none: target_model_path or dataset_path.
    """
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            repo_type=repo_type,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*.safetensors", "*/*.bin"],
        )
        return Path(folder)
    except Exception as error:  # of several libraries; each means that the files are not available
        flag = flag or {"model": "target_model_path", "dataset": "dataset_path"}[repo_type]
        reason = f"the hub fails with {type(error).__name__}: {error}"
        if constants.HF_HUB_OFFLINE:
            reason = f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not have it"
        fail(f"{flag} {repo}: give a local copy, or another name: {reason}")


def map_parts(value, kind, replace):
    """value with every part of type `kind` replaced, in one order; containers and dataclasses are built anew."""
    if isinstance(value, kind):
        return replace(value)
    if is_dataclass(value):
        parts = {field.name: map_parts(getattr(value, field.name), kind, replace) for field in fields(value)}
        return type(value)(**parts)
    if isinstance(value, dict):
        return {key: map_parts(part, kind, replace) for key, part in value.items()}
    if isinstance(value, list | tuple) and not all(type(part) is int for part in value):
        parts = [map_parts(part, kind, replace) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
