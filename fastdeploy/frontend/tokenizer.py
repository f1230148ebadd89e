"""Text to token ids and token ids to text, for the tokenizer that a checkpoint folder brings.

Owns which file is read, which tokens are special, and the exact bytes of every token. Two libraries do the encoding:
`tokenizers` (tokenizer.json) and sentencepiece (tokenizer.model); both are imported only when a folder needs them.
Decoding is the same code for both: the bytes of the tokens, joined, as UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from fastdeploy.errors import CheckpointError, InvalidRequest
from fastdeploy.frontend.detokenizer import MARK_PER_BYTE, ByteTable, TextRule, TextStream

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

ERNIE_SEP = "<|end_of_sentence|>"
SPACE_MARK = "▁"
ALL_SPACES = 1 << 62


class AddedToken(msgspec.Struct, frozen=True):
    """A token that is found in the text before anything else is tokenised."""

    content: str
    special: bool = False
    lstrip: bool = False  # swallows the white space before it
    rstrip: bool = False  # swallows the white space behind it


class Backend(Protocol):
    """What one tokenizer library does for `Tokenizer`."""

    rule: TextRule
    vocab_size: int
    special_ids: frozenset[int]

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]: ...

    def id_of(self, token: str) -> int | None: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Tokenizer:
    """The tokenizer of one checkpoint; safe to use from several threads.

    `special_tokens` maps names such as "bos_token" to their text, for chat templates. `eos_token_ids` end an answer.
    `chat_template` is the checkpoint's own template text, None when it has none.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str],
        eos_token_ids: tuple[int, ...],
        chat_template: str | None,
    ) -> None:
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self.vocab_size = backend.vocab_size
        self.special_ids = backend.special_ids
        self._bytes_shown = ByteTable(backend.vocab_size, backend.token_bytes)
        self._bytes_skipping = ByteTable(
            backend.vocab_size, lambda i: b"" if i in backend.special_ids else backend.token_bytes(i)
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written in it are recognised; the interpreter lock is free meanwhile.

        `add_special_tokens` adds what tokenizer.json says goes around a text; sentencepiece models add nothing.
        Raises `InvalidRequest` when the text holds half of a surrogate pair.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text."""
        try:
            return self._backend.encode_batch(texts, add_special_tokens)
        except (TypeError, RuntimeError):
            _refuse_surrogates(texts)
            raise

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence: nothing cleaned up, invalid UTF-8 as U+FFFD, unknown ids as nothing."""
        stream = self.text_stream(skip_special_tokens)
        return stream.feed(ids) + stream.finish()

    def text_stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for a sequence that comes piece by piece."""
        return TextStream(self._bytes_skipping if skip_special_tokens else self._bytes_shown, self._backend.rule)

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of one token, special tokens as their name; empty for an id outside the vocabulary."""
        return self._bytes_shown[token_id]

    def token_text(self, token_id: int) -> str:
        """One token for a reader: its bytes, U+FFFD where they are not UTF-8 by themselves."""
        return self._bytes_shown[token_id].decode("utf-8", "replace")

    def id_of(self, token: str) -> int | None:
        """Id of a token by its text in the vocabulary, None when it is not there."""
        return self._backend.id_of(token)


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of the checkpoint folder `path`; `CheckpointError` names the file that is missing or bad."""
    folder = Path(path)
    config = _read_json(folder / "tokenizer_config.json")
    token_map = _read_json(folder / "special_tokens_map.json")
    named = _named_tokens(token_map) | _named_tokens(config)
    special = set(named.values()) | _extra_special(token_map) | _extra_special(config)
    added = _declared_tokens(folder, config, special)
    backend: Backend
    if (folder / "tokenizer.json").is_file():
        backend = _JsonBackend(folder / "tokenizer.json", added, special)
    elif (folder / "tokenizer.model").is_file():
        backend = _SentencePieceBackend(folder / "tokenizer.model", added, special)
    else:
        raise CheckpointError(f"{folder}: no tokenizer found, looked for tokenizer.json and tokenizer.model")
    template = _chat_template(folder, config)
    return Tokenizer(backend, named, _eos_ids(folder, backend, named, template), template)


class _Decoder(msgspec.Struct):
    type: str
    decoders: list[_Decoder] = []
    start: int = 0
    prepend_scheme: str = "always"


class _TokenizerJson(msgspec.Struct):
    decoder: _Decoder | None = None


class _JsonBackend:
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, path: Path, added: Mapping[int, AddedToken], special: set[str]) -> None:
        from tokenizers import Tokenizer as Engine

        data = path.read_bytes()
        try:
            layout = msgspec.json.decode(data, type=_TokenizerJson)
            self._engine: tokenizers.Tokenizer = Engine.from_buffer(data)
        except Exception as exc:  # the library raises bare Exception
            raise CheckpointError(f"{path}: not a usable tokenizer.json: {exc}") from exc
        self._engine.no_truncation()
        self._engine.no_padding()
        self._add(path, added, special)
        known = self._engine.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in known.items()}
        self.special_ids = frozenset(i for i, token in known.items() if token.special)
        self.vocab_size = max(self._engine.get_vocab_size(with_added_tokens=False), max(known, default=-1) + 1)
        self.rule = _rule_of(path, layout.decoder)
        self._byte_of_char = _byte_of_char() if self.rule.utf8_errors == "replace" else None

    def _add(self, path: Path, added: Mapping[int, AddedToken], special: set[str]) -> None:
        """Tokens of tokenizer_config.json and its companions that tokenizer.json does not declare itself."""
        from tokenizers import AddedToken as EngineToken

        engine = self._engine
        declared = {token.content: token.special for token in engine.get_added_tokens_decoder().values()}
        for token_id, token in sorted(added.items()):
            if token.content in declared:
                continue
            make = engine.add_special_tokens if token.special else engine.add_tokens
            make([EngineToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=not token.special)])
            if engine.token_to_id(token.content) != token_id:
                raise CheckpointError(
                    f"{path}: token {token.content!r} should have id {token_id} by tokenizer_config.json, "
                    f"but gets {engine.token_to_id(token.content)}"
                )
        for content in sorted(special):
            if not declared.get(content) and engine.token_to_id(content) is not None:
                engine.add_special_tokens([EngineToken(content, normalized=False)])

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        # The plain encode() keeps the interpreter lock and computes offsets; this does neither.
        return [e.ids for e in self._engine.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    def id_of(self, token: str) -> int | None:
        return self._engine.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        content = self._added.get(token_id)
        if content is not None:
            return content.encode()
        piece = self._engine.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_of_char is None:
            return _marked_bytes(piece)
        try:
            return bytes([self._byte_of_char[char] for char in piece])
        except KeyError:
            return piece.encode()


class _SentencePieceBackend:
    """A tokenizer.model, run by sentencepiece, with the tokens added around it."""

    def __init__(self, path: Path, added: Mapping[int, AddedToken], special: set[str]) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._engine: sentencepiece.SentencePieceProcessor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as exc:
            raise CheckpointError(f"{path}: not a usable sentencepiece model: {exc}") from exc
        engine, n_pieces = self._engine, len(self._engine)
        tokens = dict(added)
        ids = {token.content: i for i, token in added.items()}
        for content in special - ids.keys():
            token_id = engine.piece_to_id(content)
            if token_id != engine.unk_id() or content == engine.id_to_piece(token_id):
                tokens[token_id] = AddedToken(content, special=True)
        self._ids = {token.content: i for i, token in tokens.items()}
        self._token_of = {token.content: token for token in tokens.values()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        hidden = [i for i in range(n_pieces) if engine.is_control(i) or engine.is_unknown(i)]
        self._literal = {i: engine.id_to_piece(i) for i in hidden} | {i: token.content for i, token in tokens.items()}
        self.special_ids = frozenset(hidden) | {i for i, token in tokens.items() if token.special}
        self.vocab_size = max(n_pieces, max(tokens, default=-1) + 1)
        self.rule = TextRule(
            utf8_errors=MARK_PER_BYTE,
            n_lead_spaces=self._n_lead_spaces(),
            lead_after=frozenset(self._literal),
            lead_ends=frozenset(i for i in range(n_pieces) if engine.is_byte(i)),
        )

    def _n_lead_spaces(self) -> int:
        """What the model's own rules drop at the beginning: none, the space it put there, or all."""
        mark = self._engine.piece_to_id(SPACE_MARK)
        if mark == self._engine.unk_id():
            return 0
        return {3: 0, 2: 1}.get(len(self._engine.decode([mark, mark, mark])), ALL_SPACES)

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        if self._split is None:
            return list(self._engine.encode(text))
        parts = self._split.split(text)  # ordinary text and added tokens in turn
        for at in range(1, len(parts), 2):
            token = self._token_of[parts[at]]
            if token.lstrip:
                parts[at - 1] = parts[at - 1].rstrip()
            if token.rstrip:
                parts[at + 1] = parts[at + 1].lstrip()
        ids: list[int] = []
        for at, part in enumerate(parts):
            if at % 2:
                ids.append(self._ids[part])
            elif part:
                ids += self._engine.encode(part)
        return ids

    def id_of(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        token_id = int(self._engine.piece_to_id(token))
        return token_id if self._engine.id_to_piece(token_id) == token else None

    def token_bytes(self, token_id: int) -> bytes:
        content = self._literal.get(token_id)
        if content is not None:
            return content.encode()
        return _marked_bytes(self._engine.id_to_piece(token_id)) if token_id < len(self._engine) else b""


def _marked_bytes(piece: str) -> bytes:
    """Bytes of a piece of a vocabulary that writes spaces as U+2581 and single bytes as <0xNN>."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace(SPACE_MARK, " ").encode()


def _byte_of_char() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves, the other bytes, in order, for the characters from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _rule_of(path: Path, decoder: _Decoder | None) -> TextRule:
    """The rule that a tokenizer.json asks for with its `decoder`."""
    steps = [] if decoder is None else decoder.decoders or [decoder]
    kinds = {step.type for step in steps}
    if "ByteLevel" in kinds:
        return TextRule()
    if kinds & {"Replace", "Metaspace"} and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        n_lead = sum(step.start for step in steps if step.type == "Strip")
        n_lead += any(step.type == "Metaspace" and step.prepend_scheme != "never" for step in steps)
        return TextRule(utf8_errors=MARK_PER_BYTE, n_lead_spaces=n_lead)
    raise CheckpointError(
        f"{path}: decoder {'+'.join(sorted(kinds)) or 'null'} is not supported; "
        "ByteLevel and Replace+ByteFallback+Fuse+Strip (or Metaspace) are"
    )


def _refuse_surrogates(texts: list[str]) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidRequest(
            f"the text holds half of a surrogate pair (U+{ord(exc.object[exc.start]):04X}) at character {exc.start}; "
            "send valid Unicode"
        ) from exc


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be absent (then empty)."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise CheckpointError(f"{path}: not a JSON object: {exc}") from exc


def _content(token: object) -> str | None:
    """Text of a token written as a string or as {"content": ...}."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """ "bos_token" and the like -> text."""
    extra = config.get("extra_special_tokens")
    entries = {**(extra if isinstance(extra, dict) else {}), **config}
    found = {name: _content(value) for name, value in entries.items() if name.endswith("_token")}
    return {name: content for name, content in found.items() if content}


def _extra_special(config: Mapping[str, Any]) -> set[str]:
    """Special tokens that are listed without a name."""
    lists = [config.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    return {text for entry in lists if isinstance(entry, list) for text in map(_content, entry) if text}


def _declared_tokens(folder: Path, config: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """Added tokens by id, from added_tokens.json and tokenizer_config.json (which knows more and wins)."""
    tokens: dict[int, AddedToken] = {}
    try:
        for content, token_id in _read_json(folder / "added_tokens.json").items():
            tokens[int(token_id)] = AddedToken(content, special=content in special)
        for token_id, entry in config.get("added_tokens_decoder", {}).items():
            token = msgspec.convert(entry, AddedToken)
            tokens[int(token_id)] = msgspec.structs.replace(token, special=token.special or token.content in special)
    except (msgspec.ValidationError, TypeError, ValueError, AttributeError) as exc:
        raise CheckpointError(f"{folder}: added_tokens.json or added_tokens_decoder is malformed: {exc}") from exc
    return tokens


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json; of a list the one named "default"."""
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _eos_ids(folder: Path, backend: Backend, named: Mapping[str, str], template: str | None) -> tuple[int, ...]:
    """Ids that end an answer: eos_token, those of generation_config.json, and ERNIE's turn separator."""
    found = [backend.id_of(named["eos_token"])] if "eos_token" in named else []
    listed = _read_json(folder / "generation_config.json").get("eos_token_id")
    found += listed if isinstance(listed, list) else [listed]
    if template is not None and "sep_token" in template:
        # ERNIE closes turns of the history with it, so that the model may end its own answer with it too.
        found.append(backend.id_of(named.get("sep_token", ERNIE_SEP)))
    return tuple(dict.fromkeys(i for i in found if isinstance(i, int)))
