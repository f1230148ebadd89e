"""Write a model folder without weights, for servers started with `--load-choices dummy`: config.json and a tokenizer.

    python benchmarks/make_model_folder.py ernie-300b            # ERNIE-4.5-300B-A47B as published
    python benchmarks/make_model_folder.py ernie-small --layers 8 --hidden 1024 --expert-width 512 --dense-width 3584

Sizes that are not given are those of ERNIE-4.5-300B-A47B (54 layers, the first 3 of them dense; 64 experts, 8 for each
token). The tokenizer has a token for each byte; the other ids stand for made-up words that no text is encoded to.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
from collections.abc import Sequence
from pathlib import Path

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
# flag, key of config.json, value of ERNIE-4.5-300B-A47B
SIZES = (
    ("layers", "num_hidden_layers", 54),
    ("dense-layers", "moe_layer_start_index", 3),
    ("hidden", "hidden_size", 8192),
    ("heads", "num_attention_heads", 64),
    ("kv-heads", "num_key_value_heads", 8),
    ("head-dim", "head_dim", 128),
    ("dense-width", "intermediate_size", 28672),
    ("expert-width", "moe_intermediate_size", 3584),
    ("experts", "moe_num_experts", 64),
    ("experts-per-token", "moe_k", 8),
    ("vocab", "vocab_size", 103424),
    ("positions", "max_position_embeddings", 131072),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for flag, key, value in SIZES:
        parser.add_argument(f"--{flag}", type=int, default=value, help=f"{key} (default: %(default)s)")
    return parser.parse_args(argv)


def config_of(flags: argparse.Namespace) -> dict[str, object]:
    """config.json in the Hugging Face layout. Raises SystemExit for sizes that make no such model."""
    sizes = {key: getattr(flags, flag.replace("-", "_")) for flag, key, _ in SIZES}
    n_least = len(SPECIAL_TOKENS) + 256
    if sizes["vocab_size"] < n_least:
        raise SystemExit(f"--vocab {sizes['vocab_size']}: must be at least {n_least}, a token for each byte")
    if sizes["moe_layer_start_index"] >= sizes["num_hidden_layers"]:
        raise SystemExit(
            f"--dense-layers {sizes['moe_layer_start_index']}: must be below --layers, or none has experts"
        )
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_bias": False,
        "tie_word_embeddings": False,
        "moe_num_shared_experts": 0,
        "moe_layer_interval": 1,
        "moe_layer_end_index": sizes["num_hidden_layers"] - 1,
        "moe_use_aux_free": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **sizes,
    }


def byte_letters() -> list[str]:
    """The letter of each byte in a byte-level vocabulary: printable ones are themselves, others come from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tokenizer_of(n_vocabulary: int) -> dict[str, object]:
    """tokenizer.json of `n_vocabulary` ids: special tokens, bytes, words."""
    words = ("Ġ" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    tokens = [*SPECIAL_TOKENS, *byte_letters()]
    tokens += itertools.islice(words, n_vocabulary - len(tokens))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    by_byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **plain} for i, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": by_byte,
        "post_processor": None,
        "decoder": by_byte,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [],
        },
    }


def write(folder: Path, flags: argparse.Namespace) -> None:
    """All files of the folder, which may exist."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE}
    files = {"config.json": config_of(flags), "tokenizer_config.json": settings}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_of(flags.vocab)))


def main() -> None:
    flags = parse_flags()
    write(flags.folder, flags)
    print(f"{flags.folder}: serve it with --load-choices dummy")


if __name__ == "__main__":
    main()
