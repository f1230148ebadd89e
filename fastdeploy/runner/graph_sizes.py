"""How many rows captured decode steps have: plain numbers, as engine cores must know them too and import no torch."""

from __future__ import annotations

_STEP = 8
_LARGEST = 512  # a larger step is long enough to be launched kernel by kernel
_FIRST = (1, 8, 64)  # captured before the first request, with the largest


def graph_sizes(max_seqs: int) -> tuple[int, ...]:
    """Rows of the captured steps, ascending: 1, 2, 4, 8, 16, 24, ... up to the first that holds `max_seqs`."""
    wanted = min(max_seqs, _LARGEST)
    sizes = [1, 2, 4, *range(_STEP, wanted + _STEP, _STEP)]
    return tuple(size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < wanted)


def first_sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Those to capture before the first request, descending: any batch then fits a captured size."""
    return tuple(sorted({size for size in sizes if size in _FIRST} | {sizes[-1]}, reverse=True))
