"""The target's own replies, generated in this process in batches: what recipes.py trains and measures drafts on.

Rows are tokens with their mask, as prepare_data.py takes them. Each finished batch is appended to a file, so that an
interrupted generation continues where it stopped. A server that serves the target is faster for many rows: see
prepare_data.py --regenerate_endpoint.
"""

import json
import time

import torch
import transformers

from core import conversation_files, conversations, rendering

MEAN_TOKENS = 128  # of the prompts of a full batch: batches of longer ones are smaller


def first_question(row):
    """The messages of a row up to its first question, the system prompt included. Raises Rejected."""
    turns = conversations.find_turns(row)
    if isinstance(row.get("prompt"), str) and not turns:
        return [{"role": "user", "content": row["prompt"]}]
    opened = {field: conversations.with_reply(given) for field, given in turns.items()}
    messages, _ = conversations.read_conversation(row | opened)
    roles = [message["role"] for message in messages]
    return messages[: roles.index("user") + 1]


def read_prompts(dataset, tokenizer, max_tokens, limit=None, prompt_column=None):
    """Token ids of at most `limit` different first questions of at most max_tokens tokens, in the order of the rows."""
    source = conversation_files.open_source(str(dataset), "prompt", {"prompt_column": prompt_column})
    prompts = {}  # in order, without repetitions
    for _, line in source.rows():
        if len(prompts) == limit:
            break
        try:
            messages = first_question(json.loads(line))
        except conversations.Rejected:
            continue
        characters = sum(len(message["content"]) for message in messages)
        if not characters or characters > 20 * max_tokens:  # tokenizing books takes long
            continue
        text = rendering.render(tokenizer, messages, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= max_tokens:
            prompts[tuple(ids)] = None
    return [list(ids) for ids in prompts]


def pending_batches(path, prompts, batch_size):
    """Batches of the prompts that have no reply in the file yet, of similar length."""
    done = set()
    text = path.read_text() if path.exists() else ""
    complete = text[: text.rfind("\n") + 1]
    if complete != text:  # the last line was interrupted
        path.write_text(complete)
    for line in complete.splitlines():
        row = json.loads(line)
        length = row["loss_mask"].index(1)
        done.add(tuple(row["input_ids"][:length]))
    missing = [prompt for prompt in prompts if tuple(prompt) not in done]
    batches = []
    for prompt in sorted(missing, key=len):
        count = len(batches[-1]) + 1 if batches else 0
        if not batches or count > batch_size or count * len(prompt) > batch_size * MEAN_TOKENS:
            batches.append([])
        batches[-1].append(prompt)
    return batches


def generate(model, prompts, eos_ids, max_new_tokens, temperature):
    """The replies (lists of ids, the end-of-turn token included) to prompts, left-padded in one batch."""
    longest = max(map(len, prompts))
    padding = eos_ids[0]
    ids = []
    mask = []
    for prompt in prompts:
        missing = longest - len(prompt)
        ids.append([padding] * missing + prompt)
        mask.append([0] * missing + [1] * len(prompt))
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids,
        pad_token_id=padding,
        **sampling,
    )
    replies = []
    for reply in output[:, longest:].tolist():
        end = next((i + 1 for i, token in enumerate(reply) if token in eos_ids), len(reply))
        replies.append(reply[:end])
    return replies


def write_replies(path, model, prompts, eos_ids, batch_size, max_new_tokens, temperature):
    """Append a row {"input_ids", "loss_mask"} to the file for each prompt that has none yet."""
    batches = pending_batches(path, prompts, batch_size)
    start = time.monotonic()
    count = 0
    for number, batch in enumerate(batches, 1):
        transformers.set_seed(sum(batch[0]))  # the same after an interruption
        replies = generate(model, batch, eos_ids, max_new_tokens, temperature)
        lines = ""
        for prompt, reply in zip(batch, replies, strict=True):
            mask = [0] * len(prompt) + [1] * len(reply)
            row = {"input_ids": prompt + reply, "loss_mask": mask}
            lines += json.dumps(row) + "\n"
            count += len(reply)
        with path.open("a") as file:
            file.write(lines)
        rate = count / (time.monotonic() - start)
        print(f"{path.name}: batch {number}/{len(batches)}, {rate:.0f} tokens/s", flush=True)
