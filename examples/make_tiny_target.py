"""Make a small Llama-style target (tokenizer and chat template included) that runs on a CPU.

In:  a conversations file, or a folder prepared by prepare_data.py, or nothing for a random target.
Out: a Hugging Face model folder: config.json, model.safetensors, tokenizer.json, tokenizer_config.json, chat template.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# The markers and whitespace of Llama 3's instruct models, without their tool machinery.
LLAMA3_CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)
LLAMA3_SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def train_tokenizer(texts, vocab_size, special_tokens=LLAMA3_SPECIAL_TOKENS, chat_template=LLAMA3_CHAT_TEMPLATE,
                    bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"):
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
