"""Which server has seen which beginning of a prompt: the memory of the policy `cache_aware`.

A prompt is cut into blocks; a block's key is the hash of its text and of the key before it, so that equal keys mean
equal beginnings and a flat table does the work of a tree. Keys are seeded per process (Python's string hash), so nobody
can prepare prompts that collide.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

MAX_NODES = 200_000
MAX_BLOCKS = 4096  # of one prompt; what comes behind them is not looked at


class _Node:
    __slots__ = ("owners", "used_s")

    def __init__(self, used_s: float) -> None:
        self.owners: set[int] = set()
        self.used_s = used_s


class PrefixIndex:
    """Beginnings of prompts by block. Owners are numbers; times are the caller's."""

    def __init__(self, block_chars: int, idle_s: float, max_nodes: int = MAX_NODES) -> None:
        self._block_chars = block_chars
        self._idle_s = idle_s
        self._max_nodes = max_nodes
        self._nodes: OrderedDict[int, _Node] = OrderedDict()  # used last comes last

    def __len__(self) -> int:
        return len(self._nodes)

    def keys(self, text: str) -> list[int]:
        """The key of every whole block of a prompt; none for one that is shorter than a block."""
        size = self._block_chars
        keys, key = [], 0
        for start in range(0, min(len(text) // size, MAX_BLOCKS) * size, size):
            key = hash((key, text[start : start + size]))
            keys.append(key)
        return keys

    def match(self, keys: list[int], owners: set[int]) -> Mapping[int, int]:
        """How many leading blocks each of `owners` has seen; those that have seen none are left out."""
        matched: dict[int, int] = {}
        left = owners
        for depth, key in enumerate(keys):
            node = self._nodes.get(key)
            still = left & node.owners if node is not None else set()
            if depth:
                for owner in left - still:
                    matched[owner] = depth
            left = still
            if not left:
                return matched
        for owner in left:
            matched[owner] = len(keys)
        return matched

    def record(self, keys: list[int], owner: int, now_s: float) -> None:
        """`owner` gets the prompt; old nodes go first when there are too many."""
        nodes = self._nodes
        for key in reversed(keys):  # the first block becomes the newest: a chain is forgotten from its end
            node = nodes.get(key)
            if node is None:
                node = nodes[key] = _Node(now_s)
            else:
                node.used_s = now_s
                nodes.move_to_end(key)
            node.owners.add(owner)
        while len(nodes) > self._max_nodes:
            nodes.popitem(last=False)

    def evict(self, now_s: float) -> int:
        """Forget what was not used for the idle time; returns how many blocks."""
        n = 0
        while self._nodes:
            key, node = next(iter(self._nodes.items()))
            if now_s - node.used_s < self._idle_s:
                break
            del self._nodes[key]
            n += 1
        return n
