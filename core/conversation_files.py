"""Data sets of conversations as people have them: which files they are, and the rows in these.

In:  a preset; a file, a pattern or a folder of JSON Lines, JSON arrays, Parquet, Arrow or CSV, also compressed or
     zipped; a data set on the hub by its id, or a local copy of one; a folder of datasets' save_to_disk.
Out: rows as bytes of JSON, numbered: by line in JSON Lines, else from 1.
"""

import bz2
import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import re
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from core import common, conversations

BOM = b"\xef\xbb\xbf"

CHUNK = 1 << 20  # characters of a JSON array that are read at a time

ROWS = 1000  # rows of a table that are in memory at a time

LARGEST = 1 << 29  # bytes of a row at most: a compressed file of some megabytes can hold one that fills the memory

SUFFIXES = re.compile(r"\.(jsonl?|ndjson|parquet|arrow|csv|tsv|zip|gz|bz2|xz|zst|txt)\Z", re.IGNORECASE)

BETWEEN = re.compile(r"[\s,]*")  # two rows of a JSON array

ROW_FIELDS = {*conversations.TURN_FIELDS, "text", "prompt", "input_ids"}

# What damaged files raise, depending on their form; pyarrow's own errors are OSError and ValueError.
DAMAGE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, csv.Error, RecursionError)


class TooLarge(Exception):
    """A row has more than LARGEST bytes: its number, or nothing for the next one."""


# Forms that are not read, by their first bytes, and what to do.
NOT_READ = {
    b"%PDF": "a PDF document: give JSON Lines",
    b"\x80": "a Python pickle, which is never opened because it can run code: write its rows as JSON Lines",
    b"version https://git-lfs": "the pointer of a file in Git LFS: fetch the file itself (git lfs pull)",
    b"<": "a web page or XML: as a rule a download that went wrong",
    b"SQLite format 3": "an SQLite database: write its rows as JSON Lines",
    b"GGUF": "a GGUF model, not conversations",
    b"\x89HDF": "an HDF5 file: write its rows as JSON Lines",
    b"\x93NUMPY": "a NumPy array: write its rows as JSON Lines",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
}


# ==================== Flags ==========================================================================================


def add_flags(add):
    """Flags that say what of a data set is read, wherever conversations are."""
    add("--dataset_config", help="configuration of a hub data set; none: its default")
    add("--prompt_column", help="column of questions, where rows are no conversations")
    add("--response_column", help="column of the answers to prompt_column")


def add_preparation_flags(add):
    """The same, and those of a preparation."""
    add("--dataset_path", help="local copy of the preset's hub repository, instead of a download")
    add_flags(add)
    add("--train_split", help="split of a hub data set; none: train, or its only one")
    add("--validation_split", help="the same of the validation data; none: validation, else test, or its only one")
    ratio = "share of unusable rows at which it stops; none: 0.01; sharegpt, eaglechat 0.1"
    add("--max_rejected_ratio", type=common.at_least(float, 0), help=ratio)


PROMPT_FLAGS = ("dataset_path", "dataset_config", "prompt_column", "response_column", "prompt_split")

FLAGS = ("dataset_path", "dataset_config", "prompt_column", "response_column", "train_split", "validation_split")


def read_flags(args):
    """{name: value} of the flags of a preparation."""
    return {name: getattr(args, name) for name in FLAGS} | {"max_rejected_ratio": args.max_rejected_ratio}


# ==================== A data set and its rows ========================================================================


@dataclass(frozen=True)
class Source:
    """A data set: its name as given, its files ([] for pydoc), and what makes a conversation of a row (None: nothing).

    starts: number of rows in front of each file, known once they are read.
    """

    name: str
    files: list
    convert: object = None
    starts: list = field(default_factory=list)

    def rows(self):
        """Yield (number from 1, bytes of the row as JSON); numbers run on from file to file."""
        if not self.files:
            yield from enumerate(conversations.pydoc_lines(), 1)
        number = 0
        self.starts.clear()
        for path in self.files:
            start = number
            self.starts.append(start)
            for count, row in read_file(path):
                number = start + count
                yield number, as_json(row, self.convert)

    def place(self, number):
        """{"file", "line"} of a row: of the file it is in, if there are several."""
        if len(self.files) < 2:
            return {"file": self.name, "line": number}
        index = max(i for i, start in enumerate(self.starts) if start < number)
        return {"file": str(self.files[index]), "line": number - self.starts[index]}

    def hashes(self):
        """Of each file; of the rows of a preset without files."""
        if not self.files:
            return common.hash_of(conversations.pydoc_lines())
        return [common.hash_file(path) for path in self.files]


def open_source(name, part, flags):
    """The Source of a data set; ends the program with one line if it is missing, empty or of a form that is not read.

    part: train, validation or prompt, after which a split is chosen. flags: {name: value} of the flags above.
    """
    flags = dict.fromkeys((*FLAGS, "prompt_split")) | flags
    columns = [flags[name] for name in ("prompt_column", "response_column") if flags[name]]
    if flags["response_column"] and not flags["prompt_column"]:
        common.fail(f"response_column {columns[0]}: give --prompt_column as well")
    if name in conversations.PRESETS:
        refuse_flags(name, "a preset, which knows its columns and splits", ("prompt_column", *CHOICES[part]), flags)
        preset = conversations.PRESETS[name]
        source = Source(name, find_preset(name, preset, flags["dataset_path"], part), preset.to_row)
    else:
        source = Source(name, find_files(name, flags, part))
    first = next(source.rows(), None)
    if first is None:
        common.fail(f"dataset {name} is empty: no row in it")
    if not columns:
        return source
    check_columns(name, first[1], columns)
    return replace(source, convert=lambda row: pair_columns(row, *columns))


# The flags that choose in a data set, by what of it is read.
CHOICES = {
    "train": ("dataset_config", "train_split"),
    "validation": ("validation_split",),
    "prompt": ("dataset_config", "prompt_split"),
}


def refuse_flags(name, what, names, flags):
    """End the program if a flag is given that nothing would read beside a data set of this kind."""
    for flag in names:
        if flags[flag]:
            common.fail(f"{flag} {flags[flag]}: {name} is {what}: drop it")


def check_columns(name, first, columns):
    """End the program if the first row of a data set, as bytes of JSON, does not have the columns."""
    with contextlib.suppress(ValueError, RecursionError, AttributeError):  # not an object: rejected with its line
        found = json.loads(first).keys()
        missing = [column for column in columns if column not in found]
        if missing:
            common.fail(f"dataset {name} has no column {missing[0]}, but {', '.join(found)}")


def as_json(row, convert):
    """The bytes of a row, given as such or as a dictionary; a row that cannot be converted stays as it is."""
    if convert:
        with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError, RecursionError):
            row = convert(json.loads(row) if isinstance(row, bytes) else row)
    return row if isinstance(row, bytes) else json.dumps(row, default=as_text).encode()


def as_text(value):
    """The text of a value of a table that JSON does not have: bytes as UTF-8, as some tables keep texts; a date."""
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)


def pair_columns(row, prompt, response=None):
    """A conversation of two columns: texts, or lists of turns. Without `response` the reply is left open.

    The row's other fields stay beside the turns, where they are read or refused. An Alpaca row's `input` is a part of
    its question; the reasoning beside an answer belongs to the reply.
    """
    question = as_turns(row.get(prompt))
    answer = as_turns(row.get(response)) if response else "?"
    if isinstance(question, list) and question and isinstance(question[0], str):
        question = question[0]  # benchmarks of several questions, the first of which needs no reply
    if isinstance(question, str) and row.get("input") and "input" not in (prompt, response):
        question = f"{question}\n\n{row['input']}"
    turns = question if isinstance(question, list) else [{"role": "user", "content": question}]
    if is_conversation(answer):
        turns = []
    reasoning = {key: row[key] for key in conversations.REASONING_FIELDS if row.get(key) and key != response}
    replies = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer} | reasoning]
    others = {key: value for key, value in row.items() if key not in (prompt, response, "input", *ROW_FIELDS)}
    return others | {"messages": turns + replies}


def as_turns(value):
    """A list of turns that is text, as in CSV, as the list; anything else as it is."""
    turns = conversations.decode(value)
    if not isinstance(turns, list) or not conversations.is_list_of_objects(turns):
        return value
    return turns if turns and all({"role", "from"} & turn.keys() for turn in turns) else value


def is_conversation(answer):
    """Does a column of answers hold the questions as well, as `chosen` of preferences does?"""
    turns = answer if isinstance(answer, list) and conversations.is_list_of_objects(answer) else []
    return any(str(turn.get("role") or turn.get("from")).lower() in conversations.NAMES["user"] for turn in turns)


# ==================== Which files ====================================================================================


def find_preset(name, preset, dataset_path, part):
    """The files of a preset's split."""
    split = "validation" if part == "prompt" and "validation" in preset.files else part.replace("prompt", "train")
    if split not in preset.files:
        common.fail(f"preset {name} has no {split} split: give a data set of your own")
    patterns = list(preset.files[split])
    if dataset_path and Path(dataset_path).expanduser().is_file() and part == "prompt":
        return [Path(dataset_path).expanduser()]
    if dataset_path and preset.hub:
        # One copy holds the files of all the repositories.
        return match_files(name, preset, Path(dataset_path).expanduser(), patterns, least=len(preset.hub))
    files = []
    for repository in preset.hub:
        folder = common.download(repository, patterns, "dataset", preset.revision, f"preset {name} (--dataset_path)")
        files += match_files(name, preset, folder, patterns, least=1)
    return files


def match_files(name, preset, folder, patterns, least):
    """The files of the first pattern that matches any; ends the program if they are fewer than `least`."""
    found = []
    for pattern in patterns:
        found = found or sorted(folder.glob(pattern))
    if len(found) < least:
        wanted = f"{len(found) or 'no'} {' or '.join(patterns)} in {folder}"
        common.fail(f"preset {name}: {wanted}, as in {', '.join(preset.hub)} on the hub")
    return found


def find_files(name, flags, part):
    """The files of a file, a folder, a pattern or a hub id."""
    path = Path(name).expanduser()
    if path.is_file():
        refuse_flags(name, "a file, which has no splits", CHOICES[part], flags)
        return [path]
    if path.is_dir():
        path = path.resolve()  # as datasets names the files in it
        if (path / "data_config.json").is_file():
            common.fail(f"dataset {name} is prepared already: train_eagle3.py reads it as --data_path")
        saved = find_saved(path)
        return saved_files(name, saved, flags, part) if saved else find_splits(name, path, flags, part)
    if "://" in name:
        common.fail(f"dataset {name} is a URL: download the file, or give the id of a data set on the hub")
    if path.exists():
        common.fail(f"dataset {name} is a pipe or a device: write it to a file, which is read more than once")
    if re.search(r"[*?[]", name):
        refuse_flags(name, "a pattern of files, which have no splits", CHOICES[part], flags)
        files = sorted(found for found in map(Path, glob.glob(str(path), recursive=True)) if found.is_file())
        return files or common.fail(f"dataset {name}: no file matches this pattern")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not SUFFIXES.search(name):
        return find_splits(name, name, flags, part)
    presets = ", ".join(conversations.PRESETS)
    common.fail(f"dataset {name}: no such file or folder, and not one of the presets {presets}")


def find_saved(folder):
    """{split: folder} of datasets' save_to_disk in a folder; one without a split is its own."""
    places = [state.parent for state in (folder / "state.json", *folder.glob("*/state.json")) if list_saved(state)]
    return {place.name: place for place in places}


def list_saved(state):
    """The Arrow files that a state.json of save_to_disk names; [] for another file of this name, or none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        files = json.loads(state.read_text())["_data_files"]
        return [common.below(state.parent, entry["filename"]) for entry in files]
    return []


def saved_files(name, saved, flags, part):
    """The Arrow files of a split of save_to_disk."""
    return list_saved(saved[choose_split(name, list(saved), flags, part)] / "state.json")


def find_splits(name, where, flags, part):
    """The files of a split of a hub data set, given by its id or as a folder in the hub's layout."""
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(str(where), flags["dataset_config"])
        files = builder.config.data_files or {}
    except Exception as error:  # of several libraries; each means that there is nothing to read
        problem = " ".join(str(error).partition("Example of usage")[0].split())
        flag = " (--dataset_config)" if "config" in problem.lower() else ""
        common.fail(f"dataset {name} cannot be read, as a folder or by its id on the hub: {problem}{flag}")
    paths = [str(path) for path in files[choose_split(name, [str(split) for split in files], flags, part)]]
    if not paths[0].startswith("hf://"):
        check_folder(name, Path(where), {str(path) for split in files.values() for path in split})
        return [Path(path) for path in paths]
    # hf://datasets/OWNER/NAME@REVISION/PATH
    inside = [path.partition("@")[2].partition("/") for path in paths]
    folder = common.download(name, [path for _, _, path in inside], "dataset", inside[0][0], "dataset")
    return [folder / path for _, _, path in inside]


def check_folder(name, folder, known):
    """End the program if files of a folder, which says nothing of its splits, would be left out without a word.

    datasets reads files of one form alone, and where some are named after a split, no others. known: paths in a split.
    """
    readme = folder / "README.md"
    if readme.is_file() and re.search(r"^configs:", readme.read_text(errors="replace"), re.MULTILINE):
        return
    left = []
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        is_data = SUFFIXES.search(path.name) and path.suffix != ".txt" and path.name != "dataset_infos.json"
        if is_data and not is_hidden and str(path.absolute()) not in known:
            left.append(path.name)
    if left:
        some = ", ".join(left[:3])
        common.fail(
            f"dataset {name}: {some} would be left out, as no split has them: name the files wanted by a pattern"
        )


USUAL_SPLITS = {"train": ("train",), "validation": ("validation", "test"), "prompt": ("test", "validation")}


def choose_split(name, splits, flags, part):
    """The split that is asked for, the usual one, or the only one."""
    named = {"train": flags["train_split"], "validation": flags["validation_split"], "prompt": flags["prompt_split"]}
    wanted = named[part]
    usual = [split for split in USUAL_SPLITS[part] if split in splits]
    if not wanted and (usual or len(splits) == 1):
        wanted = (usual or splits)[0]
    if wanted in splits:
        if len(splits) > 1:
            print(f"dataset {name}: split {wanted}")
        return wanted
    problem = f"no {wanted}" if wanted else "none of them is the usual one"
    common.fail(f"dataset {name} has the splits {', '.join(splits)}, {problem}: choose one by --{part}_split")


# ==================== The rows of a file =============================================================================


def read_file(path):
    """Yield (number from 1, row) of a file of any form, the row as bytes of JSON, or as a dictionary.

    Ends the program with one line if the file is damaged, or of a form that is not read.
    """
    number = 0
    try:
        with open_plain(path) as file:
            for number, row in read_stream(file, path):
                yield number, row
    except (TooLarge, MemoryError) as error:
        number = error.args[0] if error.args else number + 1
        common.fail(f"{path}: row {number} has more than {LARGEST >> 20} MiB: leave it out, or divide it")
    except DAMAGE as error:
        problem = " ".join(str(error).split())
        common.fail(f"{path} is cut off or damaged after row {number}: {problem}; get or write it again")


def open_plain(path):
    """The file as a binary stream, decompressed."""
    with open(path, "rb") as file:
        head = file.read(6)
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if head.startswith(b"BZh"):
        return bz2.open(path)
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(path)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def read_stream(file, path):
    """read_file of a decompressed stream. Its first bytes tell the form; that of CSV, the name."""
    head = file.peek(512)
    text = head.removeprefix(BOM).lstrip()
    check_form(head, text, path)
    if head.startswith(b"PK\x03\x04"):
        return read_zip(file, path)
    if head.startswith(TABLES):
        return enumerate(read_table(file, head), 1)
    if head.startswith(UTF_16):
        file = io.BytesIO(read_whole(file).decode("utf-16").encode())
        text = file.getvalue().lstrip()
    if suffix := re.search(r"\.([ct])sv\b", Path(path).name.lower()):
        return enumerate(read_csv(file, {"c": ",", "t": "\t"}[suffix[1]]), 1)
    if text.startswith(b"[") and not LIST_OF_TURNS.match(text):
        return enumerate(read_array(file), 1)
    return read_lines(file, path)


TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # the last begins Arrow's stream
UTF_16 = (b"\xff\xfe", b"\xfe\xff")

# The beginning of a conversation, a line of its own; another array is one of rows.
LIST_OF_TURNS = re.compile(rb'\[\s*\{\s*"(role|from|content|value)"')


def check_form(head, text, path):
    """End the program if a file is of a form that is not read. text: head without blanks at its start."""
    for start, form in NOT_READ.items():
        if text.startswith(start):
            common.fail(f"{path} is {form}")
    if head[257:262] == b"ustar":
        common.fail(f"{path} is a tar archive: unpack it")
    is_known = head.startswith((b"PK\x03\x04", *TABLES, *UTF_16)) or text.startswith((b"{", b"["))
    if b"\0" in head and not is_known:
        common.fail(f"{path} is no text and no table: give JSON Lines, JSON, CSV, Parquet or Arrow, also compressed")


def read_whole(file):
    """All bytes of a stream that can only be read as a whole."""
    data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise TooLarge
    return data


def read_zip(file, path):
    """Yield (number, row) of the files in a zip archive, in the order of their names."""
    with zipfile.ZipFile(file) as archive:
        everything = sorted(archive.namelist())
        names = [name for name in everything if SUFFIXES.search(name) and not name.startswith("__MACOSX/")]
        if not names:
            inside = ", ".join(everything[:3])
            if any(name.endswith(".pkl") for name in everything):
                inside += ": a PyTorch file, which is never opened because it can run code"
            common.fail(f"{path} is a zip archive of no file that is read: {inside}")
        number = 0
        for name in names:
            start = number
            check_readable(path, archive.getinfo(name))
            with archive.open(name) as member:
                for count, row in read_stream(member, name):
                    number = start + count
                    yield number, row


def check_readable(path, member):
    """End the program if a file in a zip archive is one itself, encrypted, or compressed as Python does not read."""
    if member.filename.lower().endswith(".zip"):
        common.fail(f"{path} is a zip archive with another one in it, {member.filename}: unpack it")
    if member.flag_bits & 1 or member.compress_type not in (0, 8, 12, 14):
        common.fail(f"{path} is a zip archive that is encrypted or compressed in an unusual way: unpack it")


def read_table(file, head):
    """Yield the rows of Parquet or Arrow as dictionaries of all columns, without what is null inside a value.

    All rows of a table have the same keys: those that only other rows have, in the arguments of a call for example, are
    null in it.
    """
    import datasets
    import pyarrow
    from pyarrow import parquet

    if head.startswith(b"PAR1"):
        batches = parquet.ParquetFile(file).iter_batches(batch_size=ROWS)
    elif head.startswith(b"ARROW1"):
        reader = pyarrow.ipc.open_file(file)
        batches = map(reader.get_batch, range(reader.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(file)
    for batch in batches:
        table = datasets.Dataset(pyarrow.Table.from_batches([batch]))  # which knows columns of JSON
        for row in table:
            yield {column: without_nulls(value) for column, value in row.items()}


def without_nulls(value):
    """A value without the keys, at any depth, whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


def read_csv(file, delimiter):
    """Yield the rows of CSV as dictionaries of text."""
    csv.field_size_limit(LARGEST)
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        try:
            yield from csv.DictReader(text, delimiter=delimiter, strict=True)
        except csv.Error as error:
            if "field limit" in str(error):
                raise TooLarge from None
            raise


def read_lines(file, path):
    """Yield (line number, line) of JSON Lines; blank lines are no rows. A file may also be one object of many lines."""
    lines = number_lines(file)
    first = list(itertools.islice(lines, 2))
    if first and is_unfinished(first[0][1]):
        first += collect(lines)
    whole = b"\n".join(line for _, line in first)
    rows = rows_of_object(whole, path)
    if rows is None:
        yield from first
        yield from lines
    else:
        yield from enumerate(rows, 1)


def collect(lines):
    """A list of (number, line) that are parts of one row."""
    found = []
    size = 0
    for number, line in lines:
        size += len(line)
        if size > LARGEST:
            raise TooLarge
        found.append((number, line))
    return found


def number_lines(file):
    """Yield (number from 1, line) of the lines that are not blank. Raises ValueError if the last one is cut off."""
    for number in itertools.count(1):
        raw = file.readline(LARGEST + 1)
        if not raw:
            return
        if len(raw) > LARGEST:
            raise TooLarge(number)
        line = raw.removeprefix(BOM).strip()
        if number > 1 and not raw.endswith(b"\n") and line.startswith(b"{") and is_unfinished(line):
            raise ValueError("its last row has no end")
        if line:
            yield number, line


def is_unfinished(text):
    """Could the bytes be the beginning of JSON?"""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return ends_early(error)
    except (ValueError, RecursionError):
        pass
    return False


def ends_early(error):
    """Does JSON fail because its text ends? A word, a number or an escape may be cut as well as a text."""
    return error.msg.startswith("Unterminated") or len(error.doc) - error.pos < 10


LISTS_OF_ROWS = ("data", "dataset", "examples", "instances", "items", "rows", "train")  # keys of a file's one object


def rows_of_object(text, path):
    """The rows of a file that is one object: those of a list in it, or itself; None if it is none."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(whole, dict):
        return None
    if {"added_tokens", "model"} <= whole.keys():
        common.fail(f"{path} is a tokenizer, not conversations")
    lists = {key: value for key, value in whole.items() if value and conversations.is_list_of_objects(value)}
    for key, rows in lists.items():
        are_turns = {"role", "from"} & rows[0].keys()
        if len(lists) == 1 and not are_turns and (key in LISTS_OF_ROWS or ROW_FIELDS & rows[0].keys()):
            return [json.dumps(row).encode() for row in rows]
    return [text]


def read_array(file):
    """Yield the elements of a JSON array as bytes, with a part of the file in memory at a time.

    Bytes that are not UTF-8 are handed on as they are: their row is rejected. Arrays one after another count as one.
    """
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    decoder = json.JSONDecoder()
    buffer = ""
    position = 0
    is_open = False
    while True:
        position = BETWEEN.match(buffer, position).end()
        following = buffer[position : position + 1]
        if following == ("]" if is_open else "["):
            is_open = not is_open
            position += 1
            continue
        if following and not is_open:
            raise ValueError("text follows the end of its JSON array")
        if following:
            try:
                _, end = decoder.raw_decode(buffer, position)
            except json.JSONDecodeError as error:
                if len(buffer) - position > LARGEST:
                    raise TooLarge from None
                if not ends_early(error):
                    raise ValueError(f"the next row of its JSON array is not JSON: {error.msg}") from None
            else:
                yield buffer[position:end].encode(errors="surrogateescape")
                position = end
                continue
        more = text.read(max(CHUNK, len(buffer) - position))
        if not more and is_open:
            raise ValueError("its JSON array has no end")
        if not more:
            return
        buffer = buffer[position:] + more
        position = 0
