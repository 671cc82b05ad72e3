"""A base model's directory for services that read no weights: one token a byte."""

import json
import struct
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS = 1, 2
FIRST_BYTE = 3
LONG_TEXT = "x" * 4096
LONG = FIRST_BYTE + 256  # a token that stands for LONG_TEXT
NUM_TOKENS = LONG + 1
CONTEXT_TOKENS = 512

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": NUM_TOKENS,
    "max_position_embeddings": CONTEXT_TOKENS,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "[{{ message.role }}]{{ message.content | trim }}\n"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Three special tokens, the 256 bytes, and LONG; every text starts with BOS."""
    alphabet = _bytes_in_order()
    symbols = ["<pad>", "<bos>", "<eos>", *alphabet, LONG_TEXT]
    vocabulary = {symbol: token_id for token_id, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def write_byte_model(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    tokenizer_config = {"bos_token": "<bos>", "eos_token": "<eos>"}
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"model.norm.weight": entry}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(4)
    (directory / "model.safetensors").write_bytes(content)
    return directory


def tokens_of(text: str | bytes) -> list[int]:
    """The tokens of an output that says `text`."""
    data = text.encode() if isinstance(text, str) else text
    return [FIRST_BYTE + value for value in data]


def _bytes_in_order() -> list[str]:
    """ByteLevel's character of each byte, 0 to 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(value) if value in printable else chr(next(others)) for value in range(256)]
