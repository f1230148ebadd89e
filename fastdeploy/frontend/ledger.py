"""What each data-parallel rank has to do, counted exactly by the one front end that gives it work."""

from __future__ import annotations

from collections.abc import Sequence

from fastdeploy.wire.messages import Submit, TokenDelta

_LONG_OUTPUT = 512  # tokens; a larger max_tokens is a limit rather than a forecast


class RankLoad:
    """The requests of one engine core: those that wait for their first token, and those that have one."""

    def __init__(self) -> None:
        self._waiting: dict[str, Submit] = {}
        self._n_tokens: dict[str, int] = {}  # of requests that have a token: prompt and output
        self._n_left: dict[str, int] = {}  # of all requests: output tokens that are expected
        self.n_waiting_tokens = 0  # prompt tokens of those that have none
        self.n_running_tokens = 0
        self.n_output_tokens_left = 0
        self.n_prompt_tokens = 0  # of all that have not ended
        self._n_prompt: dict[str, int] = {}

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
        n_left = expected_output(submit)
        self._n_left[submit.request_id] = n_left
        self.n_output_tokens_left += n_left
        self._n_prompt[submit.request_id] = len(submit.prompt_ids)
        self.n_prompt_tokens += len(submit.prompt_ids)

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
        n_expected = min(n_new, self._n_left[request_id])
        self._n_left[request_id] -= n_expected
        self.n_output_tokens_left -= n_expected
        if delta.finish_reason is not None:
            self.drop(request_id)

    def drop(self, request_id: str) -> Submit | None:
        """A request ended or is forgotten; returns it when it had no token yet."""
        self.n_output_tokens_left -= self._n_left.pop(request_id, 0)
        self.n_prompt_tokens -= self._n_prompt.pop(request_id, 0)
        if (submit := self._waiting.pop(request_id, None)) is not None:
            self.n_waiting_tokens -= len(submit.prompt_ids)
            return submit
        self.n_running_tokens -= self._n_tokens.pop(request_id, 0)
        return None


def expected_output(submit: Submit) -> int:
    """Tokens that a request is expected to get, as far as its limit tells."""
    max_tokens, n_known = submit.params.max_tokens, len(submit.output_ids)
    return _LONG_OUTPUT if max_tokens is None else max(min(max_tokens - n_known, _LONG_OUTPUT), 0)


def least_loaded(
    loads: Sequence[RankLoad], request: Submit, max_seqs: int, max_batched_tokens: int, n_cache_tokens: int
) -> int:
    """Index of the rank that `request` should go to; the first of equals.

    A rank has four kinds of load: requests (slots of the batch), prompt tokens that wait, output tokens to come (both
    against the token budget of a step) and tokens in the KV cache. Ranks that share experts wait in every step for the
    one with the most to do, and at any time they have mostly one kind to do, so each kind has to be even by itself.
    A request goes where it adds least to the sum of the squares of all loads: where the product of its own loads with
    those that are there is smallest. So a rank with long prompts gets a short one, or one with a long answer.
    """
    n_prompt, n_output, cache = len(request.prompt_ids), expected_output(request), max(n_cache_tokens, 1)
    per_request = 1 / max_seqs**2
    per_prompt_token = n_prompt / max_batched_tokens**2
    per_output_token = n_output / max_batched_tokens**2
    per_cached_token = (n_prompt + n_output) / cache**2

    def growth(i: int) -> float:
        rank = loads[i]
        return (
            rank.n_requests * per_request
            + rank.n_waiting_tokens * per_prompt_token
            + rank.n_output_tokens_left * per_output_token
            + rank.n_tokens * per_cached_token
        )

    return min(range(len(loads)), key=growth)


def balance_ratio(loads: Sequence[RankLoad]) -> float:
    """Mean over largest number of tokens per rank: 1 is even (or idle), 1/n is all on one of n."""
    n_most = max((load.n_tokens for load in loads), default=0)
    return sum(load.n_tokens for load in loads) / len(loads) / n_most if n_most else 1.0
