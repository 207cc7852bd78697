"""The target's replies in this process: transformers' continuous batching, on a GPU or on a CPU.

In:  a target; the Chat that renders its conversations; sampling, length, and how many conversations are under way.
Out: ask(row, messages, tools): a chat completion, as a server without parsers gives it: reasoning is text in it.
"""

import contextlib
import gc
import itertools
import json
import math
import re
import threading
from concurrent.futures import Future

import torch

from core import common, conversations, rejected_rows, rendering

FAILED = "regenerate local: the target does not generate any more: "
TOO_LONG = "longer than the target's context"

# On CPUs attention is one matrix of all tokens under way against all their keys: many conversations make it slow.
CPU_CONCURRENCY = 16
CPU_TOKENS = 2048  # of a conversation under way, on average: what the cache has room for
CPU_BATCH_TOKENS = 512  # that one forward reads of new prompts
PAGE = 32  # tokens of a block of the cache on CPUs

CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class GenerationFailed(Exception):
    """The target cannot generate, as a rule because the memory does not suffice."""


def default_concurrency():
    """How many conversations are under way at once where nothing is said."""
    return 64 if torch.cuda.is_available() else CPU_CONCURRENCY


# ==================== The target =====================================================================================


def check_target(target, trust_remote_code):
    """(folder, text_config, config) of a target; ends the program if it cannot be loaded. Reads no weights."""
    from core import target_files, target_model  # here and below: slow, and a server's replies do without them

    model_dir = target_files.resolve_target(target)
    text_config, config = target_files.read_target_config(model_dir, trust_remote_code)
    target_model.check_weights(model_dir, config, trust_remote_code)
    return model_dir, text_config, config


@contextlib.contextmanager
def open_target(target, chat, settings, trust_remote_code=False):
    """The LocalTarget of a folder or hub id, with its weights in memory.

    settings: the Settings of core/regeneration.py. A GPU holds the complete target: several ranks have a copy each.
    """
    from core import target_model

    gc.collect()  # the target of an earlier split
    model_dir, text_config, config = check_target(target, trust_remote_code)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    options = {"dtype": "auto", "device_map": {"": device}}
    model = target_model.read_model(model_dir, config, "none", None, trust_remote_code, options)
    set_sampling(model.generation_config, chat.tokenizer, settings.temperature)
    context = getattr(text_config, "max_position_embeddings", None) or 2**31
    try:
        manager = model.init_continuous_batching(
            continuous_batching_config=batching(device, settings.concurrency, context)
        )
        manager.warmup()  # allocates the cache
    except (MemoryError, torch.OutOfMemoryError) as error:
        common.fail(
            f"regenerate local: no memory for the cache of {settings.concurrency} conversations beside the target "
            f"{model_dir}: {common.first_line(error)}; lower --regenerate_concurrency"
        )
    except (ValueError, LookupError, AttributeError, NotImplementedError) as error:  # another kind of attention
        common.fail(
            f"regenerate local: transformers cannot batch the target {model_dir}: {type(error).__name__}: "
            f"{common.first_line(error)}; give a server that runs it by --regenerate_endpoint"
        )
    resolved = manager.continuous_batching_config
    context = min(context, resolved.num_blocks * resolved.page_size)
    manager.start()
    local = LocalTarget(manager, chat, context, settings.max_tokens)
    try:
        yield local
    finally:
        local.close()


def set_sampling(generation, tokenizer, temperature):
    """Set what ends a reply, and the temperature; None leaves the target's own sampling, 0 takes the likeliest token.

    Ends of a reply are those of the target's configuration and the tokenizer's, as serving engines have it.
    """
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    generation.eos_token_id = sorted({*ends, tokenizer.eos_token_id} - {None})
    generation.num_return_sequences = 1
    if temperature is not None:
        generation.do_sample = temperature > 0
    if temperature:
        generation.temperature = temperature


def batching(device, concurrency, context):
    """transformers' configuration; on a GPU it takes the memory that is left for its cache.

    On a CPU it would take most of the machine's memory: there the cache has room for average conversations. If more is
    needed, the youngest conversations wait.
    """
    from transformers import ContinuousBatchingConfig

    options = {"max_requests_per_batch": concurrency, "disable_nccl_graph_mixing": False}
    if device.type == "cpu":
        tokens = max(concurrency, CPU_CONCURRENCY) * min(context, CPU_TOKENS)
        options["page_size"] = PAGE
        options["num_blocks"] = math.ceil(tokens / PAGE)
        options["max_batch_tokens"] = max(CPU_BATCH_TOKENS, concurrency)
    return ContinuousBatchingConfig(**options)


# ==================== Asking =========================================================================================


class LocalTarget:
    """Replies of a target in memory to many threads at once: the manager puts what they ask into one batch."""

    def __init__(self, manager, chat, context, max_tokens):
        self.manager = manager
        self.chat = chat
        self.context = context  # tokens of a prompt and its reply
        self.max_tokens = max_tokens
        self.numbers = itertools.count()
        self.waiting = {}  # {request: Future of its output}
        self.closed = threading.Event()
        self.delivering = threading.Thread(target=self.deliver, daemon=True)
        self.delivering.start()

    def close(self):
        """End the manager, and what still waits for it."""
        self.closed.set()
        self.delivering.join()
        self.manager.stop(hard_stop=True)

    def ask(self, row, messages, tools):
        """The chat completion for messages in the form of OpenAI's protocol. Raises Rejected and GenerationFailed."""
        prompt = render_prompt(messages, tools, self.chat)
        ids = self.chat.encoder.encode(prompt, add_special_tokens=False).ids
        if len(ids) >= self.chat.max_length:
            raise conversations.Rejected(
                rejected_rows.BEYOND, f"a prompt of {len(ids):,} tokens, --max_length is {self.chat.max_length:,}"
            )
        room = min(self.context, self.chat.max_length) - len(ids)
        if room < 1:
            raise conversations.Rejected(
                TOO_LONG, f"a prompt of {len(ids):,} tokens, there is room for {self.context:,}"
            )
        reply = self.generate(ids, min(self.max_tokens, room))
        is_cut = reply[-1] not in self.manager.generation_config.eos_token_id
        text = self.chat.tokenizer.decode(reply, skip_special_tokens=True)
        if is_cut:
            text = text.rstrip("\ufffd")  # of a character that is cut: the target has not said it
        if prompt.rstrip().endswith("<think>"):  # the prompt has begun the thought
            text = f"<think>\n{text}"
        message = {"role": "assistant", "content": text}
        if tools and not is_cut:
            message |= split_calls(text)
        choice = {"message": message, "finish_reason": "length" if is_cut else "stop"}
        return {"choices": [choice], "usage": {"completion_tokens": len(reply)}}

    def generate(self, ids, max_tokens):
        """The ids of the reply to a prompt, at least one, its end included. Raises GenerationFailed."""
        name = str(next(self.numbers))
        output = self.waiting[name] = Future()
        if not self.manager.add_request(ids, request_id=name, max_new_tokens=max_tokens):
            raise GenerationFailed(self.problem())
        return output.result()

    def deliver(self):
        """Hand each output of the manager to the thread that waits for it, as long as the manager runs."""
        while not self.closed.is_set() and not self.manager.background_thread_status.fatal_error:
            output = self.manager.get_result(timeout=0.1)
            if not output:
                continue
            future = self.waiting.pop(output.request_id)
            if output.error:
                future.set_exception(GenerationFailed(FAILED + str(output.error).splitlines()[0]))
            else:
                future.set_result(output.generated_tokens)
        while self.waiting:
            _, future = self.waiting.popitem()
            future.set_exception(GenerationFailed(self.problem()))

    def problem(self):
        """Why the manager has ended, in one line."""
        error = self.manager.background_thread_status.fatal_error
        reason = common.first_line(error) if error else "it was stopped"
        return FAILED + reason


def render_prompt(messages, tools, chat):
    """The text of messages with the header of a reply behind it. Raises Rejected."""
    read = []
    for message in messages:
        message = {"reasoning": None} | message
        if message.get("tool_calls"):
            message["tool_calls"] = conversations.read_calls(message)
        read.append(message)
    try:
        arranged = rendering.arrange(read, chat)
        return rendering.render(chat.tokenizer, arranged, tools, add_generation_prompt=True, **chat.template.options)
    except Exception as error:  # the template is foreign code
        raise conversations.Rejected("template error", f"{type(error).__name__}: {error}") from None


def split_calls(text):
    """The content and the calls of a reply that writes them as Hermes, Qwen and others do; {} without any."""
    found = CALL.findall(text)
    try:
        functions = [json.loads(call) for call in found]
        calls = [{"type": "function", "function": {"name": f["name"], "arguments": f["arguments"]}} for f in functions]
    except (ValueError, LookupError, TypeError):
        return {}
    if not calls:
        return {}
    return {"content": text[: text.index("<tool_call>")].strip() or None, "tool_calls": calls}
