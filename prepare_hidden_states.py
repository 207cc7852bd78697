"""The target model: which layers are read, how it is loaded, and what it says about a text.

In:  a target in a Hugging Face folder (one safetensors file or several, tied embeddings or not); concatenated tokens.
Out: per token the auxiliary hidden states [3·Ht] and the last hidden state [Ht] (after the final norm), and from the
     latter the teacher: the distribution over the draft vocabulary and the full-vocabulary argmax.

train_eagle3.py imports this file and keeps the target in memory. To look at what a target gives for a text:

    python prepare_hidden_states.py --target_model_path meta-llama/Llama-3.1-8B-Instruct --text "Hello, how are you?"
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from prepare_data import SMALL_FILES, boolean, fail, load_tokenizer, locate, normalise_argv

MIN_TARGET_LAYERS = 7  # below that 2, L//2 and L-3 are not three distinct layers
# Keys under which transformers' model families keep a factor of their logits. Some multiply by it and some divide
# (Granite divides by logits_scaling, HyperCLOVA X multiplies): which one holds is found out by a forward of the model.
LOGIT_SCALE_KEYS = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")


def start_distributed(timeout, local_rank=-1):
    """Join the process group that the variables of a launcher or a service describe, or be a group of one.

    timeout: minutes that a collective may take. local_rank: the launcher's flag, -1 = from the variables. Returns the
    device of this rank.
    """
    import deepspeed

    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    cuda = torch.cuda.is_available()
    if local_rank < 0:  # some services set RANK alone: ranks are dealt to a node's devices in turn
        local_rank = int(os.environ["RANK"]) % torch.cuda.device_count() if cuda else 0
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    # DeepSpeed builds its C++ helper with the ninja that it finds: the environment's own, activated or not.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=timeout)
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=timeout, verbose=False)
    return device


def on_first_rank(work):
    """Run work() on rank 0 while the others wait, and give them its result; if it ends the program, all end."""
    result = [None, 1]
    if dist.get_rank() == 0:
        try:
            result = [work(), 0]
        except SystemExit as stop:
            result[1] = stop.code
            raise
        finally:
            dist.broadcast_object_list(result)
    else:
        dist.broadcast_object_list(result)
        if result[1]:
            sys.exit(result[1])
    return result[0]


@dataclass
class Head:
    """The target's output head: logits = scale · (W h + b), and with a soft cap c: c · tanh(logits / c)."""

    weight: torch.Tensor  # [V, Ht]
    bias: torch.Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden):
        """Logits [N, V] of hidden states [N, Ht] (after the final norm), in fp32 at least."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits * self.scale if self.scale != 1 else logits
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def teach(self, hidden, draft_ids):
        """What the target says about the next token: p [N, Vd] over the draft vocabulary, in fp32 at least; mass [N], the
        share of the whole that this is; argmax [N] over the full vocabulary (the lowest id among equals).

        hidden [N, Ht]: few rows at a time, as [N, V] logits are formed. draft_ids [Vd]: target ids, ascending.
        """
        logits = self.logits(hidden)
        best, total = logits.argmax(dim=-1), logits.logsumexp(dim=-1)
        if len(draft_ids) < logits.shape[1]:
            logits = logits[:, draft_ids]
        return logits.softmax(dim=-1), (logits.logsumexp(dim=-1) - total).exp(), best


def positions_of(lengths, device=None):
    """Position ids [sum(lengths)] int64 that restart with every sequence."""
    return torch.cat([torch.arange(n, device=device) for n in lengths])


@dataclass
class Target:
    """A frozen target and its pieces. Sizes: Ht hidden, V vocabulary, L layers."""

    model: torch.nn.Module  # the whole causal language model
    config: object  # its text configuration
    head: Head
    embedding: torch.Tensor  # [V, Ht], without any factor that the family puts on its embeddings
    layer_ids: list  # in transformers' hidden_states indexing: 0 = embeddings, i = after i layers
    packs: bool = True  # whether the family ends attention at the borders of concatenated sequences
    captured: dict = field(default_factory=dict)

    def __post_init__(self):
        self.decoder = self.model.get_decoder()
        if not hasattr(self.decoder, "layers"):
            fail(f"the layers of model_type {self.config.model_type} are not where hooks look: it is not supported")
        for index in self.layer_ids:
            # hidden_states[0] is what enters the first layer; hidden_states[i] what the i-th leaves behind.
            if index == 0:
                self.decoder.layers[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
            else:
                self.decoder.layers[index - 1].register_forward_hook(self._keep_output(index))

    def _keep_input(self, module, args, kwargs):
        self.captured[0] = args[0] if args else kwargs["hidden_states"]

    def _keep_output(self, index):
        def hook(module, args, output):
            self.captured[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def hidden_states(self, input_ids, lengths):
        """One forward over concatenated sequences, without the head.

        input_ids [T] int64 with T = sum(lengths). Positions restart and attention ends at every sequence's border: with
        neither mask nor cache, most families read the borders off the position ids. For those that do not, the
        sequences are padded at the right, which no causal model can see from the left.
        Returns auxiliary hidden states [T, 3·Ht] and the last hidden state [T, Ht], in the target's dtype.
        """
        keep, positions = 0, positions_of(lengths, input_ids.device)[None]
        input_ids = input_ids[None]
        if not self.packs:
            input_ids = pad_sequence(input_ids[0].split(lengths), batch_first=True)
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            keep = positions < torch.tensor(lengths, device=input_ids.device)[:, None]
        with torch.inference_mode():
            output = self.decoder(input_ids=input_ids, position_ids=positions, use_cache=False)
        # Copied outside inference mode: autograd refuses to save an inference tensor for the draft's backward.
        return self.auxiliary(keep), output.last_hidden_state[keep].clone()

    def states(self, batches, batch_size):
        """Yield (auxiliary [T, 3·Ht], last [T, Ht]) of each of batches: {"input_ids" [T], "lengths": its sequences'}.

        batch_size sequences share one forward, across batches.
        """
        sequences = [ids for batch in batches for ids in batch["input_ids"].split(batch["lengths"])]
        ready = []
        for batch in batches:
            while len(ready) < len(batch["lengths"]):
                group, sequences = sequences[:batch_size], sequences[batch_size:]
                lengths = [len(ids) for ids in group]
                ready += zip(*(x.split(lengths) for x in self.hidden_states(torch.cat(group), lengths)), strict=True)
            mine, ready = ready[: len(batch["lengths"])], ready[len(batch["lengths"]) :]
            yield tuple(map(torch.cat, zip(*mine, strict=True)))

    def auxiliary(self, keep=0):
        """The auxiliary hidden states [T, 3·Ht] that the last forward left behind; keep: which of [batch, tokens]."""
        return torch.cat([self.captured.pop(index)[keep] for index in self.layer_ids], dim=-1)


def resolve_target(path_or_hub_id, weights=True):
    """The folder with config.json and weights of a snapshot, of the one model below a folder, of MLflow or a hub id.

    weights=False downloads only the small files of a hub id. Ends with one line if there is no such model.
    """
    model_dir = locate(path_or_hub_id, ["config.json"], SMALL_FILES + ["*.safetensors"] * weights)
    if weights and not any(model_dir.glob("*.safetensors")):  # on the hub there may be weights in the older format
        model_dir = locate(path_or_hub_id, ["config.json"], [*SMALL_FILES, "*.bin"])
    if model_dir.name == "config" and (model_dir.parent / "model").is_dir():
        return _link_together(model_dir, model_dir.parent / "model")
    return model_dir


def _link_together(*folders):
    """One folder of links in the hub's cache: transformers wants one folder, and the input may be mounted read-only."""
    files = {path.name: path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()}
    name = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    merged = Path(constants.HF_HOME) / "mlflow_models" / name
    merged.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        with contextlib.suppress(FileExistsError):  # another rank was faster
            (merged / name).symlink_to(path)
    return merged


def read_target_config(model_dir, trust_remote_code=False):
    """(text configuration, whole configuration) of a target folder; ends the program if it cannot train a draft."""
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        fail(f"target_model_path {model_dir}: its config.json cannot be read: {str(error).splitlines()[0]}")
    text = config.get_text_config()
    if text.num_hidden_layers < MIN_TARGET_LAYERS:
        fail(
            f"the target {model_dir} has {text.num_hidden_layers} layers; EAGLE-3 reads three distinct ones "
            f"(2, L//2, L-3), which needs at least {MIN_TARGET_LAYERS}"
        )
    return text, config


def default_layer_ids(num_layers):
    """The auxiliary layers 2, L//2, L-3 in hidden_states indexing (the default of SGLang and vLLM)."""
    return [2, num_layers // 2, num_layers - 3]


def load_target(model_dir, device="cpu", dtype="auto", layer_ids=None, trust_remote_code=False):
    """The target in memory, frozen, ready for hidden_states(); dtype "auto" is the one it was saved in.

    Loads with transformers, so single-file, sharded and tied weights need nothing here. Before it is used, its logits
    are compared with what Head makes of the last hidden state: a family that forms them otherwise ends the program.
    """
    text, _ = read_target_config(model_dir, trust_remote_code)
    layers, layer_ids = text.num_hidden_layers, list(layer_ids or default_layer_ids(text.num_hidden_layers))
    if not all(0 <= index <= layers for index in layer_ids) or len(set(layer_ids)) != len(layer_ids):
        fail(f"auxiliary layers {layer_ids}: must be distinct and within 0..{layers}, the layers of {model_dir}")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(  # straight to the device: a copy a rank fits no host memory
            model_dir, dtype=dtype, device_map={"": device}, trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        fail(f"the target {model_dir} cannot be loaded: {str(error).strip().splitlines()[0]}")
    if info["missing_keys"]:  # transformers would go on with random values
        fail(f"the weights of the target {model_dir} lack {', '.join(sorted(info['missing_keys'])[:5])}")
    model.eval().requires_grad_(False)
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight.detach()
    head = Head(output.weight.detach(), None if output.bias is None else output.bias.detach())
    target = Target(model, text, head, embedding, layer_ids)
    _fit_head(target)
    target.packs = _ends_at_borders(target)
    return target


def _probe(target, count):
    """`count` token ids to try the target on."""
    return torch.arange(1, count + 1, device=target.embedding.device) % len(target.embedding)


def _fit_head(target):
    """Find scale and soft cap of the target's logits by one forward of the whole model; fail if nothing fits."""
    config, head, ids = target.config, target.head, _probe(target, 8)
    with torch.inference_mode():
        own = target.model(input_ids=ids[None], use_cache=False).logits[0].float()
    _, last = target.hidden_states(ids, [len(ids)])
    scales = [1.0]
    for value in (getattr(config, key, None) for key in LOGIT_SCALE_KEYS):
        if isinstance(value, int | float) and not isinstance(value, bool) and value:
            scales += [float(value), 1 / value]
    cap = getattr(config, "final_logit_softcapping", None)
    gaps = {}
    for softcap in dict.fromkeys((cap or None, None)):
        for scale in scales:
            head.scale, head.softcap = scale, softcap
            gaps[scale, softcap] = float((head.logits(last) - own).abs().max())
    head.scale, head.softcap = best = min(gaps, key=gaps.get)  # the best, as small logits fit several
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 2e-2  # bf16 rounds logits to 3 digits
    if not gaps[best] <= tolerance * own.abs().max():
        fail(
            f"the target's logits are not its head applied to its last hidden state (model_type {config.model_type}, "
            f"tried scales {scales}, soft cap {cap}, smallest difference {gaps[best]:.3g} of logits up to "
            f"{own.abs().max():.3g}): this family is not supported"
        )


def _ends_at_borders(target):
    """Whether a sequence gets the same states behind another one as alone; some families ignore the position ids."""
    ids, count = _probe(target, 24), 16
    behind, alone = target.hidden_states(ids, [count, 8])[1][count:], target.hidden_states(ids[count:], [8])[1]
    gaps = (behind - alone).float().norm(dim=-1) / alone.float().norm(dim=-1)
    # The median, because rounding may send single tokens to other experts. What leaks in shows in every token.
    return bool(gaps.median() < (1e-4 if alone.dtype == torch.float32 else 2e-2))


def read_target_tensor(model_dir, names):
    """The first tensor of `names` that a target's safetensors files hold, read alone; if none, the program ends."""
    model_dir = Path(model_dir)
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
    elif (model_dir / "model.safetensors").exists():
        with safe_open(model_dir / "model.safetensors", "pt") as file:
            weight_map = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        fail(f"{model_dir} has neither model.safetensors nor model.safetensors.index.json")
    for name in names:
        if name in weight_map:
            with safe_open(model_dir / weight_map[name], "pt") as file:
                return file.get_tensor(name)
    fail(f"{model_dir} holds none of the tensors {', '.join(names)}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--target_model_path", required=True, help="folder or hub id of the target")
    parser.add_argument("--text", required=True, help="text to run the target on")
    parser.add_argument("--target_layer_ids", type=int, nargs="+", help="auxiliary layers (default: 2 L//2 L-3)")
    parser.add_argument("--trust_remote_code", type=boolean, nargs="?", const=True, default=False,
                        help="run code that comes with the target (default: false)")  # fmt: skip
    parser.error = fail
    return parser.parse_args(normalise_argv(sys.argv[1:] if argv is None else argv))


def main(args):
    model_dir = resolve_target(args.target_model_path)
    tokenizer = load_tokenizer(args.target_model_path, args.trust_remote_code)
    ids = tokenizer(args.text)["input_ids"]
    if not ids:
        fail("text has no tokens")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = load_target(model_dir, device, layer_ids=args.target_layer_ids, trust_remote_code=args.trust_remote_code)
    ids = torch.tensor(ids, device=device)
    auxiliary, last = target.hidden_states(ids, [len(ids)])
    best, argmax = target.head.logits(last).log_softmax(dim=-1).max(dim=-1)
    print(f"layers {target.layer_ids} of {target.config.num_hidden_layers}, logit scale {target.head.scale}, "
          f"soft cap {target.head.softcap}, auxiliary {tuple(auxiliary.shape)}, last {tuple(last.shape)}")  # fmt: skip
    for token, follows, p in zip(ids.tolist(), argmax.tolist(), best.tolist(), strict=True):
        print(f"{tokenizer.decode([token])!r:>20} -> {tokenizer.decode([follows])!r:<20} {math.exp(p):.3f}")


if __name__ == "__main__":
    main(parse_args())
