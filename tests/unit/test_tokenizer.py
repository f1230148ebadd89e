"""Tokenizers: two tiny ones are trained here and compared with the libraries that define them."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.errors import CheckpointError, InvalidRequest
from fastdeploy.frontend.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.timeout(240)

CORPUS = [
    *(f"Hello world, this is sentence {i} of the text. The stop string is END.\n" for i in range(40)),
    *[
        "你好，世界。今天天气很好，我们去公园散步。",
        "emoji 😀😀 👩‍👩‍👧 ünïcödé",
        "def f(x):\n    return x * 2  # twice\n",
    ]
    * 20,
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "",
    " ",
    "Hello world, this is 12345.",
    "  two  spaces\n\n 1.\n",
    "你好，世界 😀 👩‍👩‍👧 é",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>",
    "\x00\x04\x1d\x7f\xa0\xad",
    "unseen: ⠿ 𝔘 ﷽",
]
MARK = "\ufffd"


def write_byte_level(folder: Path) -> Path:
    """A byte-level BPE of 381 tokens, like those of Qwen, Llama 3 and the demo model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(CORPUS, trainer)
    engine.add_tokens([AddedToken("<tool call>", normalized=False)])
    engine.enable_truncation(8)
    engine.enable_padding(length=8)
    engine.save(str(folder / "tokenizer.json"))
    bos = {"__type": "AddedToken", "content": "<s>", "special": True}
    config = {"bos_token": bos, "eos_token": "</s>", "pad_token": None, "chat_template": "TEXT"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
    return folder


def write_sentencepiece(folder: Path, kind: str = "unigram", dummy_prefix: bool = True, trim: bool = False) -> Path:
    """A sentencepiece model with bytes for what it lacks, and tokens added around it as ERNIE does."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=450,
        hard_vocab_limit=False,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=trim,
        user_defined_symbols=["<|im_end|>"],
        control_symbols=["<ctl>"],
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": {"content": "<|end_of_sentence|>", "lstrip": False},
        "additional_special_tokens": ["<mask:4>"],
        "added_tokens_decoder": {"1003": {"content": "<mask:4>", "special": True, "rstrip": True}},
        "chat_template": [{"name": "default", "template": "{{ sep_token }}"}, {"name": "rag", "template": "no"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    added = {"<|end_of_sentence|>": 1000, "<|begin_of_sentence|>": 1001, "<plain>": 1002}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


@pytest.fixture(scope="module")
def byte_level_folder(tmp_path_factory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def byte_level(byte_level_folder) -> Tokenizer:
    return load_tokenizer(str(byte_level_folder))


@pytest.fixture(scope="module")
def hugging_face(byte_level_folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(byte_level_folder))


@pytest.fixture(scope="module")
def piece_folder(tmp_path_factory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("spm"))


@pytest.fixture(scope="module")
def pieces(piece_folder) -> Tokenizer:
    return load_tokenizer(str(piece_folder))


# ---- tokenizer.json ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_transformers_does(byte_level, hugging_face, text):
    assert byte_level.encode(text) == hugging_face.encode(text)
    assert byte_level.encode(text, add_special_tokens=False) == hugging_face.encode(text, add_special_tokens=False)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 380), max_size=30), skip=st.booleans())
def test_decodes_as_transformers_does(byte_level, hugging_face, ids, skip):
    expected = hugging_face.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert byte_level.decode(ids, skip_special_tokens=skip) == expected


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_byte_level_round_trip(byte_level, text):
    ids = byte_level.encode(text)
    assert byte_level.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(byte_level.token_bytes, ids)) == text.encode()


def test_truncation_and_padding_of_the_file_are_not_for_a_server(byte_level):
    assert len(byte_level.encode("Hello world, " * 20)) > 8
    assert byte_level.encode("a") == [byte_level.id_of("a")]


def test_byte_level_facts(byte_level):
    assert byte_level.vocab_size == 381
    assert byte_level.special_ids == {0, 1, 2, 3, 4}
    assert byte_level.eos_token_ids == (2, 4)
    assert byte_level.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert byte_level.chat_template == "TEXT"
    assert byte_level.id_of("<|im_end|>") == 4
    assert byte_level.id_of("no such token") is None


def test_token_text_and_bytes(byte_level):
    ids = byte_level.encode("Hello 😀<tool call></s>")
    assert byte_level.token_text(ids[-1]) == "</s>"
    assert byte_level.token_bytes(ids[-2]) == b"<tool call>"
    lead_byte = byte_level.id_of("ð")  # byte F0 in the byte-level alphabet
    assert byte_level.token_bytes(lead_byte) == b"\xf0"
    assert byte_level.token_text(lead_byte) == MARK


@pytest.mark.parametrize("token_id", [-1, 1004, 10**12])
def test_ids_outside_the_vocabulary_have_no_text(byte_level, pieces, token_id):
    for tokenizer in (byte_level, pieces):
        assert tokenizer.token_bytes(token_id) == b""
        assert tokenizer.decode([token_id]) == ""


def test_encode_batch(byte_level, pieces):
    for tokenizer in (byte_level, pieces):
        assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
        assert tokenizer.encode_batch([]) == []


def test_half_a_surrogate_pair_is_refused(byte_level, pieces):
    for tokenizer in (byte_level, pieces):
        with pytest.raises(InvalidRequest, match=r"U\+D800.*character 2"):
            tokenizer.encode("ab\ud800")


def test_post_processor_is_asked_for(byte_level_folder, tmp_path):
    from tokenizers import Tokenizer, processors

    engine = Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("a") == [1, *tokenizer.encode("a", add_special_tokens=False)]


def test_tokens_that_only_the_config_declares(byte_level_folder, tmp_path):
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_bytes((byte_level_folder / "tokenizer.json").read_bytes())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "He",
        "added_tokens_decoder": {
            "381": {"content": "<new>", "special": True},
            "382": {"content": "<call>", "special": False},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    reference = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    text = "a<new>Hello<call>b"
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.special_ids == {0, 1, 2, 3, 4, 381, tokenizer.id_of("He")}
    assert tokenizer.decode(tokenizer.encode(text)) == "allo<call>b"
    assert tokenizer.eos_token_ids == (tokenizer.id_of("He"),)

    config["added_tokens_decoder"] = {"700": {"content": "<new>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'<new>' should have id 700"):
        load_tokenizer(str(tmp_path))


def write_llama_style(folder: Path, n_strip: int = 1) -> Path:
    """A tokenizer.json in the layout that converted sentencepiece models have."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "▁": 257, "a": 258, "▁a": 259, "b": 260}
    engine = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    engine.decoder = decoders.Sequence([*steps, decoders.Strip(" ", n_strip, 0)] if n_strip else steps)
    engine.add_special_tokens(["<unk>"])
    engine.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("n_strip", [0, 1])
@pytest.mark.parametrize("text", ["a b  a", "  a", "", "é 你 a😀", "b"])
def test_byte_fallback_json_as_the_library_does(tmp_path, n_strip, text):
    from tokenizers import Tokenizer

    write_llama_style(tmp_path, n_strip)
    tokenizer, engine = load_tokenizer(str(tmp_path)), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text)
    assert ids == engine.encode(text).ids
    assert tokenizer.decode(ids) == engine.decode(ids) == (text if n_strip else " " + text if text else "")
    cut = tokenizer.encode("你")[:-1]
    assert tokenizer.decode(cut) == engine.decode(cut)


# ---- tokenizer.model ---------------------------------------------------------------------------------------------


def decode_by_library(folder: Path, tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    """Runs of ordinary pieces by sentencepiece itself, the others as their name."""
    import sentencepiece

    engine = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    literal = tokenizer.special_ids | {1002}
    text, run = "", []
    for token_id in ids:
        if token_id in tokenizer.special_ids and skip:
            continue
        if token_id in literal:
            text, run = text + engine.decode(run) + tokenizer.token_text(token_id), []
        else:
            run.append(token_id)
    return text + engine.decode(run)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("trim", [True, False])
def test_decodes_as_sentencepiece_does(tmp_path, kind, dummy_prefix, trim):
    folder = write_sentencepiece(tmp_path, kind, dummy_prefix, trim)
    tokenizer = load_tokenizer(str(folder))
    n_pieces = sum(tokenizer.token_bytes(i) != b"" for i in range(1000))
    mark = tokenizer.id_of("▁")
    word = next(i for i in range(400) if tokenizer.token_text(i).startswith(" s"))
    space, lead, tail = (tokenizer.id_of(f"<0x{b:02X}>") for b in (0x20, 0xE4, 0xBD))
    pool = [mark, mark, word, word, space, lead, tail, 1000, 1002, 0, 1]

    @settings(max_examples=150, deadline=None)
    @given(
        ids=st.lists(st.one_of(st.sampled_from(pool), st.integers(3, n_pieces - 1)), max_size=12), skip=st.booleans()
    )
    def check(ids, skip):
        assert tokenizer.decode(ids, skip) == decode_by_library(folder, tokenizer, ids, skip)

    check()


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\0▁", exclude_categories=["Cs"])))
def test_sentencepiece_round_trip(pieces, text):
    assert pieces.decode(pieces.encode(text), skip_special_tokens=False) == text


def test_sentencepiece_facts(pieces):
    assert pieces.vocab_size == 1004
    assert pieces.special_ids == {0, 1, 2, pieces.id_of("<ctl>"), 1000, 1001, 1003}
    assert pieces.eos_token_ids == (2, 1000)
    assert pieces.special_tokens["cls_token"] == "<|begin_of_sentence|>"
    assert pieces.special_tokens["sep_token"] == "<|end_of_sentence|>"
    assert pieces.chat_template == "{{ sep_token }}"
    assert pieces.id_of("nothing like this") is None
    assert pieces.id_of("<unk>") == 0


def test_special_tokens_are_split_out_first(pieces):
    ids = pieces.encode("<|begin_of_sentence|>User: the<plain>x</s>")
    assert ids[0] == 1001 and ids[-1] == 2 and 1002 in ids
    assert ids[1 : ids.index(1002)] == pieces.encode("User: the")
    assert pieces.decode(ids) == "User: the<plain>x"
    assert pieces.decode(ids, skip_special_tokens=False) == "<|begin_of_sentence|>User: the<plain>x</s>"


def test_nothing_is_added_around_a_text(pieces):
    assert pieces.encode("the", add_special_tokens=True) == pieces.encode("the", add_special_tokens=False)
    assert pieces.encode("") == []


def test_white_space_beside_an_added_token(pieces):
    assert pieces.encode("the<mask:4>  the") == [*pieces.encode("the"), 1003, *pieces.encode("the")]
    assert pieces.encode("the<plain> x") != pieces.encode("the<plain>x")


def test_control_pieces_nobody_declared_are_ordinary_text(pieces):
    assert pieces.id_of("<ctl>") not in pieces.encode("a<ctl>b")


def test_piece_bytes(pieces):
    assert pieces.token_bytes(pieces.id_of("<0xE4>")) == b"\xe4"
    assert pieces.token_text(pieces.id_of("<0xE4>")) == MARK
    spaced = next(i for i in range(700) if pieces.token_bytes(i).startswith(b" ") and len(pieces.token_bytes(i)) > 1)
    assert pieces.id_of("▁" + pieces.token_text(spaced)[1:]) == spaced
    assert pieces.token_bytes(700) == b""  # a hole between the pieces and the added tokens


# ---- folders -----------------------------------------------------------------------------------------------------


def test_no_tokenizer(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(str(tmp_path))
    assert all(text in str(caught.value) for text in (str(tmp_path), "tokenizer.json", "tokenizer.model"))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": 3}'),
        ("tokenizer.model", b"not a model"),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b"\xff"),
        ("generation_config.json", b"{"),
        ("added_tokens.json", b'{"a": "b"}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": {"special": true}}}'),
    ],
)
def test_damaged_files_are_named(tmp_path, byte_level_folder, name, data):
    if name != "tokenizer.model":
        (tmp_path / "tokenizer.json").write_bytes((byte_level_folder / "tokenizer.json").read_bytes())
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name.split('.')[0]}|added_tokens"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", ["WordPiece", None])
def test_unknown_decoder_is_refused(tmp_path, byte_level_folder, kind):
    layout = json.loads((byte_level_folder / "tokenizer.json").read_text())
    layout["decoder"] = kind and {"type": kind, "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    with pytest.raises(CheckpointError, match=f"decoder {kind or 'null'} is not supported"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "J", "tokenizer_config.json": '{"chat_template": "C"}'}, "J"),
        ({"chat_template.json": '{"chat_template": "S"}', "tokenizer_config.json": '{"chat_template": "C"}'}, "S"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": "R"}]}'}, None),
        ({}, None),
    ],
)
def test_where_the_chat_template_is(tmp_path, byte_level_folder, files, expected):
    (tmp_path / "tokenizer.json").write_bytes((byte_level_folder / "tokenizer.json").read_bytes())
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert load_tokenizer(str(tmp_path)).chat_template == expected


def test_sep_token_ends_an_answer_only_where_the_template_uses_it(tmp_path, piece_folder):
    for file in piece_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(str(tmp_path)).eos_token_ids == (2,)
