"""Make a small Llama-style target that a CPU can train and serve: tokenizer first, then the weights.

In:  for the tokenizer: the docstrings of Python's standard library (prepare_data.py's preset pydoc);
     for the weights: the training rows of a folder that prepare_data.py wrote with this tokenizer.
Out: a Hugging Face model folder: tokenizer and chat template, config.json, and in the second step model.safetensors.

    python examples/make_tiny_target.py tokenizer --output tiny_target
    python prepare_data.py --dataset pydoc --target_model_path tiny_target --output_path data --validation_ratio 0.02
    python examples/make_tiny_target.py weights --output tiny_target --data_path data --steps 600
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core import conversations, dataloader

# The markers and whitespace of Llama 3's instruct models, without their tool machinery.
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
    """Byte-level BPE tokenizer trained on texts (an iterable of str), with Llama 3's special tokens and chat template.

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
    """Tokenizer and config.json of the target, in args.output."""
    rows = [json.loads(line) for line in conversations.pydoc_lines()]
    tokenizer = train_tokenizer((m["content"] for row in rows for m in row["conversations"]), args.vocab_size)
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
    """Train the target on every token of the prepared training rows, put behind one another and cut into blocks."""
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(args.output))
    rows = dataloader.open_data(args.data_path)[0]["train"]["input_ids"]
    tokens = torch.tensor([token for row in rows for token in row])
    blocks = tokens[: len(tokens) // args.block * args.block].view(-1, args.block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    order, started = torch.empty(0, dtype=torch.int64), time.monotonic()
    print(f"target of {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens of text")
    for step in range(args.steps):
        warm, share = min((step + 1) / 20, 1.0), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        if len(order) < args.batch_size:
            order = torch.randperm(len(blocks))
        batch, order = blocks[order[: args.batch_size]], order[args.batch_size :]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            print(
                f"step {step + 1}/{args.steps} loss {loss.item():.3f} after {time.monotonic() - started:.0f} s",
                flush=True,
            )
    model.save_pretrained(args.output)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does textwrap.wrap do?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    reply = model.eval().generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
    print(f"it says: {tokenizer.decode(reply)!r}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("part", choices=("tokenizer", "weights"), help="what to make")
    parser.add_argument("--output", required=True, help="folder of the target")
    parser.add_argument("--data_path", help="folder written by prepare_data.py (weights)")
    parser.add_argument("--vocab_size", type=int, default=2048, help="tokens (default: 2048)")
    parser.add_argument("--hidden_size", type=int, default=128, help="a multiple of 64 (default: 128)")
    parser.add_argument("--layers", type=int, default=8, help="layers, at least 7 (default: 8)")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (default: 600)")
    parser.add_argument("--batch_size", type=int, default=8, help="blocks a step (default: 8)")
    parser.add_argument("--block", type=int, default=256, help="tokens a block (default: 256)")
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="peak (default: 4e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data order (default: 0)")
    args = parser.parse_args(argv)
    if args.part == "weights" and not args.data_path:
        parser.error("weights need --data_path")
    return args


def main(args):
    make_tokenizer(args) if args.part == "tokenizer" else train_weights(args)


if __name__ == "__main__":
    main(parse_args())
