"""The demo checkpoint: SmolLM2-135M-Instruct as a dense Llama or upcycled to ERNIE-4.5-MoE, built at first use.

Owns the cache folder (one finished folder per source, recipe and form) and the conversion. The MoE form computes
the same function as the dense one: per layer, the weakest hidden neurons of the feed-forward network become the shared
expert, the strongest become the routed part, and every expert holds all of the routed part in an order of its own. As
the weights of the chosen experts sum to one, any choice of experts gives the dense output.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdeploy.config.cache_folder import default_cache_dir
from fastdeploy.demo.gguf import SMOLLM2, GgufFile, Source, bytes_bar, fetch, tokenizer_json
from fastdeploy.errors import CheckpointError

Form = Literal["moe", "dense"]
Array = NDArray[Any]

RECIPE_VERSION = 1  # raise it with every change of a byte in the folders built here
N_EXPERTS = 8
TOP_K = 2
N_SHARED = 11  # the shared part is that many times as wide as an expert: 11 + 1 twelfths of the dense width
GATE_STD = 0.15

MANIFEST = "files.json"  # size of every other file of a finished folder

F16, F32 = np.dtype("<f2"), np.dtype("<f4")
BUILD_DEADLINE_S = 3600.0
logger = logging.getLogger(__name__)


def build_demo_model(cache_dir: Path | None = None, form: Form = "moe", show_progress: bool = True) -> Path:
    """Return the folder of the demo checkpoint in `form`, building it first when it is not in the cache.

    "moe" is an ERNIE-4.5-MoE checkpoint (359 MB), "dense" a Llama checkpoint (269 MB); both are float16 and give the
    same logits but for rounding. The first build downloads 93 MB by pip; bars go to stderr. `cache_dir` defaults to
    `default_cache_dir()`. Safe to call from several processes at once: one builds, the others wait for it.

    Raises CheckpointError when the source cannot be fetched or is not what it should be, when the cache folder cannot
    be written, or when another build holds the lock for longer than an hour.
    """
    source, root = SMOLLM2, default_cache_dir() if cache_dir is None else cache_dir.expanduser().absolute()
    folder = root / f"demo-model-{form}-{source.gguf_sha256[:12]}-r{RECIPE_VERSION}"
    try:
        if _is_complete(folder):
            return folder
        root.mkdir(parents=True, exist_ok=True)
        with _build_lock(root / "demo-model.lock"):
            if _is_complete(folder):
                return folder
            for stale in root.glob(".demo-model-*.tmp"):  # only the holder of the lock makes them: these are left-overs
                shutil.rmtree(stale)
            with tempfile.TemporaryDirectory(prefix=".demo-model-", suffix=".tmp", dir=root) as tmp:
                gguf_path, license_path = fetch(source, root, Path(tmp), show_progress)
                built = Path(tmp) / folder.name
                built.mkdir()
                _convert(GgufFile(gguf_path), form, built, show_progress)
                shutil.copyfile(license_path, built / "LICENSE")
                (built / "NOTICE").write_text(_notice(source, form))
                n_bytes = {path.name: path.stat().st_size for path in built.iterdir()}
                (built / MANIFEST).write_text(json.dumps(n_bytes, indent=2))
                if folder.exists():  # it has lost a file since it was built
                    shutil.rmtree(folder)
                built.rename(folder)
    except OSError as exc:
        raise CheckpointError(
            f"demo model: cannot build in the cache folder {root}: {exc}; set FD_CACHE_DIR to a folder with 1 GB free"
        ) from exc
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether a finished build is there; it appears whole, but a file of it may have been deleted or cut since."""
    try:
        n_bytes = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == n_bytes[name] for name in n_bytes)
    except (FileNotFoundError, ValueError):
        return False


@contextmanager
def _build_lock(path: Path) -> Iterator[None]:
    """Hold the file lock of the cache folder; it ends with the process, so a killed build never blocks the next one."""
    with path.open("a+") as file:
        deadline_s = time.monotonic() + BUILD_DEADLINE_S
        waits = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
            if time.monotonic() > deadline_s:
                raise CheckpointError(f"demo model: process {owner} has held {path} for an hour; stop it and try again")
            if not waits:
                logger.warning(
                    "demo model: process %d waits while process %s builds in %s", os.getpid(), owner, path.parent
                )
                waits = True
            time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _notice(source: Source, form: Form) -> str:
    """What the licence asks for: where the weights come from and that they were changed."""
    upcycled = f"""; upcycled to a Mixture-of-Experts model:
each feed-forward network but the first was split into a shared part and a routed part, of which {N_EXPERTS} reordered
copies are the experts; the router weights are pseudo-random numbers"""
    return f"""\
This folder holds a changed copy of SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0 (see LICENSE).
It was made from {Path(source.gguf_member).name} (conversion to GGUF: QuantFactory),
as found in the Python package {source.requirement} by Simon Willison, Apache License 2.0.

Changed by fastdeploy (demo model recipe {RECIPE_VERSION}, form "{form}"): dequantised to float16; re-laid out as a
safetensors checkpoint for another program{upcycled if form == "moe" else ""}.
"""


def hashed_bytes(label: str, n_bytes: int) -> bytes:
    """Reproducible pseudo-random bytes: the same for every version of numpy, which does not promise that of its own."""
    return hashlib.shake_128(f"fastdeploy demo model/{label}".encode()).digest(n_bytes)


def hashed_permutation(label: str, n: int) -> NDArray[np.intp]:
    """A pseudo-random order of 0..n-1: the ranks of n 64-bit numbers."""
    return np.argsort(np.frombuffer(hashed_bytes(label, 8 * n), "<u8"), kind="stable")


def hashed_normal(label: str, shape: tuple[int, ...], std: float) -> NDArray[np.float32]:
    """Pseudo-random values of mean 0 and deviation `std`, near-normal: sums of 12 uniform 16-bit numbers.

    The sum of 12 has the variance of 2**32 - 1 and needs no logarithm, whose last bit differs between math libraries.
    """
    word_n12 = np.frombuffer(hashed_bytes(label, 24 * math.prod(shape)), "<u2").reshape(-1, 12)
    centred_n: NDArray[np.int64] = word_n12.sum(axis=1, dtype=np.int64) - 12 * 65535 // 2
    value: NDArray[np.float32] = (centred_n * (std / 65536)).astype(np.float32).reshape(shape)
    return value


class Ffn(NamedTuple):
    """Feed-forward network f(x) = down(silu(gate x) * (up x)): a sum over its hidden neurons n, in any order."""

    gate_nH: Array
    up_nH: Array
    down_Hn: Array

    def take(self, neurons: Array) -> "Ffn":
        return Ffn(self.gate_nH[neurons], self.up_nH[neurons], self.down_Hn[:, neurons])


def split_ffn(ffn: Ffn, n_routed: int) -> tuple[Ffn, Ffn]:
    """(shared, routed): the `n_routed` neurons with the largest product of their three weight norms are routed.

    A strong routed part makes its loss visible in the text. shared(x) + routed(x) = f(x).
    """
    axes = (ffn.gate_nH, 1), (ffn.up_nH, 1), (ffn.down_Hn, 0)
    square_3n = np.stack([np.square(weight, dtype=np.float64).sum(axis) for weight, axis in axes])
    weakest_first = np.argsort(square_3n.prod(0), kind="stable")
    return ffn.take(weakest_first[:-n_routed]), ffn.take(weakest_first[-n_routed:])


def routed_expert(routed: Ffn, layer: int, expert: int) -> Ffn:
    """The routed part in the expert's own neuron order, so that a mix of two experts' matrices computes garbage."""
    return routed.take(hashed_permutation(f"layer {layer}/expert {expert}", len(routed.gate_nH)))


def half_split_rows(weight_AH: Array, n_heads: int) -> Array:
    """Rows of a q or k projection from the interleaved RoPE order (GGUF, ERNIE) to the half-split one (Llama)."""
    n_rows, n_columns = weight_AH.shape
    return weight_AH.reshape(n_heads, n_rows // n_heads // 2, 2, n_columns).swapaxes(1, 2).reshape(weight_AH.shape)


def to_half(weight: Array, name: str) -> Array:
    """`weight` as float16; raises CheckpointError when a value does not fit."""
    with np.errstate(over="ignore"):
        half = weight.astype(F16)
    if not np.isfinite(half).all():
        raise CheckpointError(f"demo model: tensor {name} has values beyond float16's largest, 65504")
    return half


class LazyTensor(NamedTuple):
    """A tensor of the checkpoint that is computed when it is written; `make` returns it in `dtype` and `shape`."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], Array]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def router_tensors(layer: int, H: int) -> Iterator[LazyTensor]:
    """Gate [E, H] and correction bias [1, E] of a layer, float32."""
    prefix, shape = f"model.layers.{layer}.mlp", (N_EXPERTS, H)
    yield LazyTensor(
        f"{prefix}.gate.weight", F32, shape, partial(hashed_normal, f"layer {layer}/gate", shape, GATE_STD)
    )
    bias = partial(np.zeros, (1, N_EXPERTS), F32)
    yield LazyTensor(f"{prefix}.moe_statics.e_score_correction_bias", F32, (1, N_EXPERTS), bias)


def ffn_tensors(prefix: str, n_neurons: int, H: int, make: Callable[[], Ffn]) -> Iterator[LazyTensor]:
    """The three projections of the feed-forward network that `make` returns, float16."""
    yield LazyTensor(f"{prefix}.gate_proj.weight", F16, (n_neurons, H), lambda: make().gate_nH)
    yield LazyTensor(f"{prefix}.up_proj.weight", F16, (n_neurons, H), lambda: make().up_nH)
    yield LazyTensor(f"{prefix}.down_proj.weight", F16, (H, n_neurons), lambda: make().down_Hn)


def plan_tensors(gguf: GgufFile, config: dict[str, Any]) -> Iterator[LazyTensor]:
    """The tensors of the checkpoint that `config` describes, in file order: float32 first, then float16 by layer."""
    H, n_neurons, n_layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    n_heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    n_kv_rows = H // n_heads["q"] * n_heads["k"]
    n_routed = config.get("moe_intermediate_size", 0)
    moe_layers = range(1, n_layers) if n_routed else range(0)

    def half(source: str) -> Array:
        return to_half(gguf.load(source), source)

    def attention(layer: int, part: str) -> Array:
        weight = half(f"blk.{layer}.attn_{part}.weight")
        return weight if n_routed or part not in n_heads else half_split_rows(weight, n_heads[part])

    @lru_cache(maxsize=1)  # tensors are made in file order: each layer is decoded once, and only one is in memory
    def dense(layer: int) -> Ffn:
        return Ffn(*(half(f"blk.{layer}.ffn_{part}.weight") for part in ("gate", "up", "down")))

    @lru_cache(maxsize=1)
    def split(layer: int) -> tuple[Ffn, Ffn]:
        return split_ffn(dense(layer), n_routed)

    def shared(layer: int) -> Ffn:
        return split(layer)[0]

    def expert(layer: int, e: int) -> Ffn:
        return routed_expert(split(layer)[1], layer, e)

    for layer in moe_layers:
        yield from router_tensors(layer, H)
    yield LazyTensor("model.embed_tokens.weight", F16, (config["vocab_size"], H), partial(half, "token_embd.weight"))
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}"
        for name, norm in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
            yield LazyTensor(f"{prefix}.{name}.weight", F16, (H,), partial(half, f"blk.{layer}.{norm}.weight"))
        for name, part, n_rows in (("q", "q", H), ("k", "k", n_kv_rows), ("v", "v", n_kv_rows), ("o", "output", H)):
            make = partial(attention, layer, part)
            yield LazyTensor(f"{prefix}.self_attn.{name}_proj.weight", F16, (n_rows, H), make)
        if layer not in moe_layers:
            yield from ffn_tensors(f"{prefix}.mlp", n_neurons, H, partial(dense, layer))
            continue
        yield from ffn_tensors(f"{prefix}.mlp.shared_experts", n_neurons - n_routed, H, partial(shared, layer))
        for e in range(N_EXPERTS):
            yield from ffn_tensors(f"{prefix}.mlp.experts.{e}", n_routed, H, partial(expert, layer, e))
    yield LazyTensor("model.norm.weight", F16, (H,), partial(half, "output_norm.weight"))


def write_safetensors(path: Path, tensors: Iterable[LazyTensor], on_bytes: Callable[[int], object]) -> None:
    """Write `path` header first, then one tensor at a time; `on_bytes` is told the size of each as it is written.

    Raises CheckpointError when `make` of a tensor returns another dtype or shape than announced.
    """
    plan, end = list(tensors), 0
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    for tensor in plan:
        start, end = end, end + tensor.n_bytes
        kind = {F16: "F16", F32: "F32"}[tensor.dtype]
        header[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape, make in plan:
            value = make()
            if value.dtype != dtype or value.shape != shape:
                raise CheckpointError(
                    f"{path}: tensor {name} came out as {value.dtype} {value.shape}, expected {dtype} {shape}: "
                    "the source has other shapes than its metadata says"
                )
            file.write(np.ascontiguousarray(value).data)
            on_bytes(value.nbytes)


def model_config(gguf: GgufFile, form: Form) -> dict[str, Any]:
    """Content of config.json, from the metadata of the GGUF file."""
    n_layers, n_neurons = gguf.scalar("llama.block_count", int), gguf.scalar("llama.feed_forward_length", int)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "hidden_size": gguf.scalar("llama.embedding_length", int),
        "intermediate_size": n_neurons,
        "num_hidden_layers": n_layers,
        "num_attention_heads": gguf.scalar("llama.attention.head_count", int),
        "num_key_value_heads": gguf.scalar("llama.attention.head_count_kv", int),
        "hidden_act": "silu",
        "vocab_size": gguf.scalar("llama.vocab_size", int),
        "max_position_embeddings": gguf.scalar("llama.context_length", int),
        # stored as float32, whose nearest value to 1e-5 would be written as 9.999999747378752e-06
        "rms_norm_eps": float(f"{gguf.scalar('llama.attention.layer_norm_rms_epsilon', float):.6g}"),
        "rope_theta": gguf.scalar("llama.rope.freq_base", float),
        "tie_word_embeddings": True,
        "bos_token_id": gguf.scalar("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": gguf.scalar("tokenizer.ggml.eos_token_id", int),
        "pad_token_id": gguf.scalar("tokenizer.ggml.padding_token_id", int),
    }
    if form == "dense":
        return config | {"attention_bias": False, "mlp_bias": False}
    return config | {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "use_bias": False,
        "moe_num_experts": N_EXPERTS,
        "moe_k": TOP_K,
        "moe_intermediate_size": n_neurons // (N_SHARED + 1),
        "moe_num_shared_experts": N_SHARED,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": n_layers - 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
    }


def tokenizer_config(gguf: GgufFile) -> dict[str, Any]:
    """Content of tokenizer_config.json: special tokens, length limit and the chat template of the GGUF file."""
    tokens = gguf.items("tokenizer.ggml.tokens", str)
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{
            f"{name}_token": tokens[gguf.scalar(f"tokenizer.ggml.{key}_token_id", int)] for name, key in special.items()
        },
        "model_max_length": gguf.scalar("llama.context_length", int),
        "clean_up_tokenization_spaces": False,
        "chat_template": gguf.scalar("tokenizer.chat_template", str),
    }


def _convert(gguf: GgufFile, form: Form, folder: Path, show_progress: bool) -> None:
    """Write the checkpoint, its configuration and its tokenizer into `folder`."""
    config = model_config(gguf, form)
    stop_ids = [gguf.scalar(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "unknown")]
    generation = {name: config[name] for name in ("bos_token_id", "pad_token_id")}
    documents = {
        "config.json": config,
        "generation_config.json": generation | {"eos_token_id": stop_ids, "do_sample": False},
        "tokenizer.json": tokenizer_json(gguf),
        "tokenizer_config.json": tokenizer_config(gguf),
    }
    for name, content in documents.items():
        indent = None if name == "tokenizer.json" else 2
        (folder / name).write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    plan = list(plan_tensors(gguf, config))
    n_bytes = sum(tensor.n_bytes for tensor in plan)
    with bytes_bar(n_bytes, f"converting ({form})", show_progress) as bar:
        write_safetensors(folder / "model.safetensors", plan, bar.update)
