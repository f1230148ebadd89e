"""Every struct that crosses a process boundary, grouped by the boundary.

Encoded as msgpack arrays: decoding is checking. A front end talks to an engine core, an engine core to its ranks.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from fastdeploy.config.schema import EngineConfig
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.transfer.base import Endpoint, PageSet
from fastdeploy.wire.experts import ExpertReport

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]


class Message(msgspec.Struct, tag=True, frozen=True, array_like=True, gc=False):
    """Base of all messages that a union of types tells apart."""


# ---- front end -> engine core ------------------------------------------------------------------------------------


class Pairing(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request is computed by two servers, of which this is the one of that role; the prefill one listens there."""

    role: Literal["prefill", "decode"]
    host: str
    port: int


class Submit(Message, frozen=True):
    """One request with one answer (n > 1 is n of these)."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams  # resolved: no unset numbers
    arrival_s: float  # unix time
    pairing: Pairing | None = None  # None: all of it is computed here
    output_ids: list[int] = []  # generated elsewhere before: the answer goes on behind them, as after a preemption
    data_rank: int | None = None  # the only rank that may run it; None leaves the choice to the front end


class Abort(Message, frozen=True):
    """Forget these requests; each still alive answers with finish reason "abort"."""

    request_ids: list[str]


class Withdraw(Message, frozen=True):
    """Give back up to `n_requests` of this front end's requests that never ran, those that came last first."""

    n_requests: int


class Siblings(Message, frozen=True):
    """Control ports of all engine cores of this server; see wire/control.py."""

    ports: list[int]


class Rearrange(Message, frozen=True):
    """Put experts where they should lie, whether or not there is something to compute."""


class Hello(Message, frozen=True):
    """A front end introduces itself and wants Ready and Status."""


class Shutdown(Message, frozen=True):
    """Stop; with expert parallelism as soon as no other rank of the group needs this one."""


Command: TypeAlias = Submit | Abort | Withdraw | Siblings | Rearrange | Hello | Shutdown


# ---- engine core -> front end ------------------------------------------------------------------------------------


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities at one position: the token taken (or given) there, its rank (1 = most likely), the top ones."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class RequestTimes(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Unix seconds at which a request passed each stage; 0.0 = not yet."""

    received_s: float
    first_scheduled_s: float
    first_token_s: float
    last_token_s: float


class TokenDelta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one step added to one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop token that ended it, if one did; it is the last of token_ids
    n_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None  # one per token of token_ids
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first token; None at position 0
    error: str | None = None  # with finish reason "error"
    times: RequestTimes | None = None  # with the first token and with the finish
    error_kind: str | None = None  # class in `fastdeploy.errors`, where the request was refused or given up


class StepOutput(Message, frozen=True):
    """All that one step produced for one front end."""

    deltas: list[TokenDelta]


class Withdrawn(Message, frozen=True):
    """These requests have left this core without a token."""

    request_ids: list[str]


class LoadProgress(Message, frozen=True):
    """Start-up progress; `total` 0 means unknown."""

    stage: str
    done: int
    total: int
    unit: str


class Starting(Message, frozen=True):
    """Heartbeat of an engine core whose ranks are not ready yet."""


class Ready(Message, frozen=True):
    """The engine takes requests. `stages_s` names each start-up stage and its seconds."""

    n_pages: int
    kv_bytes: int
    weight_bytes: int
    stages_s: dict[str, float]
    control_ports: list[int] = []  # where prefill and decode cores talk; one per core, none in a mixed server


class PairingStatus(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one engine core did with requests that are computed by two servers."""

    n_awaiting: int = 0  # requests with slot and pages here whose prompt is computed elsewhere
    n_lent_pages: int = 0  # pages of ended requests that a decode server may still read
    n_pulled_total: int = 0  # requests that started to decode with pages from elsewhere
    n_pulled_pages_total: int = 0
    n_pulled_bytes_total: int = 0
    wait_ms_total: int = 0  # from reserved pages to pages filled, of all `n_pulled_total`
    n_send_failed_total: int = 0  # prompts computed for a decode server that did not take the pages
    n_fallbacks_of_reason: dict[str, int] = {}  # prompts computed here after all


class Status(Message, frozen=True):
    """State of one engine core, sent about once a second, and sooner when it turns busy or idle."""

    n_running: int
    n_waiting: int
    n_preempted_total: int
    n_pages_free: int  # never used or given back, without cached content
    n_pages_cached: int  # reusable prefix pages that nobody holds
    n_pages_total: int
    n_prompt_tokens_total: int
    n_cached_tokens_total: int
    n_generated_tokens_total: int
    n_steps_total: int
    n_running_tokens: int  # known tokens of running requests
    n_waiting_tokens: int
    stalled_s: float  # seconds since the ranks last made progress while having work; 0 when idle
    n_rows_of_expert: dict[int, int] = {}  # rows, of any rank, that the experts here computed; empty: not counted
    pairing: PairingStatus = PairingStatus()
    experts: ExpertReport | None = None  # with --enable-eplb, once a step was computed


class EngineFailed(Message, frozen=True):
    """The engine core cannot go on; `kind` names the class in `fastdeploy.errors`."""

    kind: str
    message: str


Event: TypeAlias = StepOutput | Withdrawn | LoadProgress | Starting | Ready | Status | EngineFailed


class StepAgreement(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What all ranks of an expert-parallel group know of a step before they enter its collectives; equal on each.

    `n_tokens_d[i]`: tokens that data-parallel rank i computes, at most what it voted for, 0 for one without work. With
    `use_graph` each lays out `n_rows` rows, of which its own tokens are the first; without, `n_rows` is the largest of
    `n_tokens_d`. With `rearrange` they first put experts where they should lie.
    """

    n_tokens_d: list[int]
    n_rows: int
    use_graph: bool
    rearrange: bool = False


class GroupStore(Message, frozen=True):
    """Rank 0 of a process group of several ranks opened the store at which the others join; sent as soon as it can."""

    host: str
    port: int


# ---- engine core -> ranks ----------------------------------------------------------------------------------------


class SlotStart(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request takes a batch slot: all its known tokens, and where their keys and values lie."""

    slot: int
    token_ids: list[int]  # prompt, and output so far after a preemption
    n_prompt_tokens: int
    n_computed: int  # tokens whose keys and values are in `page_ids` already
    page_ids: list[int]
    params: SamplingParams


class PageOrder(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """With this step these pages of a request are complete, from the `first_page`-th of its prompt on: offer them."""

    request_id: str
    generation: int
    first_page: int
    page_ids: list[int]


class StepPlan(Message, frozen=True):
    """One step of the ranks. The arrays `slots`, `n_tokens`, `samples` and `new_pages` run in parallel.

    A grant of slot s computes the next `n_tokens` tokens after those computed before; where `samples` holds, its last
    position's logits are sampled and the token found becomes the slot's next token, on the rank, without a round trip.
    """

    step: int
    starts: list[SlotStart]
    slots: list[int]
    n_tokens: list[int]
    samples: list[bool]
    new_pages: list[list[int]]
    agreement: StepAgreement | None = None  # with expert parallelism; the arrays may be empty then
    orders: list[PageOrder] = []  # of a prefill server


class PullPages(Message, frozen=True):
    """Read pages of another server's rank into `page_ids`, within `patience_s`; `PullEnded` is the answer."""

    pull_id: int
    peer: Endpoint
    source: PageSet
    page_ids: list[int]
    patience_s: float


class CancelPull(Message, frozen=True):
    """Give a pull up; `PullEnded` follows unless it was sent already."""

    pull_id: int


class ForgetPulls(Message, frozen=True):
    """The request is over: what was read for it need not be remembered."""

    request_id: str


class JoinGroup(Message, frozen=True):
    """Where the ranks of the process group meet: the TCP store of its rank 0."""

    host: str
    port: int


class Stop(Message, frozen=True):
    """The rank ends."""


TransferCommand: TypeAlias = PullPages | CancelPull | ForgetPulls
RankCommand: TypeAlias = StepPlan | PullPages | CancelPull | ForgetPulls | JoinGroup | Stop


# ---- ranks -> engine core ----------------------------------------------------------------------------------------


class StepResult(Message, frozen=True):
    """What a step sampled: one entry per grant of the plan, -1 where nothing was sampled."""

    step: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None  # per grant, when any request of the step asked
    prompt_logprobs: dict[int, list[TokenLogprobs | None]] | None  # grant index -> its prompt positions of this chunk


class PagesComputed(Message, frozen=True):
    """Pages that were ordered are complete in some layers; the first is page `first_page` of the prompt."""

    first_page: int
    pages: PageSet


class PullEnded(Message, frozen=True):
    """Nothing writes into the pages of this pull any more. Without `error` they are filled and verified."""

    pull_id: int
    n_bytes: int
    error: str | None = None


class RankReady(Message, frozen=True):
    """The rank has its weights and its pages; `endpoint` says how they are read, if they may be."""

    n_pages: int
    kv_bytes: int
    weight_bytes: int
    stages_s: dict[str, float]
    endpoint: Endpoint | None = None


class RankAlive(Message, frozen=True):
    """Heartbeat: `n_layers_done` counts decoder layers since start; it stands still when the rank is stuck."""

    n_layers_done: int
    n_rows_of_expert: dict[int, int] = {}  # of the experts here, over all layers; empty: not counted, or as before
    experts: ExpertReport | None = None  # with --enable-eplb; None: as before


class RankFailed(Message, frozen=True):
    """The rank cannot go on; `kind` names the class in `fastdeploy.errors`."""

    kind: str
    message: str


TransferEvent: TypeAlias = PagesComputed | PullEnded
RankEvent: TypeAlias = (
    StepResult | PagesComputed | PullEnded | RankReady | RankAlive | RankFailed | LoadProgress | GroupStore
)


# ---- parent -> child, once, at its start -------------------------------------------------------------------------


class GroupAddress(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where the engine cores of an expert-parallel group meet. That of data-parallel rank 0 serves the endpoint."""

    endpoint: str
    public_key: bytes  # CURVE: who knows it may join
    secret_key: bytes
    patience_s: float  # how long to wait for the others


class CoreBoot(Message, frozen=True):
    """What an engine core is started with."""

    config: EngineConfig
    group: GroupAddress | None  # None: it computes on its own
    endpoint: str  # where it listens for front ends
    secret_key: bytes  # CURVE secret of the endpoint: who knows its public half may connect
    public_key: bytes


class RankBoot(Message, frozen=True):
    """What a rank is started with."""

    config: EngineConfig
    number: int  # among all ranks, counted from 0
    connection_fd: int
