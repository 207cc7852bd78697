"""Make a small Llama-style target that a CPU can train and serve: tokenizer first, then the weights.

In:  for the tokenizer: the docstrings of Python's standard library (prepare_data.py's preset pydoc);
     for the weights: the training rows of a folder that prepare_data.py wrote with this tokenizer.
Out: a Hugging Face model folder: tokenizer and chat template, config.json, and in the second step model.safetensors.

    python examples/make_tiny_target.py tokenizer --output tiny_target
    python prepare_data.py --dataset pydoc --target_model_path tiny_target --output_path data --validation_ratio 0.02
    python examples/make_tiny_target.py weights --output tiny_target --data_path data --steps 600
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core import common, conversations, dataloader

# The markers and whitespace of Llama 3's instruct models, without what these have for tools.
LLAMA3_CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)
LLAMA3_SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


def train_tokenizer(
    texts,
    vocab_size,
    special_tokens=LLAMA3_SPECIAL_TOKENS,
    chat_template=LLAMA3_CHAT_TEMPLATE,
    bos_token="<|begin_of_text|>",
    eos_token="<|eot_id|>",
):
    """A byte-level BPE tokenizer trained on texts (an iterable of str), by default with Llama 3's chat template.

    Returns a PreTrainedTokenizerFast with at most vocab_size entries, special tokens included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos_token, eos_token=eos_token)
    fast.chat_template = chat_template
    return fast


def make_tokenizer(args):
    """Write tokenizer and config.json of the target to args.output."""
    rows = [json.loads(line) for line in conversations.pydoc_lines()]
    texts = (message["content"] for row in rows for message in row["conversations"])
    tokenizer = train_tokenizer(texts, args.vocab_size)
    tokenizer.save_pretrained(args.output)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 32,
        num_key_value_heads=args.hidden_size // 64,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(args.output)
    print(f"{args.output}: tokenizer of {len(tokenizer)} tokens, trained on {len(rows)} conversations")


def train_weights(args):
    """Train the target on every token of the prepared training rows, concatenated and cut into blocks."""
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(args.output))
    blocks = read_blocks(args.data_path, args.block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    size = sum(p.numel() for p in model.parameters())
    print(f"target of {size:,} parameters, {blocks.numel():,} tokens of text")
    order = torch.empty(0, dtype=torch.int64)
    started = time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(args, step)
        if len(order) < args.batch_size:
            order = torch.randperm(len(blocks))
        batch = blocks[order[: args.batch_size]]  # [batch_size, block]
        order = order[args.batch_size :]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 50 == 0 or done == args.steps:
            seconds = time.monotonic() - started
            print(f"step {done}/{args.steps} loss {loss.item():.3f} after {seconds:.0f} s", flush=True)
    model.save_pretrained(args.output)
    print_reply(model.eval(), args.output)


def read_blocks(data_path, block):
    """The training rows as int64 [blocks, block]; what is left over at the end is dropped."""
    data, _ = dataloader.open_data(data_path)
    tokens = torch.tensor([token for row in data["train"]["input_ids"] for token in row])
    count = len(tokens) // block
    return tokens[: count * block].view(count, block)


def learning_rate_at(args, step):
    """Linear warm-up over 20 steps, then a cosine down to 5 % of the peak."""
    warm = min((step + 1) / 20, 1.0)
    share = step / args.steps
    return args.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))


def print_reply(model, folder):
    """Print what the target answers to a question about the standard library."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What does textwrap.wrap do?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    prompt_ids = prompt["input_ids"]
    output = model.generate(prompt_ids, max_new_tokens=60, do_sample=False)
    reply = tokenizer.decode(output[0, prompt_ids.shape[1] :])
    print(f"it says: {reply!r}")


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("part", choices=("tokenizer", "weights"), help="what to make")
    add("--output", required=True, help="folder of the target")
    add("--data_path", help="folder written by prepare_data.py (weights)")
    add("--vocab_size", type=int, default=2048, help="tokens")
    add("--hidden_size", type=int, default=128, help="a multiple of 64")
    add("--layers", type=int, default=8, help="layers, at least 7")
    add("--steps", type=int, default=600, help="optimizer steps")
    add("--batch_size", type=int, default=8, help="blocks per step")
    add("--block", type=int, default=256, help="tokens per block")
    add("--learning_rate", type=float, default=4e-3, help="peak")
    add("--seed", type=int, default=0, help="of the weights and the data order")
    args = parser.parse_args(argv)
    if args.part == "weights" and not args.data_path:
        common.fail("weights need --data_path")
    return args


def main(args):
    if args.part == "tokenizer":
        make_tokenizer(args)
    else:
        train_weights(args)


if __name__ == "__main__":
    main(parse_args())
