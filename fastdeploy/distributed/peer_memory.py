"""Memory of each GPU of one host that all ranks of a group read and write directly, over NVLink or PCIe.

It comes from torch's symmetric memory. Multicast is not used, and switched off where torch would set it up.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

import torch
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from fastdeploy.distributed.groups import Group
from fastdeploy.errors import EngineStartError

_NAME = "name"  # key in the store: what torch calls this memory


def peers_reachable(n_ranks: int) -> bool:
    """Whether each of this host's first `n_ranks` GPUs can access the memory of all others; equal on all ranks."""
    if torch.cuda.device_count() < n_ranks:
        return False
    pairs = ((i, j) for i in range(n_ranks) for j in range(n_ranks) if i != j)
    return all(torch.cuda.can_device_access_peer(i, j) for i, j in pairs)


class PeerMemory:
    """`n_bytes` on every rank of the group, zero at first.

    `mine` is this rank's part, uint8 [n_bytes]; `address_g` int64 [group size], on the device, is where this process
    sees the part of each rank.
    """

    def __init__(self, group: Group, purpose: str, n_bytes: int) -> None:
        """A collective with the same arguments everywhere. Raises EngineStartError when they cannot share memory."""
        assert group.store is not None, "a rank by itself shares nothing"
        from torch._C._distributed_c10d import ProcessGroup, _register_process_group, _SymmetricMemory

        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        where, store = group.where, PrefixStore(f"peer_memory/{purpose}", group.store)
        device = torch.device("cuda", torch.cuda.current_device())
        symmetric: Any = _SymmetricMemory
        register: Any = _register_process_group
        try:
            if where.group_rank == 0:
                store.set(_NAME, f"fastdeploy-{purpose}-{secrets.token_hex(8)}")
            name = store.get(_NAME).decode()
            # Torch finds the store at which the ranks meet by the name of a group, which needs no connections.
            self._named = ProcessGroup(store, where.group_rank, where.group_size)  # the name alone keeps nothing
            register(name, self._named)
            self.mine = symmetric.empty_strided_p2p((n_bytes,), (1,), torch.uint8, device, name).zero_()
            torch.cuda.synchronize(device)  # before a peer can write here
            # Kept: with it goes the mapping.
            self._mapping = symmetric.rendezvous(self.mine, name)
        except RuntimeError as exc:
            raise EngineStartError(
                f"{group.name}: cannot share {n_bytes:,} bytes of GPU memory with the other ranks of its host: {exc}; "
                f"FD_ALL_TO_ALL=nccl does without"
            ) from exc
        self.address_g = torch.tensor(self._mapping.buffer_ptrs, dtype=torch.int64, device=device)
