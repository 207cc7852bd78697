"""Hidden states from a vLLM server that runs the target, and from the files that its extractor writes.

The server is started as examples/run_llama3_vllm.sh does, and shares a folder with this machine. A row's hidden states
are [T, layers, Ht]: the auxiliary layers, and the last one before the final norm.
"""

import fcntl
import time
from collections import defaultdict
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from core import common, dataloader, hidden_states, server, slots

REQUESTS = 16  # to a server that are under way at once, of each rank


def add_server_flags(add):
    """The flags of a server that generates missing rows; add: add_argument of a parser or group."""
    retries = "times that it is asked again, after 1, 2, 4, ... seconds"
    add("--vllm_endpoint", help="URL of a vLLM server that generates missing rows; none: the target in memory does")
    add("--request_timeout", type=common.at_least(float, 0), default=180, help="seconds that it may take for a row")
    add("--max_retries", type=common.at_least(int, 0), default=3, help=retries)


class VllmFiles:
    """Rows in files of vLLM's extractor, as speculators names them: hs_N.safetensors is row N of the train split.

    Those of the validation split are in the folder validation. The files are only read. They do not say which target
    and layers they belong to.
    """

    before_norm = True  # last hidden states are those before the final norm

    def __init__(self, folder, data, shape):
        """data: the splits; shape: auxiliary layers and the last one, and hidden size."""
        self.folder = Path(folder)
        self.data = data
        self.shape = shape
        self.layer_count = shape[0] - 1  # auxiliary layers
        self.refresh()

    def refresh(self):
        """As Store.refresh."""
        self.rows = {}
        for split in self.data:
            for path in self.path(split, 0).parent.glob("hs_*.safetensors"):
                number = path.stem.removeprefix("hs_")
                self.rows[f"{split}/{number}"] = (path.relative_to(self.folder), None)

    def flush(self, wait=False):
        """Nothing: the files are only read."""

    def path(self, split, number):
        return self.folder / ("" if split == "train" else split) / f"hs_{number}.safetensors"

    def read(self, row):
        """As Store.read, with last_hidden_states from before the final norm."""
        split, number = row.split("/")
        input_ids, loss_mask = (torch.tensor(self.data[split][int(number)][name]) for name in dataloader.COLUMNS)
        states, problem = read_extracted(self.path(split, number), input_ids.tolist(), self.shape)
        if problem:
            return None, problem
        count, teachers = slots.tokens_read(loss_mask)
        auxiliary = states[:count, :-1].flatten(1)
        last = states[teachers, -1]
        names = (*dataloader.COLUMNS, *hidden_states.STATES)
        return dict(zip(names, (input_ids, loss_mask, auxiliary, last), strict=True)), ""


def read_extracted(path, input_ids, shape):
    """(hidden_states [T, layers, Ht], "") of a file of vLLM's extractor, or (None, the problem with it)."""
    try:
        with safe_open(path, "pt") as file:
            states = file.get_tensor("hidden_states")
            tokens = file.get_tensor("token_ids").tolist()
    except FileNotFoundError:
        return None, "missing"
    except (OSError, SafetensorError):
        return None, "damaged"
    if tokens != input_ids:
        return None, "of other tokens"
    if states.shape != (len(tokens), *shape):
        return None, f"of shape {tuple(states.shape)}"
    return states, ""


def request(args, path, body=None):
    """The JSON that the server answers."""
    return server.request_answer(args.vllm_endpoint, path, body, args.request_timeout)


def ask_for(args, what, work):
    """work()'s result, tried max_retries times again. ServerFailed."""
    return server.keep_asking(f"vllm_endpoint {args.vllm_endpoint}", what, args.max_retries, work)


def served_model(args, model_dir, longest):
    """The name under which the server has the target; ends the program if it has another, or reads too few tokens."""
    named = args.target_model_path
    model = server.find_served(
        "vllm_endpoint",
        args.vllm_endpoint,
        [named, model_dir],
        args.max_retries,
        args.request_timeout,
        f"start it with that one, or if it is, with --served-model-name {named}",
    )
    if longest >= (model.get("max_model_len") or longest + 1):  # one token is generated
        common.fail(
            f"vllm_endpoint {args.vllm_endpoint} reads {model['max_model_len']} tokens, a row of the data has "
            f"{longest}: start it with --max-model-len {longest + 1}"
        )
    return model["id"]


class Server:
    """A vLLM server started with extract_hidden_states: it answers with the path of a file in a shared folder."""

    def __init__(self, args, model, shape):
        self.args = args
        self.model = model
        self.shape = shape
        self.pool = ThreadPool(REQUESTS)
        self.asked = defaultdict(list)  # lists, because a row may end one epoch and begin the next

    def ask(self, row, input_ids):
        """Send a request; at most REQUESTS are under way."""

        def work():
            return self.generate(input_ids)

        result = self.pool.apply_async(ask_for, (self.args, f"row {row}", work))
        self.asked[row].append(result)

    def take(self, row):
        """hidden_states [T, layers, Ht] of a row that was asked for, on the CPU; ServerFailed."""
        return self.asked[row].pop(0).get()

    def generate(self, input_ids):
        """One request. The server holds the lock of its file until the file is complete; both are removed once read."""
        end = time.monotonic() + self.args.request_timeout
        body = {"model": self.model, "prompt": input_ids, "max_tokens": 1, "return_token_ids": True}
        answer = request(self.args, "completions", body)
        path = (answer.get("kv_transfer_params") or {}).get("hidden_states_path")
        if not isinstance(path, str) or not path.endswith(".safetensors"):
            raise server.ServerFailed(
                "its answer names no file of hidden states: start it with extract_hidden_states, as "
                "examples/run_llama3_vllm.sh does"
            )
        for name in (f"{path}.lock", path):  # opening a pipe, for example, would wait
            if Path(name).exists() and not Path(name).is_file():
                raise server.ServerFailed(f"{name}, which its answer names, is not a file")
        try:
            with open(f"{path}.lock") as lock:
                while not locked(lock):
                    if time.monotonic() > end:
                        raise TimeoutError(f"{path} is still being written")
                    time.sleep(0.005)
                states, problem = read_extracted(path, input_ids, self.shape)
                states = states if problem else states.clone()  # it lies in the file's pages
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}: its folder must be seen here under the same path") from error
        if problem in ("missing", "damaged"):
            raise OSError(f"{path} is {problem}")
        if problem or answer["choices"][0].get("prompt_token_ids", input_ids) != input_ids:
            raise server.ServerFailed(
                f"what it gives is {problem or 'of other tokens'}, not {len(input_ids)} x {self.shape}"
            )
        for name in (f"{path}.lock", path):  # it is the answer to this request, and nobody else's file
            Path(name).unlink(missing_ok=True)
        return states


def locked(file):
    """Whether a shared lock can be had of a file now; closing it gives it back."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
