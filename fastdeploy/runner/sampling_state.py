"""What the sampler must know of each batch slot, kept across steps, and the part of it that one step needs.

Parameters live in host arrays. `SamplingState.batch` turns those of the rows that sample into device tensors and keeps
them while the same slots sample, so that a steady decode step sends one small array: the uniform numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeploy.runner.ranking import first_depth
from fastdeploy.sampling_params import ParamValueError, SamplingParams

GREEDY_BELOW = 1e-5  # temperatures below take the most likely token
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MUST_BE_SET = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")


def counter_uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits per (seed, position): no state, so nothing else can change it.

    Two rounds of the splitmix64 finaliser: the first spreads the seed, so that streams of neighbouring seeds do not
    overlap, the second is splitmix64 started there and advanced to `position`.
    """
    mixed = _mix(_mix(seeds + _GAMMA) + (positions + np.uint64(1)) * _GAMMA)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def host_to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for; on the CPU the tensor shares the array's memory."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class PenaltyHistory:
    """Which tokens a request has seen, on the device, for the slots that use penalties.

    Counted there because a step ahead the host does not know the token sampled last. Rows h are given to slots as
    needed: 5 bytes a vocabulary entry and row, grown by doubling and never shrunk.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.n_output_hV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self.in_prompt_hV = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._row_of: dict[int, int] = {}
        self._free: list[int] = []

    def start(self, slot: int, token_ids: Sequence[int], n_prompt_tokens: int) -> None:
        """Give the slot a row that holds these tokens, the first `n_prompt_tokens` as prompt."""
        self.drop(slot)
        if not self._free:
            self._grow()
        row = self._row_of[slot] = self._free.pop()
        n_output_V, in_prompt_V = self.n_output_hV[row].zero_(), self.in_prompt_hV[row].zero_()
        device, vocab_size = n_output_V.device, len(n_output_V)
        prompt_ids = host_to_device(_in_vocabulary(token_ids[:n_prompt_tokens], vocab_size), device)
        output_ids = host_to_device(_in_vocabulary(token_ids[n_prompt_tokens:], vocab_size), device)
        in_prompt_V.index_fill_(0, prompt_ids, True)
        n_output_V.index_add_(0, output_ids, torch.ones_like(output_ids, dtype=torch.int32))

    def drop(self, slot: int) -> None:
        """Take the slot's row back, if it has one."""
        if slot in self._row_of:
            self._free.append(self._row_of.pop(slot))

    def rows(self, slots: Sequence[int]) -> NDArray[np.int64]:
        """Rows of slots that were started here."""
        return np.array([self._row_of[slot] for slot in slots], dtype=np.int64)

    def add(self, rows_p: Tensor, token_ids_p: Tensor) -> None:
        """Count one more output token in each of these rows, which must differ."""
        self.n_output_hV[rows_p, token_ids_p] += 1

    def _grow(self) -> None:
        n_old = self.n_output_hV.shape[0]
        n_more = max(4, n_old)
        self.n_output_hV = torch.cat(
            [self.n_output_hV, self.n_output_hV.new_zeros((n_more, self.n_output_hV.shape[1]))]
        )
        self.in_prompt_hV = torch.cat(
            [self.in_prompt_hV, self.in_prompt_hV.new_zeros((n_more, self.n_output_hV.shape[1]))]
        )
        self._free.extend(range(n_old + n_more - 1, n_old - 1, -1))


@dataclass(frozen=True, slots=True)
class Edits:
    """Single logits to change: row, token id, and what to add (bias) or to write (ban); i entries, no pair twice."""

    rows_i: Tensor  # int64
    token_ids_i: Tensor  # int64
    values_i: Tensor  # float32


@dataclass(frozen=True, slots=True)
class PenaltyRows:
    """The rows with any penalty."""

    rows_p: Tensor  # int64
    history: PenaltyHistory
    history_rows_p: Tensor  # int64
    repetition_p1: Tensor  # float32
    frequency_p1: Tensor  # float32
    presence_p1: Tensor  # float32


@dataclass(frozen=True, slots=True)
class RandomRows:
    """The rows that draw: first the `n_plain` without top-k and top-p, then the truncated ones (axis t)."""

    rows_r: Tensor | None  # int64; None when every row draws and they stand in this order already
    n_plain: int
    temperature_r1: Tensor  # float32
    min_p_r1: Tensor | None  # float32; None when no row has one
    top_k_t: Tensor  # int64, V where off
    top_p_t: Tensor  # float64
    n_first: int  # candidates to rank first
    decided: bool  # every truncated row has a top-k


@dataclass(frozen=True, slots=True)
class TopGroup:
    """Rows of a `LogprobRows` that want the same number of top tokens."""

    n_top: int
    members: tuple[int, ...]  # indices into the l rows
    index_g: Tensor | None  # the same on the device; None is all l rows in order


@dataclass(frozen=True, slots=True)
class NucleusRows:
    """Rows of a `LogprobRows` whose log-probabilities are to be renormalised after top-p."""

    index_n: Tensor  # int64, indices into the l rows
    top_p_n: Tensor  # float64, below 1


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """The rows whose log-probabilities were asked for."""

    rows: tuple[int, ...]
    rows_l: Tensor | None  # the same on the device; None is all rows of the batch in order
    groups: tuple[TopGroup, ...]
    temperature_l1: Tensor | None  # float32, 1 where not to be scaled; None when no row is
    nucleus: NucleusRows | None


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything about a set of sampling rows that stays the same from step to step; None is a stage nobody needs."""

    n_rows: int
    bias: Edits | None
    bans: Edits | None
    penalties: PenaltyRows | None
    random: RandomRows | None
    all_random: bool
    logprobs: LogprobRows | None

    @property
    def plain_greedy(self) -> bool:
        """Whether every row just takes its most likely token, and nobody wants to know more."""
        stages = (self.bias, self.bans, self.penalties, self.random, self.logprobs)
        return all(stage is None for stage in stages)


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The rows of one step that sample."""

    layout: Layout
    uniforms_r: Tensor | None  # float64 in [0, 1), in the order of `layout.random`


class SamplingState:
    """Sampling parameters of every slot. One per rank; all ranks of a replica hold the same and so sample the same."""

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.history = PenaltyHistory(vocab_size, device)
        self._eos = tuple(eos_token_ids)
        self._params: list[SamplingParams | None] = [None] * max_slots
        self._temperature = np.ones(max_slots, dtype=np.float32)
        self._greedy = np.ones(max_slots, dtype=np.bool_)
        self._top_p = np.ones(max_slots, dtype=np.float64)
        self._top_k = np.full(max_slots, vocab_size, dtype=np.int64)
        self._min_p = np.zeros(max_slots, dtype=np.float32)
        self._seed = np.zeros(max_slots, dtype=np.uint64)
        self._min_tokens = np.zeros(max_slots, dtype=np.int64)
        self._penalties = np.zeros((max_slots, 3), dtype=np.float32)  # repetition, frequency, presence
        self._penalised = np.zeros(max_slots, dtype=np.bool_)
        empty = np.zeros(0, dtype=np.int64)
        self._stop_ids = [empty] * max_slots
        self._bad_ids = [empty] * max_slots
        self._bias: list[tuple[NDArray[np.int64], NDArray[np.float32]] | None] = [None] * max_slots
        self._key: tuple[bytes, bytes] | None = None
        self._layout: Layout | None = None
        self._random_order = empty

    def start(self, slot: int, params: SamplingParams, token_ids: Sequence[int], n_prompt_tokens: int) -> None:
        """A request takes the slot: `token_ids` is its prompt and its output so far.

        Token ids to ban or bias that the vocabulary lacks have no effect. Raises `ParamValueError` when `params` has
        an unset number (see `SamplingParams.resolved`).
        """
        for name in _MUST_BE_SET:
            if getattr(params, name) is None:
                raise ParamValueError(f"{name} must be set before a request reaches a rank, got None", name)
        self._key = None
        self._params[slot] = params
        temperature, top_p = params.temperature or 0.0, params.top_p or 0.0
        self._greedy[slot] = temperature < GREEDY_BELOW or params.top_k == 1 or top_p == 0.0
        self._temperature[slot] = 1.0 if temperature < GREEDY_BELOW else temperature
        self._top_p[slot] = top_p
        self._top_k[slot] = min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size
        self._min_p[slot] = params.min_p
        self._seed[slot] = params.seed or 0
        self._min_tokens[slot] = params.min_tokens
        stop_ids = [*(params.stop_token_ids or ()), *(() if params.ignore_eos else self._eos)]
        self._stop_ids[slot] = np.unique(_in_vocabulary(stop_ids, self.vocab_size))
        self._bad_ids[slot] = np.unique(_in_vocabulary(params.bad_words_token_ids or (), self.vocab_size))
        self._bias[slot] = self._checked_bias(params)
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._penalties[slot] = penalties
        self._penalised[slot] = penalties != (1.0, 0.0, 0.0)
        if self._penalised[slot]:
            self.history.start(slot, token_ids, n_prompt_tokens)
        else:
            self.history.drop(slot)

    def batch(self, slots: Sequence[int], positions: Sequence[int]) -> SamplingBatch:
        """The rows that sample in this step: slot, and index of the token to be sampled among the output tokens.

        Slots differ and each was started. The position, with the request's seed, alone decides the random number.
        """
        slots_s = np.asarray(slots, dtype=np.int64)
        positions_s = np.asarray(positions, dtype=np.int64)
        early_s = positions_s < self._min_tokens[slots_s]
        key = (slots_s.tobytes(), early_s.tobytes())
        if key != self._key or self._layout is None:
            self._layout = self._make_layout(slots_s, early_s)
            self._key = key
        if self._layout.random is None:
            return SamplingBatch(self._layout, None)
        order_r = self._random_order
        uniforms_r = counter_uniforms(self._seed[slots_s[order_r]], positions_s[order_r].astype(np.uint64))
        return SamplingBatch(self._layout, host_to_device(uniforms_r, self.device))

    def _checked_bias(self, params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        bias = {t: v for t, v in params.logit_bias.items() if 0 <= t < self.vocab_size}
        if not bias:
            return None
        # An infinite logit would leave no probability to compute; -inf is a ban and may stay.
        values = np.nan_to_num(np.array(list(bias.values())), nan=0.0, posinf=1e30, neginf=-np.inf)
        return np.array(list(bias), dtype=np.int64), np.minimum(values, 1e30).astype(np.float32)

    def _make_layout(self, slots_s: NDArray[np.int64], early_s: NDArray[np.bool_]) -> Layout:
        drawing_s = ~self._greedy[slots_s]
        return Layout(
            n_rows=len(slots_s),
            bias=self._bias_edits(slots_s),
            bans=self._ban_edits(slots_s, early_s),
            penalties=self._penalty_rows(slots_s),
            random=self._random_rows(slots_s, drawing_s),
            all_random=bool(drawing_s.all()),
            logprobs=self._logprob_rows(slots_s),
        )

    def _bias_edits(self, slots_s: NDArray[np.int64]) -> Edits | None:
        found = [(row, bias) for row, slot in enumerate(slots_s) if (bias := self._bias[slot]) is not None]
        if not found:
            return None
        rows = np.concatenate([np.full(len(ids), row, dtype=np.int64) for row, (ids, _) in found])
        ids = np.concatenate([ids for _, (ids, _) in found])
        return self._edits(rows, ids, np.concatenate([values for _, (_, values) in found]))

    def _ban_edits(self, slots_s: NDArray[np.int64], early_s: NDArray[np.bool_]) -> Edits | None:
        rows, ids = [], []
        for row, (slot, early) in enumerate(zip(slots_s, early_s, strict=True)):
            banned = self._bad_ids[slot]
            if early:
                banned = np.union1d(banned, self._stop_ids[slot])
            if len(banned):
                rows.append(np.full(len(banned), row, dtype=np.int64))
                ids.append(banned)
        if not rows:
            return None
        all_ids = np.concatenate(ids)
        return self._edits(np.concatenate(rows), all_ids, np.full(len(all_ids), -np.inf, dtype=np.float32))

    def _edits(self, rows: NDArray[np.int64], ids: NDArray[np.int64], values: NDArray[np.float32]) -> Edits:
        return Edits(self._send(rows), self._send(ids), self._send(values))

    def _penalty_rows(self, slots_s: NDArray[np.int64]) -> PenaltyRows | None:
        rows = np.flatnonzero(self._penalised[slots_s])
        if not len(rows):
            return None
        slots = slots_s[rows]
        values_3p1 = self._send(np.ascontiguousarray(self._penalties[slots].T)[:, :, None])
        history_rows = self._send(self.history.rows(slots.tolist()))
        return PenaltyRows(self._send(rows), self.history, history_rows, values_3p1[0], values_3p1[1], values_3p1[2])

    def _random_rows(self, slots_s: NDArray[np.int64], drawing_s: NDArray[np.bool_]) -> RandomRows | None:
        off = self.vocab_size
        cut_s = (self._top_k[slots_s] < off) | (self._top_p[slots_s] < 1.0)
        plain, cut = np.flatnonzero(drawing_s & ~cut_s), np.flatnonzero(drawing_s & cut_s)
        order = self._random_order = np.concatenate([plain, cut])
        if not len(order):
            return None
        slots_r, slots_t = slots_s[order], slots_s[cut]
        top_k_t, min_p_r = self._top_k[slots_t], self._min_p[slots_r]
        limits = top_k_t[top_k_t < off]
        in_order = len(order) == len(slots_s) and bool((order == np.arange(len(order))).all())
        return RandomRows(
            rows_r=None if in_order else self._send(order),
            n_plain=len(plain),
            temperature_r1=self._send(self._temperature[slots_r][:, None]),
            min_p_r1=self._send(min_p_r[:, None]) if min_p_r.any() else None,
            top_k_t=self._send(top_k_t),
            top_p_t=self._send(self._top_p[slots_t]),
            n_first=first_depth(int(limits.max(initial=0)), off, self.device),
            decided=len(limits) == len(top_k_t),
        )

    def _logprob_rows(self, slots_s: NDArray[np.int64]) -> LogprobRows | None:
        asked = [(row, p) for row, slot in enumerate(slots_s) if (p := self._params[slot]) and p.logprobs is not None]
        if not asked:
            return None
        rows = np.array([row for row, _ in asked], dtype=np.int64)
        scaled = np.array([p.temp_scaled_logprobs for _, p in asked])
        top_p_l = self._top_p[slots_s[rows]]
        cut = np.flatnonzero(np.array([p.top_p_normalized_logprobs for _, p in asked]) & (top_p_l < 1))
        temperature = np.where(scaled, self._temperature[slots_s[rows]], np.float32(1))[:, None]
        return LogprobRows(
            rows=tuple(rows.tolist()),
            rows_l=None if len(rows) == len(slots_s) else self._send(rows),
            groups=self._top_groups([p.logprobs or 0 for _, p in asked]),
            temperature_l1=self._send(temperature) if scaled.any() else None,
            nucleus=NucleusRows(self._send(cut), self._send(top_p_l[cut])) if len(cut) else None,
        )

    def _top_groups(self, asked: Sequence[int]) -> tuple[TopGroup, ...]:
        n_top = np.array([self.vocab_size if n < 0 else min(n, self.vocab_size) for n in asked], dtype=np.int64)
        groups = []
        for n in np.unique(n_top[n_top > 0]):
            members = np.flatnonzero(n_top == n)
            index = None if len(members) == len(n_top) else self._send(members)
            groups.append(TopGroup(int(n), tuple(members.tolist()), index))
        return tuple(groups)

    def _send(self, values: NDArray[np.generic]) -> Tensor:
        return host_to_device(values, self.device)


def _in_vocabulary(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.int64]:
    """The ids that exist, in order."""
    ids = np.asarray(token_ids, dtype=np.int64)
    inside: NDArray[np.int64] = ids[(ids >= 0) & (ids < vocab_size)]
    return inside
