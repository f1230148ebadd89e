"""What requests take from the prefix cache when they start, and add to it as they are computed."""

from __future__ import annotations

from fastdeploy.config.schema import CacheConfig
from fastdeploy.engine.pages import PagePool
from fastdeploy.engine.prefix_cache import PrefixCache
from fastdeploy.engine.request import NEVER, Request


class PrefixReuse:
    """The prefix cache of one scheduler, as its requests see it; with prefix caching off nothing is found or kept."""

    def __init__(self, pool: PagePool, config: CacheConfig) -> None:
        self._cache = PrefixCache(pool, config.page_tokens) if config.prefix_caching else None
        self._page_tokens = config.page_tokens
        self._output_caching = config.output_caching

    def find(self, request: Request) -> list[int]:
        """Pages that hold the longest known beginning of what the request has to compute."""
        # Log-probabilities of the prompt need the logits of all its positions.
        if self._cache is None or request.params.prompt_logprobs is not None:
            return []
        return self._cache.match(request.names, request.n_target)

    def register(self, request: Request) -> None:
        """Offer the pages that have become full, which they have when `n_computed` reaches `register_at`."""
        assert self._cache is not None
        n_cacheable = request.n_computed if self._output_caching else min(request.n_computed, request.n_prompt)
        n_full = n_cacheable // self._page_tokens
        self._cache.register(request.names, request.pages, request.n_registered, n_full)
        request.n_registered = n_full
        self.set_register_at(request)

    def set_register_at(self, request: Request) -> None:
        """Say when the next page of a resident request is worth offering."""
        n_next = (request.n_registered + 1) * self._page_tokens
        wanted = self._cache is not None and (self._output_caching or n_next <= request.n_prompt)
        request.register_at = n_next if wanted else NEVER
