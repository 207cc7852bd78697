"""The target in memory: its head, its hidden states, how ranks share it.

A target is loaded by transformers and frozen. Per token it gives auxiliary hidden states [layers·Ht] and the last one
[Ht] (after the final norm), and from the latter the teacher: the distribution over the draft vocabulary and the argmax
over the full one.
"""

import contextlib
import copy
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    initialization,
)
from transformers.distributed import DistributedConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.modeling_utils import load_state_dict
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging

from core import common, ranks, slots, target_attention, target_files

# Keys under which transformers' model families keep a factor of their logits. Some multiply by it and some divide
# (Granite divides by logits_scaling, HyperCLOVA X multiplies): which one holds is found out by a forward of the model.
LOGIT_SCALE_KEYS = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")

# Tensors of a target's layers that its values do not depend on: tables that are computed anew, and the scales of an
# engine's 8-bit cache and activations.
HARMLESS = re.compile(r"inv_freq$|(cos|sin)_cached$|\b(kv?|v|q|input|activation|output)_scale$")

# Tensors that stand for quantised weights, or belong to them.
QUANTISED = re.compile(r"(scales?|scale_inv|scale_\d|absmax|quant_map|quant_state\.\w+|qweight|qzeros|g_idx|packed)$")


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
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def teacher(self, hidden, draft_ids):
        """What the target predicts as the next token, for hidden states [N, Ht].

        Returns p [N, Vd], the distribution over the draft vocabulary, in fp32 at least; mass [N], the share of the
        target's probability that lies in it; and the argmax [N] over the full vocabulary (the lowest id among equals).
        Call it with few rows at a time: logits [N, V] are computed. draft_ids [Vd]: target ids, ascending.
        """
        logits = self.logits(hidden)
        top, best = logits.max(dim=-1)
        top_share = logits.softmax(dim=-1).gather(1, best[:, None])[:, 0]  # the logsumexp is top - log(top_share)
        if len(draft_ids) < logits.shape[1]:
            logits = logits[:, draft_ids]
        p = logits.softmax(dim=-1)
        drafted, index = logits.max(dim=-1)
        drafted_share = p.gather(1, index[:, None])[:, 0]
        mass = (drafted - top).exp() * top_share / drafted_share
        return p, mass, best


@dataclass
class Target:
    """A frozen target and its pieces. Sizes: Ht hidden, V vocabulary, L layers."""

    model: torch.nn.Module  # the complete causal language model; None if its hidden states come from elsewhere
    config: object  # its text configuration
    head: Head
    embedding: torch.Tensor  # [V, Ht], without any factor that the family puts on its embeddings
    layer_ids: list  # in transformers' hidden_states indexing: 0 = embeddings, i = after i layers
    packs: bool = False  # whether target_attention takes the place of the family's attention
    norm: torch.nn.Module | None = None  # the final norm, where there is no model
    captured: dict = field(default_factory=dict)

    def __post_init__(self):
        self.decoder = self.model and find_decoder(self.model)
        if self.decoder is None:
            return
        layers = find_layers(self.model)
        for index in self.layer_ids:
            # hidden_states[0] is what enters the first layer; hidden_states[i] what the i-th leaves behind.
            if index == 0:
                layers[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
            else:
                layers[index - 1].register_forward_hook(self._keep_output(index))

    def _keep_input(self, module, args, kwargs):
        self.captured[0] = args[0] if args else kwargs["hidden_states"]

    def _keep_output(self, index):
        def hook(module, args, output):
            self.captured[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def hidden_states(self, input_ids, lengths, first=0, end=None):
        """One forward over concatenated sequences, without the head.

        input_ids [T] int64 with T = sum(lengths). Positions restart at every sequence's border, and attention ends
        there (core/target_attention.py). For families of another attention the sequences are padded at the right,
        which no causal model can see from the left.
        Returns auxiliary hidden states [T', 3·Ht] and the last hidden state [T', Ht] of the sequences first to end, in
        the target's dtype.
        """
        device = input_ids.device
        if end is None:
            end = len(lengths)
        if self.packs:
            keep = (0, slice(sum(lengths[:first]), sum(lengths[:end])))
            input_ids = input_ids[None]
            positions = slots.positions_of(lengths, device)[None]
            attention = target_attention.each_alone(self.decoder, lengths)
        else:
            input_ids = pad_sequence(input_ids.split(lengths), batch_first=True)
            positions = torch.arange(input_ids.shape[1], device=device).expand_as(input_ids)
            keep = positions < torch.tensor(lengths, device=device)[:, None]
            keep[:first] = False
            keep[end:] = False
            attention = contextlib.nullcontext()
        with attention, torch.no_grad():  # not inference mode: FSDP, in a copy for several groups of ranks, fails in it
            output = self.decoder(input_ids=input_ids, position_ids=positions, use_cache=False)
        last = output.last_hidden_state[keep]
        if self.packs:
            last = last.clone()  # a slice would keep all of the group's states
        return self.auxiliary(keep), last

    def auxiliary(self, keep=0):
        """The auxiliary hidden states [T, 3·Ht] that the last forward left behind; keep: which of [batch, tokens]."""
        return torch.cat([self.captured.pop(index)[keep] for index in self.layer_ids], dim=-1)


def automatic_class(config):
    """transformers' class that finds a target's own: few families that see are among the causal language models."""
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


SHARDINGS = ("none", "tp", "zero3")
OFFLOADS = ("none", "cpu", "nvme")


def add_sharing_flags(parser, batches=True):
    """The flags that say how ranks share the target; batches: whether its forwards take several sequences."""
    add = parser.add_argument_group("how ranks share the target").add_argument
    positive = common.at_least(int, 1)
    if batches:
        what = "sequences per rank in a forward of the target, and in evaluation"
        add("--batch_size", type=positive, default=2, help=what)
    add("--tp_size", type=positive, default=1, help="ranks that share one copy of the target, tensor parallel")
    add("--dp_size", type=int, help="derived: ranks / tp_size; another value is replaced")
    add("--target_sharding", choices=SHARDINGS, help="zero3: gathered layer by layer; none given: as tp_size says")
    place = "where a rank's share of the target stays, under zero3"
    add("--target_offload", choices=OFFLOADS, default="none", help=place)
    add("--target_offload_path", help="folder on the NVMe disk, for target_offload nvme")


def resolve_sharding(args, world):
    """How `world` ranks share the target: none, tp or zero3. Ends the program if they cannot share it so."""
    tp_size = args.tp_size
    offload = args.target_offload
    path = args.target_offload_path
    sharding = args.target_sharding or ("tp" if tp_size > 1 else "none")
    if world % tp_size:
        fitting = [n for n in range(1, world + 1) if world % n == 0]
        below = max(n for n in fitting if n <= tp_size)
        above = min((n for n in fitting if n >= tp_size), default=world)
        near = " or ".join(str(n) for n in sorted({below, above}))
        common.fail(f"tp_size {tp_size} does not divide the {world} ranks; nearest that fit: {near}")
    if (sharding == "tp") != (tp_size > 1):
        common.fail(
            f"target_sharding {sharding} contradicts tp_size {tp_size}: tp needs a tp_size of at least 2, and no other "
            "does"
        )
    if offload != "none" and sharding != "zero3":
        common.fail(f"target_offload {offload} needs target_sharding zero3")
    if (offload == "nvme") != bool(path):
        common.fail(
            f"target_offload {offload} with target_offload_path {path}: nvme needs a folder on the disk, and no other "
            "does"
        )
    if offload == "nvme":
        with contextlib.suppress(OSError):  # which the check names
            Path(path).mkdir(parents=True, exist_ok=True)
        ranks.check_disk("target_offload_path", path)
    if args.dp_size not in (None, world // tp_size):
        print(f"dp_size {args.dp_size} is replaced by {world // tp_size} ({world} ranks / tp_size {tp_size})")
    return sharding


def check_heads(text_config, tp_size):
    """End the program if tensor parallelism cannot divide a target with this text configuration."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text_config, name, None) or tp_size
        if heads % tp_size:
            fitting = [n for n in range(1, heads + 1) if heads % n == 0]
            common.fail(f"tp_size {tp_size} does not divide the target's {heads} {name}; these do: {fitting}")
    if tp_size > 1 and not text_config.base_model_tp_plan:
        common.fail(
            f"transformers has no tensor-parallel plan for model_type {text_config.model_type}: use target_sharding "
            "zero3"
        )


def saved_dtype(model_dir, config):
    """The dtype that a target was saved in: its configuration's or, if that names none, its first weights'."""
    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    if config.dtype is not None:
        return config.dtype
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                dtype = file.get_slice(name).get_dtype()
                if dtype in names:
                    return names[dtype]
    return torch.float32


def find_decoder(model):
    """What a causal language model has below its head, the final norm included."""
    decoder = model.get_decoder()
    return model.model if decoder is model and hasattr(model, "model") else decoder  # Llama 4's is not found


def find_layers(model):
    """The decoder's layers of a causal language model; ends the program if they are not where hooks look."""
    layers = getattr(find_decoder(model), "layers", None)
    if layers is None:
        common.fail(f"the layers of model_type {model.config.model_type} are not where hooks look: it is not supported")
    return layers


def zero3_config(config, device, dtype, offload="none", path=None, trust_remote_code=False):
    """DeepSpeed's configuration under which a target's layers are gathered one by one, the next one ahead of its turn.

    config: the target's; offload: where a rank's share of the weights stays: none (on the device), cpu, or nvme, in the
    folder `path`.
    """
    model = without_values(config, trust_remote_code)
    if dtype == torch.float16 and device.type == "cpu":
        common.fail("target_sharding zero3 has no float16 on CPUs: save the target in bfloat16 or float32")
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in find_layers(model))
    zero = {
        "stage": 3,
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": 2 * layer,
        "stage3_max_reuse_distance": 0,  # nothing is used twice in a pass
        "stage3_param_persistence_threshold": config.get_text_config().hidden_size,  # norms stay
    }
    if offload != "none":
        zero["offload_param"] = {"device": offload, "pin_memory": device.type == "cuda"}
    if offload == "nvme":  # a buffer holds a rank's share of any tensor, however the shares are rounded
        largest = max(p.numel() for p in model.parameters())
        # A folder of this run's own: DeepSpeed empties it.
        path = Path(path) / f"target-of-port-{os.environ['MASTER_PORT']}"
        zero["offload_param"] |= {"nvme_path": str(path), "buffer_size": largest // dist.get_world_size() + 4096}
    return {
        "train_micro_batch_size_per_gpu": 1, "steps_per_print": sys.maxsize, "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16},
    }  # fmt: skip


def without_values(config, trust_remote_code):
    """A target without values, made as `from_pretrained` makes one before it reads them."""
    with torch.device("meta"), initialization.meta_device_safe_creation_ops():
        return automatic_class(config).from_config(config, trust_remote_code=trust_remote_code)


def full_tensor(parameter):
    """A parameter's values on this rank's device, though ranks may share it out; None stays None."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameter):
            return parameter.detach().clone()
    parameter = parameter if parameter is None else parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def load(
    model_dir,
    device="cpu",
    dtype="auto",
    layer_ids=None,
    trust_remote_code=False,
    sharding="none",
    tp_size=1,
    offload="none",
    offload_path=None,
):
    """The target in memory, frozen, ready for hidden_states(); dtype "auto" is the one it was saved in.

    sharding "tp": tp_size consecutive ranks share its layers; "zero3": all ranks share them and gather them one by one,
    from where `offload` says. Then all ranks call this, and each forward. The head and the embedding table are complete
    on every rank: with a part of the head, ranks would exchange 4·Vd bytes of probabilities for each token instead of
    2·Ht bytes of hidden states.

    transformers loads single-file, sharded and tied weights alike. Before the target is used, its logits are compared
    with what Head makes of the last hidden state: a family that forms them otherwise ends the program.
    """
    device = torch.device(device)
    text_config, config = target_files.read_target_config(model_dir, trust_remote_code)
    layer_ids = list(layer_ids or target_files.default_layer_ids(text_config.num_hidden_layers))
    check_layers(model_dir, layer_ids, text_config.num_hidden_layers)
    options = {"device_map": {"": device}}  # straight to the device: host memory does not hold a copy for each rank
    zero3 = None
    if sharding == "tp":
        copies = dist.get_world_size() // tp_size
        several = {"dp_replicate_size": copies} if copies > 1 else {}
        options = {"distributed_config": DistributedConfig(tp_size=tp_size, **several)}
    elif sharding == "zero3":
        options = {}
        if dtype == "auto":
            dtype = saved_dtype(model_dir, config)
        zero3 = zero3_config(config, device, dtype, offload, offload_path, trust_remote_code)
    options["dtype"] = dtype
    model = read_model(model_dir, config, sharding, zero3, trust_remote_code, options)
    if offload != "nvme":  # where no values are in memory
        check_finite(model_dir, model)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if zero3:
        partition(model, zero3)
    inputs = model.get_input_embeddings()
    output = model.get_output_embeddings()
    head = Head(full_tensor(output.weight), full_tensor(output.bias))
    embedding = head.weight if tied else full_tensor(inputs.weight)
    ties = all(getattr(part, "tie_word_embeddings", False) for part in (config, text_config))
    precisions = (embedding.dtype, torch.bfloat16, torch.float16)  # one of the two may have been saved in a lower one
    if ties and not any(torch.equal(head.weight.to(dtype), embedding.to(dtype)) for dtype in precisions):
        common.fail(
            f"the target {model_dir} has a head other than its embedding table, though its config.json ties them "
            "(tie_word_embeddings): engines would serve another model; correct config.json"
        )
    if zero3:  # the full tensors take the place of the partitioned ones
        output = torch.nn.Linear(1, 1, device="meta")
        output.weight = frozen(head.weight)
        output.bias = frozen(head.bias)
        model.set_output_embeddings(output)
        inputs.weight = frozen(embedding)
    target = Target(model, text_config, head, embedding, layer_ids)
    _fit_head(target)
    target.packs = _can_pack(target)
    return target


def check_layers(model_dir, layer_ids, count):
    """End the program if these are not distinct auxiliary layers of a target with `count` layers."""
    inside = all(0 <= index <= count for index in layer_ids)
    if not inside or len(set(layer_ids)) != len(layer_ids):
        common.fail(f"auxiliary layers {layer_ids}: must be distinct and within 0..{count}, the layers of {model_dir}")


def read_model(model_dir, config, sharding, zero3, trust_remote_code, options):
    """transformers' model of a target, frozen; zero3: DeepSpeed's configuration under which it is partitioned, or None.

    Ends the program if the weights cannot be read or are not complete.
    """
    partitioned = HfDeepSpeedConfig(zero3) if zero3 else None  # from_pretrained finds it as long as it lives
    try:
        model, info = automatic_class(config).from_pretrained(
            model_dir,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # of several libraries and the family's own code
        if sharding != "none" and isinstance(error, RuntimeError):  # it may be another rank's
            raise
        fail_loading(model_dir, error)
    finally:
        unset_hf_deepspeed_config()
        del partitioned
    check_complete(model_dir, model, info)
    return model.eval().requires_grad_(False)


# ==================== What a target's files have to be ===============================================================


def check_weights(model_dir, config, trust_remote_code=False):
    """End the program if a target's weights are not what its config.json says; reads their names and shapes alone."""
    target_files.weight_files(model_dir)
    if any(Path(model_dir).glob("adapter_model.*")) and Path(model_dir, target_files.ADAPTER).exists():
        common.fail(
            f"the target {model_dir} has an adapter beside its weights, which transformers applies only where peft is "
            f"installed: merge it by import_target.py, or remove {target_files.ADAPTER}"
        )
    if Path(model_dir, target_files.ADAPTER).exists():
        common.fail(
            f"the target {model_dir} has complete weights and an {target_files.ADAPTER} without an adapter, which "
            "transformers would look for: remove that file, or make a copy without it by import_target.py"
        )
    check_names(model_dir, config, trust_remote_code)


def quantisation(config):
    """A target's quantization_config, which may be that of its text part; None if there is none."""
    parts = (config, config.get_text_config())
    return next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)


def check_names(model_dir, config, trust_remote_code=False):
    """End the program if a target's weights do not have the names and shapes of its config.json."""
    declared = quantisation(config)
    if not declared:
        check_not_quantised(model_dir)
    elif check_quantisation(model_dir, declared) != "fp8":  # others need values; check_complete follows when they load
        return
    try:
        with quiet():
            model, info = load_names(model_dir, config, trust_remote_code)
    except Exception as error:  # of several libraries and the family's own code
        if getattr(config, "auto_map", None):  # code that may need values: loading checks again
            return
        fail_loading(model_dir, error)
    check_complete(model_dir, model, info)


def load_names(model_dir, config, trust_remote_code):
    """A target without values, and what transformers says of the names and shapes in its files."""
    tensors = {}
    for path in target_files.weight_files(model_dir):
        tensors |= load_state_dict(path, map_location="meta")
    model = without_values(config, trust_remote_code)
    return type(model).from_pretrained(
        None,
        config=model.config,  # the text's alone, where the class is of text alone
        state_dict=tensors,
        device_map={"": "meta"},
        dtype=torch.bfloat16,
        ignore_mismatched_sizes=True,  # check_complete names them
        output_loading_info=True,
        trust_remote_code=False,
    )


def fail_loading(model_dir, error):
    """End the program with the first line of what loading a target has raised."""
    problem = (str(error).strip().splitlines() or [""])[0]
    common.fail(f"the target {model_dir} cannot be loaded: {type(error).__name__}: {problem}")


def check_not_quantised(model_dir):
    """End the program if the weights of a target are quantised, though its config.json says nothing of it."""
    headers = target_files.read_headers(model_dir)
    small = [name for name, tensor in headers.items() if tensor["dtype"].startswith(("F8", "F4"))]
    packed = [name for name, tensor in headers.items() if "weight" in name and tensor["dtype"][0] in "IU"]
    if small or packed:
        common.fail(
            f"the target {model_dir} has quantised weights, {list_names(small + packed)}, but its config.json has no "
            "quantization_config: their scales would be left out; give the unquantised target"
        )


def check_quantisation(model_dir, declared):
    """The method of a quantization_config; ends the program if transformers does not read it, or a package is missing.

    declared: a dictionary, or an object of transformers.
    """
    declared = declared if isinstance(declared, dict) else declared.to_dict()
    method = declared.get("quant_method")
    try:
        with quiet():
            if not AutoHfQuantizer.supports_quant_method(declared):
                raise ValueError(f"transformers does not read quant_method {method}, its scales would be left out")
            AutoHfQuantizer.from_config(declared, pre_quantized=True).validate_environment()
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        problem = str(error).strip().splitlines()[0].rstrip(".")
        common.fail(f"the target {model_dir} is quantised: {problem}; else give the unquantised target")
    return method


def check_complete(model_dir, model, info):
    """End the program if weights are missing, as transformers would go on with random ones, or would be left out."""
    missing = info["missing_keys"]
    unexpected = sorted(info["unexpected_keys"])
    if missing:
        there = f"; they have {list_names(unexpected)} instead" if unexpected else ""
        if missing == {"lm_head.weight"} and not unexpected:
            there = "; if its head is the embedding table, set tie_word_embeddings in config.json to true"
        common.fail(f"the weights of the target {model_dir} do not have {list_names(missing)}{there}")
    for name, shape, wanted in sorted(info["mismatched_keys"]):
        common.fail(
            f"the target {model_dir} has {name} of shape {list(shape)}, by its config.json {list(wanted)}: correct "
            "config.json, such as its vocab_size"
        )
    lost = left_out(model, unexpected)
    if any(QUANTISED.search(name) for name in lost):
        common.fail(
            f"the target {model_dir} is quantised in a form that transformers does not read, {list_names(lost)} would "
            "be left out: give the target's unquantised weights"
        )
    if lost:
        common.fail(
            f"the target {model_dir} has {list_names(lost)}, which a model of its config.json (model_type "
            f"{model.config.model_type}) does not have: they would be left out; correct config.json"
        )


def left_out(model, names):
    """Those of the tensors' names that belong to a module of the model, or to one of its layers.

    Others are of parts that the model does not use, such as layers that predict several tokens, or a vision tower.
    """
    modules = dict(model.named_modules())
    layers = find_layers(model)
    place = next(name for name, module in modules.items() if module is layers)
    inside = tuple(f"{place}.{index}." for index in range(len(layers)))
    found = [name for name in names if name.rpartition(".")[0] in modules or name.startswith(inside)]
    return [name for name in found if not HARMLESS.search(name)]


def list_names(names):
    """The first names and how many there are."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check_finite(model_dir, model):
    """End the program if weights of a target that this rank holds are NaN or infinite.

    No collective: a rank may load the target alone, and a rank that ends here ends the others.
    """
    bad = []
    for name, parameter in model.named_parameters():
        part = own_part(parameter)
        if part.is_floating_point() and part.itemsize > 1 and not part.isfinite().all():
            bad.append(name)
    if bad:
        common.fail(f"weights of the target {model_dir} are NaN or infinite: {list_names(bad)}")


def own_part(parameter):
    """What this rank holds of a parameter's values."""
    return getattr(parameter, "ds_tensor", parameter.to_local() if isinstance(parameter, DTensor) else parameter)


@contextlib.contextmanager
def quiet():
    """Without transformers' progress bar, and its table of the tensors that are left out."""
    verbosity = logging.get_verbosity()
    shows_progress = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


# ==================== Parts of a loaded target =======================================================================


def partition(model, zero3):
    """Have DeepSpeed gather the decoder's layers one by one.

    The embedding table is not gathered in each forward, nor is the head: both are complete on every rank.
    """
    import deepspeed

    inputs = model.get_input_embeddings()
    model.set_input_embeddings(torch.nn.Identity())
    deepspeed.initialize(model=find_decoder(model), config=zero3)
    model.set_input_embeddings(inputs)


def frozen(tensor):
    """A parameter without gradient; None stays None."""
    return None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)


def share_of_weights(target, args, sharding, row_tokens):
    """One line: what this rank holds of the target's weights, and what a forward moves; row_tokens: a row's average."""
    kind = target.config.model_type
    if target.decoder is None:
        return f"{kind}, head and embedding alone, hidden states of {args.hidden_states_path or 'the server'}"
    total = mine = moved = 0.0  # GB
    for p in target.decoder.parameters():
        part = own_part(p)
        total += getattr(p, "ds_numel", p.numel()) * p.itemsize / 1e9
        moved += getattr(p, "ds_numel", 0) * p.itemsize / 1e9
        mine += part.numel() * p.itemsize / 1e9
    line = f"{kind}, {mine:.3g} of {total:.3g} GB of weights on each rank"
    if not target.packs:
        line += ", the sequences of a forward padded to the longest, as its attention needs"
    if sharding == "tp":
        line += f", tensor parallel over {args.tp_size}"
    if sharding == "zero3":
        place = {"none": "", "cpu": ", in CPU memory", "nvme": f", in {args.target_offload_path}"}[args.target_offload]
        a_token = 1000 * moved / (args.batch_size * row_tokens)
        line += (
            f" (zero3{place}); a forward moves {moved:.3g} GB to each: {a_token:.3g} MB a token, as "
            f"{args.batch_size} sequences of {row_tokens:.0f} tokens share it"
        )
    return line


def _probe(target, count):
    """`count` token ids to try the target on."""
    return torch.arange(1, count + 1, device=target.embedding.device) % len(target.embedding)


def _fit_head(target):
    """Find scale and soft cap of the target's logits by one forward of the complete model; fail if nothing fits."""
    config = target.config
    head = target.head
    ids = _probe(target, 8)
    with torch.no_grad():
        own = target.model(input_ids=ids[None], use_cache=False).logits[0].float()
        last = target.decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    if any(states.shape[-2:] != last.shape or states.dim() != 3 for states in target.captured.values()):
        common.fail(f"the layers of model_type {config.model_type} give several states a token: it is not supported")
    scales = [1.0]
    for value in (getattr(config, key, None) for key in LOGIT_SCALE_KEYS):
        if isinstance(value, int | float) and not isinstance(value, bool) and value:
            scales += [float(value), 1 / value]
    cap = getattr(config, "final_logit_softcapping", None)
    gaps = {}
    for softcap in dict.fromkeys((cap or None, None)):
        for scale in scales:
            head.scale = scale
            head.softcap = softcap
            gaps[scale, softcap] = float((head.logits(last) - own).abs().max())
    best = min(gaps, key=gaps.get)  # the best, as small logits fit several
    head.scale, head.softcap = best
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 2e-2  # bf16 rounds logits to 3 digits
    if not own.isfinite().all():
        common.fail(
            f"the target's logits are not finite, though its weights are: {head.weight.dtype} overflows; set dtype in "
            "its config.json to bfloat16 or float32"
        )
    if not gaps[best] <= tolerance * own.abs().max():
        common.fail(
            f"the target's logits are not its head applied to its last hidden state (model_type {config.model_type}, "
            f"tried scales {scales}, soft cap {cap}, smallest difference {gaps[best]:.3g} of logits up to "
            f"{own.abs().max():.3g}): this family is not supported"
        )


def _can_pack(target):
    """Whether the family computes the same with core/target_attention.py on concatenated sequences as alone."""
    lengths = [16, 8]
    ids = _probe(target, sum(lengths))
    with target_attention.narrowed(target.decoder, 4):
        alone = [target.hidden_states(part, [len(part)])[1] for part in ids.split(lengths)]
        target.packs = True
        _, packed = target.hidden_states(ids, lengths)
        target.packs = False
    alone = torch.cat(alone)
    gaps = (packed - alone).float().norm(dim=-1) / alone.float().norm(dim=-1)
    tolerance = 1e-4 if alone.dtype == torch.float32 else 2e-2
    # Medians, because rounding may send single tokens to other experts. What is seen wrongly shows in most tokens.
    return all(part.median() < tolerance for part in gaps.split(lengths))


def load_head(model_dir, device, layer_ids=None, trust_remote_code=False):
    """A target of which only the head, the embedding table and the final norm are loaded: a model without layers."""
    text_config, config = target_files.read_target_config(model_dir, trust_remote_code)
    small = copy.deepcopy(config)
    try:
        small.get_text_config().num_hidden_layers = 0
        if getattr(text_config, "layer_types", None):
            small.get_text_config().layer_types = []
        with quiet():  # it would list the tensors of all layers
            model, info = automatic_class(config).from_pretrained(
                model_dir,
                config=small,
                dtype="auto",
                trust_remote_code=trust_remote_code,
                device_map={"": device},
                output_loading_info=True,
            )
        model.eval().requires_grad_(False)
        output = model.get_output_embeddings()
        head = Head(full_tensor(output.weight), full_tensor(output.bias))
        embedding = full_tensor(model.get_input_embeddings().weight)
        target = Target(model, text_config, head, embedding, [])
        norm = find_norm(target)
        _fit_head(target)
    except Exception as error:  # of the family's own code, too
        common.fail(f"the head of the target {model_dir} cannot be loaded alone: {type(error).__name__}: {error}")
    if info["missing_keys"]:
        common.fail(f"the weights of the target {model_dir} do not have {list_names(info['missing_keys'])}")
    return Target(None, text_config, head, embedding, layer_ids, norm=norm)


def find_norm(target):
    """The final norm of a target: the module whose output is the decoder's last hidden state."""
    called = []

    def note(module, args, states):
        called.append((states, module))

    for part in target.decoder.modules():
        part.register_forward_hook(note)
    ids = _probe(target, 8)[None]
    last = target.decoder(input_ids=ids, use_cache=False).last_hidden_state
    return next(module for states, module in called if states is last)


def load_as_asked(args, sharding, model_dir, device, layers):
    """The Target, shared by the ranks as the flags say; sharding: of resolve_sharding."""
    return load(
        model_dir,
        device,
        layer_ids=layers,
        trust_remote_code=args.trust_remote_code,
        sharding=sharding,
        tp_size=args.tp_size,
        offload=args.target_offload,
        offload_path=args.target_offload_path,
    )
