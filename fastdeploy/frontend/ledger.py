"""What each data-parallel rank has to do, counted exactly by the one front end that gives it work."""

from __future__ import annotations

from collections.abc import Sequence

from fastdeploy.wire.messages import Submit, TokenDelta


class RankLoad:
    """The requests of one engine core: those that wait for their first token, and those that have one."""

    def __init__(self) -> None:
        self._waiting: dict[str, Submit] = {}
        self._n_tokens: dict[str, int] = {}  # of requests that have a token: prompt and output
        self.n_waiting_tokens = 0  # prompt tokens of those that have none
        self.n_running_tokens = 0

    @property
    def n_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + len(self._n_tokens)

    @property
    def n_tokens(self) -> int:
        """Tokens that take KV pages or are going to."""
        return self.n_waiting_tokens + self.n_running_tokens

    def add(self, submit: Submit) -> None:
        """A request is on its way to the core."""
        self._waiting[submit.request_id] = submit
        self.n_waiting_tokens += len(submit.prompt_ids)

    def take(self, delta: TokenDelta) -> None:
        """The core answered something."""
        request_id = delta.request_id
        n_known = self._n_tokens.get(request_id)
        if n_known is None:
            submit = self._waiting.pop(request_id, None)
            if submit is None:
                return  # forgotten before it answered
            n_known = len(submit.prompt_ids)
            self.n_waiting_tokens -= n_known
            self.n_running_tokens += n_known
        n_new = len(delta.token_ids)
        self._n_tokens[request_id] = n_known + n_new
        self.n_running_tokens += n_new
        if delta.finish_reason is not None:
            self.drop(request_id)

    def drop(self, request_id: str) -> Submit | None:
        """A request ended or is forgotten; returns it when it had no token yet."""
        if (submit := self._waiting.pop(request_id, None)) is not None:
            self.n_waiting_tokens -= len(submit.prompt_ids)
            return submit
        self.n_running_tokens -= self._n_tokens.pop(request_id, 0)
        return None


def least_loaded(loads: Sequence[RankLoad], max_seqs: int, max_batched_tokens: int, n_cache_tokens: int) -> int:
    """Index of the rank that a new request should go to; the first of equals.

    A rank's load is the sum of three shares: of the batch slots (what decode steps cost), of one step's token budget
    that waiting prompts fill (how long a new prompt waits), and of the KV cache.
    """

    def load(i: int) -> float:
        rank = loads[i]
        return (
            rank.n_requests / max_seqs
            + rank.n_waiting_tokens / max_batched_tokens
            + rank.n_tokens / max(n_cache_tokens, 1)
        )

    return min(range(len(loads)), key=load)


def balance_ratio(loads: Sequence[RankLoad]) -> float:
    """Mean over largest number of tokens per rank: 1 is even (or idle), 1/n is all on one of n."""
    n_most = max((load.n_tokens for load in loads), default=0)
    return sum(load.n_tokens for load in loads) / len(loads) / n_most if n_most else 1.0
