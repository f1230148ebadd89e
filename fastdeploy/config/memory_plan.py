"""What a rank will hold in memory, worked out from the configuration alone: no weights are read, torch is not imported.

It repeats in numbers what `layers/` and `runner/` allocate, and tests and `benchmarks/memory_plan.py` compare the two.
What no configuration changes, the memory of Python, torch and the CUDA context, is for the caller to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fastdeploy.config import memory_cpu
from fastdeploy.config.quantization import matrix_bytes
from fastdeploy.config.schema import DTypeName, EngineConfig, MoEShape
from fastdeploy.distributed import topology
from fastdeploy.distributed.expert_placement import STAGING_BYTES, slots_per_rank
from fastdeploy.distributed.topology import Position

ITEM_BYTES: Mapping[DTypeName, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
CUDA_CONTEXT_BYTES = 600 << 20  # of a GPU, taken before any tensor: the context and the libraries' own workspace
_NEVER_BORROWED = ("biases", "experts", "routers")
_COMPLEX_BYTES, _ID_BYTES, _FLOAT_BYTES = 8, 8, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of one rank. `weights` names the parts of the model; `buffers` what the largest step needs at most."""

    number: int
    weights: Mapping[str, int]
    borrowed: bool  # all weights but experts, routers and biases are another rank's, see distributed/shared_weights.py
    n_pages: int
    page_bytes: int
    buffers: Mapping[str, int]
    device_bytes: int
    process_bytes: int = 0  # of the process before it has a model, where that is the device's memory

    @property
    def weight_bytes(self) -> int:
        """All weights that are this rank's own."""
        return sum(n for part, n in self.weights.items() if not self.borrowed or part in _NEVER_BORROWED)

    @property
    def kv_bytes(self) -> int:
        """All KV pages."""
        return self.n_pages * self.page_bytes

    @property
    def buffer_bytes(self) -> int:
        """All buffers."""
        return sum(self.buffers.values())

    @property
    def total_bytes(self) -> int:
        """All of these together."""
        return self.process_bytes + self.weight_bytes + self.kv_bytes + self.buffer_bytes


def plan_rank(
    config: EngineConfig, number: int, stored: DTypeName, device_bytes: int, process_bytes: int = 0
) -> RankMemory:
    """Memory of rank `number`, whose device (on a CPU: whose share of the host) has `device_bytes`.

    `process_bytes`: what its process takes of them without a model.

    `stored` is the dtype of the checkpoint, in which a CPU keeps 16-bit weights. Pages are those of
    `--num-gpu-blocks-override`, else what `--gpu-memory-utilization` leaves; 0 when nothing is left.
    """
    where = topology.position(config.parallel, number)
    weights = _weights(config, where, stored)
    buffers = _buffers(config, where)
    page_bytes = _page_bytes(config, where)
    borrowed = (
        config.model.device == "cpu" and topology.numbers_with_equal_weights(config.parallel, number)[0] != number
    )
    return RankMemory(
        number=number,
        weights=weights,
        borrowed=borrowed,
        n_pages=_n_pages(config, page_bytes, sum(weights.values()) + process_bytes, device_bytes),
        page_bytes=page_bytes,
        buffers=buffers,
        device_bytes=device_bytes,
        process_bytes=process_bytes,
    )


def _weights(config: EngineConfig, where: Position, stored: DTypeName) -> dict[str, int]:
    model, shape = config.model, config.model.shape
    on_cpu, item = model.device == "cpu", ITEM_BYTES[model.dtype]
    # Our CPU kernels widen 16-bit weights as they multiply, so these stay as they are stored.
    held = min(item, ITEM_BYTES[stored]) if on_cpu else item
    n_rows = topology.run_of(shape.vocab_size, where.n_tensor, where.tensor_rank)[1]
    table = n_rows * shape.hidden_size * held
    sparse = shape.moe.layers if shape.moe is not None else ()
    n_dense = shape.n_layers - len(sparse)
    ffn_width = shape.ffn_width // where.n_tensor
    attention = [_linear_bytes(config, *sizes, held) for sizes in _attention_sizes(config, where)]
    parts = {
        "embedding": table,
        # A tied head is the same tensor on a GPU; a CPU multiplies with a copy in panels.
        "head": 0 if shape.tied_embeddings and not on_cpu else table,
        "attention": shape.n_layers * sum(attention),
        "dense layers": n_dense * _ffn_bytes(config, ffn_width, held),
        "biases": _biases(config, where) * item,
    }
    if shape.moe is not None:
        parts |= _sparse_weights(config, where, shape.moe, held)
    return parts


def _linear_bytes(config: EngineConfig, n_out: int, n_in: int, held: int) -> int:
    """Of a linear layer's weight. One in FP8 is kept in both forms: few rows take the one that is stored."""
    name = config.model.quantization
    plain = n_out * n_in * held if name == "block_wise_fp8" else 0
    return plain + matrix_bytes(name, n_out, n_in, held)


def _ffn_bytes(config: EngineConfig, width: int, held: int) -> int:
    """Of a gated FFN made of linear layers."""
    hidden = config.model.shape.hidden_size
    return _linear_bytes(config, 2 * width, hidden, held) + _linear_bytes(config, hidden, width, held)


def _attention_sizes(config: EngineConfig, where: Position) -> tuple[tuple[int, int], tuple[int, int]]:
    """Outputs and inputs of one layer's two projections."""
    shape = config.model.shape
    n_heads, n_kv_heads = shape.n_heads // where.n_tensor, topology.local_kv_heads(shape.n_kv_heads, where)[1]
    n_q = n_heads * shape.head_dim
    return (n_q + 2 * n_kv_heads * shape.head_dim, shape.hidden_size), (shape.hidden_size, n_q)


def _biases(config: EngineConfig, where: Position) -> int:
    """Elements; one tensor rank adds those of what is summed up."""
    shape, adds = config.model.shape, where.tensor_rank == 0
    n_heads, n_kv_heads = shape.n_heads // where.n_tensor, topology.local_kv_heads(shape.n_kv_heads, where)[1]
    attention = shape.head_dim * (n_heads + 2 * n_kv_heads) + adds * shape.hidden_size
    ffn = 2 * shape.ffn_width // where.n_tensor + adds * shape.hidden_size
    return shape.n_layers * (shape.attention_bias * attention + shape.mlp_bias * ffn)


def _sparse_weights(config: EngineConfig, where: Position, moe: MoEShape, held: int) -> dict[str, int]:
    name, hidden = config.model.quantization, config.model.shape.hidden_size
    n_local = topology.local_experts(moe, where)[1]
    if config.eplb is not None:
        n_local = slots_per_rank(moe.n_experts, config.eplb.redundant, where.group_size)
    width = moe.expert_width // (1 if where.spreads_experts else where.n_tensor)
    shared_width = moe.shared_width // where.n_tensor
    expert = matrix_bytes(name, 2 * width, hidden, held) + matrix_bytes(name, hidden, width, held)
    # Where every rank of GPUs has all experts the shared FFN is computed along with them, cut into their width.
    cut = config.model.device == "cuda" and not where.spreads_experts and shared_width % width == 0
    shared = shared_width // width * expert if cut else _ffn_bytes(config, shared_width, held)
    gate_bytes = _FLOAT_BYTES if moe.gate_in_float32 else ITEM_BYTES[config.model.dtype]
    n_copies = 2 if config.model.device == "cpu" else 1  # a CPU multiplies with a copy in panels
    n_layers = len(moe.layers)
    return {
        "experts": n_layers * n_local * expert,
        "shared experts": n_layers * shared,
        "routers": n_layers * moe.n_experts * hidden * gate_bytes * n_copies,
    }


def _page_bytes(config: EngineConfig, where: Position) -> int:
    shape = config.model.shape
    n_kv_heads = topology.local_kv_heads(shape.n_kv_heads, where)[1]
    per_token = 2 * n_kv_heads * shape.head_dim * ITEM_BYTES[config.model.dtype]
    return shape.n_layers * config.cache.page_tokens * per_token


def _n_pages(config: EngineConfig, page_bytes: int, taken_bytes: int, device_bytes: int) -> int:
    """As `runner/kv_memory.py` chooses, from what is free once the weights are there."""
    cache, model = config.cache, config.model
    if cache.n_pages is not None:
        return cache.n_pages
    taken = taken_bytes + (CUDA_CONTEXT_BYTES if model.device == "cuda" else 0)
    n_pages = max(int(device_bytes * cache.memory_fraction) - taken, 0) // page_bytes
    if model.device == "cpu":
        n_full_length = -(-model.max_model_len // cache.page_tokens) * config.scheduler.max_seqs
        n_pages = min(n_pages, n_full_length)
    return n_pages


def _buffers(config: EngineConfig, where: Position) -> dict[str, int]:
    """Of a step with as many tokens as it may have: the widest layer's activations, logits, exchange, tables."""
    model, shape, limits = config.model, config.model.shape, config.scheduler
    item, n_tokens = ITEM_BYTES[model.dtype], limits.max_batched_tokens
    n_vocab, hidden = shape.vocab_size, shape.hidden_size
    n_qkv = shape.head_dim * (shape.n_heads // where.n_tensor + 2 * topology.local_kv_heads(shape.n_kv_heads, where)[1])
    widest = max(n_qkv, 3 * shape.ffn_width // where.n_tensor)
    moe, exchange = shape.moe, 0
    n_rows = n_tokens * (where.group_size if where.spreads_experts else 1)
    if moe is not None:
        widest = max(widest, moe.n_experts_per_token * (3 * moe.expert_width + hidden) // where.group_size)
        if where.spreads_experts:
            routing = moe.n_experts_per_token * (_ID_BYTES + _FLOAT_BYTES)
            exchange = n_rows * (2 * hidden * item + routing)
    activations = n_tokens * 3 * hidden * item + n_rows * widest * item
    logits = limits.max_seqs * n_vocab * (item + _FLOAT_BYTES)
    if model.device == "cpu":
        activations = memory_cpu.activation_bytes(config, where, item)
        exchange = memory_cpu.exchange_bytes(config, where, item)
        # The activations are gone by then, and their memory has gone back to the system.
        logits = max(memory_cpu.logits_bytes(config, item) - activations, 0)
    return {
        "activations": activations,
        "logits": logits,
        "exchange": exchange,
        "moves of experts": 0 if config.eplb is None else STAGING_BYTES,
        "positions": model.max_model_len * shape.head_dim // 2 * _COMPLEX_BYTES,
    }
