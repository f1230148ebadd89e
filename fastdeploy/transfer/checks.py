"""Whether what was read is what was offered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastdeploy.errors import WrongPages
from fastdeploy.transfer.base import PageSet
from fastdeploy.transfer.layout import SharedHeads


def expected_checks(source: PageSet, n_heads: int, heads: SharedHeads) -> NDArray[np.int64]:
    """Check values int64 [n_layers, n_pages, heads.n_heads] of the heads that are read; the source has `n_heads`."""
    all_lnh = np.frombuffer(source.checks, "<i8").reshape(source.n_layers, len(source.page_ids), n_heads)
    return all_lnh[:, :, heads.first_theirs : heads.first_theirs + heads.n_heads]


def verify(
    found_nh: Tensor, expected_nh: NDArray[np.int64], source: PageSet, layer: int, page_ids: Sequence[int], host: str
) -> None:
    """Compare the check values of pages `page_ids` (of the source) of one layer. Raises WrongPages for the first."""
    found = found_nh.cpu().numpy()
    if np.array_equal(found, expected_nh):
        return
    page, head = (int(index) for index in np.argwhere(found != expected_nh)[0])
    found_value, expected_value = (int(value[page, head]) % 2**64 for value in (found, expected_nh))
    raise WrongPages(
        f"pages of request {source.request_id} read from {host}: layer {layer}, page {page_ids[page]}, head {head}: "
        f"check value {found_value:016x}, offered {expected_value:016x} (generation {source.generation}); the page was "
        f"given to another request, or the transfer is at fault"
    )
