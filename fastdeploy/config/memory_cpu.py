"""What a step takes on a CPU beside weights and pages, as `layers/` and `kernels/cpu/` allocate it.

Counted are the tensors and scratch space that live at the same time where a step of as many tokens as there may be
takes the most; ranks return large blocks at once (`hardware.cpu_rank_environment`), so little else is held.
"""

from __future__ import annotations

from fastdeploy.config.schema import EngineConfig, MoEShape
from fastdeploy.distributed import topology
from fastdeploy.distributed.exchange_size import ExchangeSize
from fastdeploy.distributed.topology import Position

_FFN_ROWS = 512  # tokens that the C kernel of FFNs works on together
_QUERY_BLOCK = 512  # rows of a prefill's mask, a byte for each key
_ID_BYTES = 8


def activation_bytes(config: EngineConfig, where: Position, item: int) -> int:
    """Of the sub-layer that takes most, and of what a block holds meanwhile; items of `item` bytes."""
    shape, n_tokens = config.model.shape, config.scheduler.max_batched_tokens
    row = shape.hidden_size * item
    takes = [_attention(config, where, item)]
    if shape.moe is None or len(shape.moe.layers) < shape.n_layers:
        takes.append(
            n_tokens * row + _ffn_scratch(n_tokens, shape.hidden_size, shape.ffn_width // where.n_tensor, item)
        )
    if shape.moe is not None:
        takes.append(_experts(config, where, shape.moe, item))
    if where.n_tensor > 1:
        takes = [n_bytes + n_tokens * row for n_bytes in takes]  # the sum over the ranks
    rotations = n_tokens * shape.head_dim // 2 * 8
    # Two inputs, which the caller holds until the block is done, their sum and the norm of it.
    return 4 * n_tokens * row + rotations + max(takes)


def logits_bytes(config: EngineConfig, item: int) -> int:
    """Of the last hidden states and the logits of all requests, when nothing else lives; `item` + 4 bytes a logit."""
    shape, limits = config.model.shape, config.scheduler
    return 2 * limits.max_batched_tokens * shape.hidden_size * item + limits.max_seqs * shape.vocab_size * (item + 4)


def exchange_bytes(config: EngineConfig, where: Position, item: int) -> int:
    """Of the memory that the ranks of a group share, for the first of them, which makes it; 0 for the others."""
    if not where.spreads_experts or config.model.shape.moe is None or where.group_rank:
        return 0
    size = _exchange_size(config, where, config.model.shape.moe, item)
    return size.touched_bytes(config.scheduler.max_batched_tokens * where.group_size)


def _exchange_size(config: EngineConfig, where: Position, moe: MoEShape, item: int) -> ExchangeSize:
    return ExchangeSize(where.group_size, config.model.shape.hidden_size * item, moe.n_experts_per_token, item)


def _attention(config: EngineConfig, where: Position, item: int) -> int:
    """While a prompt attends to the longest context, or while the heads are projected back."""
    shape, n_tokens, max_len = config.model.shape, config.scheduler.max_batched_tokens, config.model.max_model_len
    n_kv_heads = topology.local_kv_heads(shape.n_kv_heads, where)[1]
    heads = n_tokens * shape.n_heads // where.n_tensor * shape.head_dim * item
    qkv = heads + n_tokens * 2 * n_kv_heads * shape.head_dim * item
    keys_and_values = 2 * n_kv_heads * max_len * shape.head_dim * item
    of_one_prompt = heads * min(n_tokens, max_len) // n_tokens
    mask = min(_QUERY_BLOCK, n_tokens) * max_len
    # What a prompt's blocks of queries gave is there twice while it is joined.
    attend = qkv + heads + keys_and_values + mask + 2 * of_one_prompt
    project = qkv + 2 * heads + n_tokens * shape.hidden_size * item  # one of the two in blocks, for the product
    return max(attend, project)


def _experts(config: EngineConfig, where: Position, moe: MoEShape, item: int) -> int:
    """Experts here, for rows of all ranks or for this one's."""
    hidden, n_tokens, k = config.model.shape.hidden_size, config.scheduler.max_batched_tokens, moe.n_experts_per_token
    width = moe.expert_width // (1 if where.spreads_experts else where.n_tensor)
    n_rows, joined = n_tokens, 0
    if where.spreads_experts:
        n_all = n_tokens * where.group_size
        n_rows = min(n_all, _exchange_size(config, where, moe, item).max_rows)
        # What came back, and where the pieces of an exchange that is cut are put together.
        joined = n_tokens * hidden * item * (2 if n_rows < n_all else 1)
    n_local = topology.local_experts(moe, where)[1]
    # Rows that go to experts elsewhere take no scratch space; this many stay if experts are chosen evenly.
    scratch = _ffn_scratch(n_rows, hidden, width, item) * k * n_local // moe.n_experts
    routing = n_tokens * k * (_ID_BYTES + item) + n_rows * k * 2 * _ID_BYTES
    shared = n_tokens * hidden * item if moe.shared_width else 0
    return n_rows * hidden * item + joined + scratch + routing + shared


def _ffn_scratch(n_tokens: int, hidden: int, width: int, item: int) -> int:
    """Of one expert for each row: rows in blocks, and the gated values between the two products."""
    return min(n_tokens, _FFN_ROWS) * (hidden + width) * item
