"""A tokenizer without files, for a synthetic server: one token for each byte."""

from __future__ import annotations

from fastdeploy.config.synthetic import BYTE_EOS, BYTE_VOCABULARY
from fastdeploy.frontend.detokenizer import TextRule
from fastdeploy.frontend.tokenizer import Tokenizer

_EOS = "<|end|>"
_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class _ByteBackend:
    rule = TextRule()
    vocab_size = BYTE_VOCABULARY
    special_ids = frozenset({BYTE_EOS})

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        try:
            return [list(text.encode()) for text in texts]
        except UnicodeEncodeError as error:  # half of a surrogate pair, which `Tokenizer` names
            raise TypeError(str(error)) from error

    def id_of(self, token: str) -> int | None:
        if token == _EOS:
            return BYTE_EOS
        data = token.encode()
        return data[0] if len(data) == 1 else None

    def token_bytes(self, token_id: int) -> bytes:
        return _EOS.encode() if token_id == BYTE_EOS else bytes([token_id])


def byte_tokenizer() -> Tokenizer:
    """Tokenizer of `config.synthetic.BYTE_VOCABULARY` ids, with a plain chat template."""
    return Tokenizer(_ByteBackend(), {"eos_token": _EOS}, (BYTE_EOS,), _TEMPLATE)
