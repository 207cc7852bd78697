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
import sys
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from core import common, conversations

BOM = b"\xef\xbb\xbf"

CHUNK = 1 << 20  # characters of a JSON array that are read at a time

ROWS = 1000  # rows of a table that are in memory at a time

SUFFIXES = re.compile(r"\.(jsonl?|ndjson|parquet|arrow|csv|tsv|zip|gz|bz2|xz|zst|txt)\Z")

BETWEEN = re.compile(r"[\s,]*")  # two rows of a JSON array

ROW_FIELDS = {*conversations.TURN_FIELDS, "text", "prompt", "input_ids"}

# What damaged files raise, depending on their form; pyarrow's own errors are OSError and ValueError.
DAMAGE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, csv.Error, RecursionError)

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


PROMPT_FLAGS = ("dataset_config", "prompt_column", "response_column", "prompt_split")

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
    convert = None
    if name in conversations.PRESETS:
        preset = conversations.PRESETS[name]
        files = find_preset(name, preset, flags["dataset_path"], part)
        convert = preset.to_row
    else:
        files = find_files(name, flags, part)
    columns = (flags["prompt_column"], flags["response_column"])
    if columns[1] and not columns[0]:
        common.fail(f"response_column {columns[1]}: give --prompt_column as well")
    if columns[0]:

        def convert(row):
            return pair_columns(row, *columns)

    source = Source(name, files, convert)
    if next(source.rows(), None) is None:
        common.fail(f"dataset {name} is empty: no row in it")
    return source


def as_json(row, convert):
    """The bytes of a row, given as such or as a dictionary; a row that cannot be converted stays as it is."""
    if convert:
        with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError, RecursionError):
            row = convert(json.loads(row) if isinstance(row, bytes) else row)
    return row if isinstance(row, bytes) else json.dumps(row, default=str).encode()


def pair_columns(row, prompt, response):
    """A conversation of two columns: texts, or lists of turns. Without `response` the reply is left open."""
    question = row[prompt]
    answer = row[response] if response else "?"
    if isinstance(question, list) and question and isinstance(question[0], str):
        question = question[0]  # benchmarks of several questions, the first of which needs no reply
    turns = question if isinstance(question, list) else [{"role": "user", "content": question}]
    replies = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    kept = {name: row[name] for name in ("system", "tools") if row.get(name)}
    return {"messages": turns + replies} | kept


# ==================== Which files ====================================================================================


def find_preset(name, preset, dataset_path, part):
    """The files of a preset's split."""
    split = "validation" if part == "prompt" and "validation" in preset.files else part.replace("prompt", "train")
    if split not in preset.files:
        common.fail(f"preset {name} has no {split} split: give a data set of your own")
    patterns = list(preset.files[split])
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
        return [path]
    if path.is_dir():
        if (path / "data_config.json").is_file():
            common.fail(f"dataset {name} is prepared already: train_eagle3.py reads it as --data_path")
        saved = sorted(path.glob("**/state.json"))
        return find_saved(name, path, flags, part) if saved else find_splits(name, path, flags, part)
    if path.exists():
        common.fail(f"dataset {name} is a pipe or a device: write it to a file, which is read more than once")
    if re.search(r"[*?[]", name):
        files = sorted(found for found in map(Path, glob.glob(str(path), recursive=True)) if found.is_file())
        return files or common.fail(f"dataset {name}: no file matches this pattern")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not SUFFIXES.search(name):
        return find_splits(name, name, flags, part)
    presets = ", ".join(conversations.PRESETS)
    common.fail(f"dataset {name}: no such file or folder, and not one of the presets {presets}")


def find_saved(name, folder, flags, part):
    """The Arrow files of a folder of datasets' save_to_disk."""
    if not (folder / "state.json").is_file():
        splits = {path.parent.name: path.parent for path in folder.glob("*/state.json")}
        folder = splits[choose_split(name, list(splits), flags, part)]
    state = json.loads((folder / "state.json").read_text())
    return [folder / entry["filename"] for entry in state["_data_files"]]


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
        return [Path(path) for path in paths]
    # hf://datasets/OWNER/NAME@REVISION/PATH
    inside = [path.partition("@")[2].partition("/") for path in paths]
    folder = common.download(name, [path for _, _, path in inside], "dataset", inside[0][0], "dataset")
    return [folder / path for _, _, path in inside]


USUAL_SPLITS = {"train": ("train",), "validation": ("validation", "test"), "prompt": ("test", "validation")}


def choose_split(name, splits, flags, part):
    """The split that is asked for, the usual one, or the only one."""
    named = {"train": flags["train_split"], "validation": flags["validation_split"], "prompt": flags["prompt_split"]}
    wanted = named[part]
    usual = [split for split in USUAL_SPLITS[part] if split in splits]
    if not wanted and (usual or len(splits) == 1):
        return (usual or splits)[0]
    if wanted in splits:
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
        file = io.BytesIO(file.read().decode("utf-16").encode())
        text = file.getvalue().lstrip()
    if suffix := re.search(r"\.([ct])sv\b", Path(path).name):
        return enumerate(read_csv(file, {"c": ",", "t": "\t"}[suffix[1]]), 1)
    if text.startswith(b"[") and not LIST_OF_TURNS.match(text):
        return enumerate(read_array(file), 1)
    return read_lines(file)


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
            with archive.open(name) as member:
                for count, row in read_stream(member, name):
                    number = start + count
                    yield number, row


def read_table(file, head):
    """Yield the rows of Parquet or Arrow as dictionaries."""
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
        yield from datasets.Dataset(pyarrow.Table.from_batches([batch]))  # which knows columns of JSON


def read_csv(file, delimiter):
    """Yield the rows of CSV as dictionaries of text."""
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        yield from csv.DictReader(text, delimiter=delimiter, strict=True)


def read_lines(file):
    """Yield (line number, line) of JSON Lines; blank lines are no rows. A file may also be one object of many lines."""
    lines = number_lines(file)
    first = list(itertools.islice(lines, 2))
    if first and is_unfinished(first[0][1]):
        first += lines
    whole = b"\n".join(line for _, line in first)
    rows = rows_of_object(whole)
    if rows is None:
        yield from first
        yield from lines
    else:
        yield from enumerate(rows, 1)


def number_lines(file):
    """Yield (number from 1, line) of the lines that are not blank."""
    for number, line in enumerate(file, 1):
        line = line.removeprefix(BOM).strip()
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


def rows_of_object(text):
    """The rows of a file that is one object: those of the list in it, or itself; None if it is none."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(whole, dict):
        return None
    lists = [value for value in whole.values() if value and conversations.is_list_of_objects(value)]
    if len(lists) == 1 and not ROW_FIELDS & whole.keys() and not {"role", "from"} & lists[0][0].keys():
        return [json.dumps(row).encode() for row in lists[0]]
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
