"""Which rank is where, and holds what: pure arithmetic over numbers that every rank knows.

Ranks are numbered over all machines, those of a replica side by side: number = data rank * tensor + tensor rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from fastdeploy.config.schema import ModelShape, MoEShape, ParallelConfig
from fastdeploy.wire.messages import StepAgreement


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where one rank stands. The default is a rank without others.

    The ranks of a process group are all of them with `expert`, those of one replica without; `group_rank` counts them.
    """

    n_tensor: int = 1
    tensor_rank: int = 0
    n_data: int = 1
    data_rank: int = 0
    expert: bool = False

    @property
    def number(self) -> int:
        """Among all ranks of all machines."""
        return self.data_rank * self.n_tensor + self.tensor_rank

    @property
    def group_size(self) -> int:
        """Ranks of the process group; 1 is no group at all."""
        return self.n_tensor * (self.n_data if self.expert else 1)

    @property
    def group_rank(self) -> int:
        """This rank's number in its process group."""
        return self.number if self.expert else self.tensor_rank

    @property
    def spreads_experts(self) -> bool:
        """Whether this rank holds whole experts of which other ranks hold the rest."""
        return self.expert and self.group_size > 1


def position(parallel: ParallelConfig, number: int) -> Position:
    """Where rank `number` stands."""
    data_rank, tensor_rank = divmod(number, parallel.tensor)
    return Position(
        n_tensor=parallel.tensor,
        tensor_rank=tensor_rank,
        n_data=parallel.data,
        data_rank=data_rank,
        expert=parallel.expert,
    )


def numbers_of_group(parallel: ParallelConfig, number: int) -> range:
    """The ranks that form one process group with rank `number`, by their numbers over all machines."""
    if parallel.expert:
        return range(parallel.n_ranks)
    first = number - number % parallel.tensor
    return range(first, first + parallel.tensor)


def numbers_with_equal_weights(parallel: ParallelConfig, number: int) -> range:
    """The ranks of one group and machine that hold the same weights as rank `number`, but for their experts."""
    if not parallel.expert:
        return range(number, number + 1)
    n_here = ranks_per_host(parallel)
    begin = number // n_here * n_here
    return range(begin + number % parallel.tensor, begin + n_here, parallel.tensor)


def ranks_per_host(parallel: ParallelConfig) -> int:
    """Ranks, and so devices, of each machine."""
    return parallel.n_ranks // len(parallel.hosts)


def local_device(parallel: ParallelConfig, number: int) -> int:
    """The index on its machine of the device of rank `number`."""
    return number % ranks_per_host(parallel)


def host_of(parallel: ParallelConfig, number: int) -> str:
    """The address of the machine of rank `number`."""
    return parallel.hosts[number // ranks_per_host(parallel)]


def is_one_host(parallel: ParallelConfig) -> bool:
    """Whether every process group stays on one machine."""
    return len(parallel.hosts) == 1 or not parallel.expert


def run_of(n_total: int, n_parts: int, part: int) -> tuple[int, int]:
    """(first, length) of a part when `n_total` things are cut into runs whose lengths differ by at most one.

    The longer runs come first.
    """
    length, n_longer = divmod(n_total, n_parts)
    return part * length + min(part, n_longer), length + (part < n_longer)


def local_experts(moe: MoEShape, where: Position) -> tuple[int, int]:
    """(first, number) of the experts that a rank holds: all of them unless they are spread."""
    if not where.spreads_experts:
        return 0, moe.n_experts
    return run_of(moe.n_experts, where.group_size, where.group_rank)


def local_kv_heads(n_kv_heads: int, where: Position) -> tuple[int, int]:
    """(first, number) of a rank's key heads; more tensor ranks than key heads hold copies."""
    n_local = max(1, n_kv_heads // where.n_tensor)
    return where.tensor_rank * n_kv_heads // where.n_tensor, n_local


def rows_to_dispatch(agreement: StepAgreement, n_tensor: int) -> tuple[int, ...]:
    """Rows that each rank of an expert-parallel group sends into a sparse layer, in the order of the ranks.

    The tensor ranks of a replica hold the same rows; each sends a run of them. In a graph every replica has `n_rows`.
    """
    n_rows_d = [agreement.n_rows] * len(agreement.n_tokens_d) if agreement.use_graph else agreement.n_tokens_d
    if n_tensor == 1:
        return tuple(n_rows_d)
    return tuple(run_of(n_rows, n_tensor, part)[1] for n_rows in n_rows_d for part in range(n_tensor))


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a step's rows, exchanged at once: of rank g the `n_rows_g[g]` rows from `first_g[g]` on."""

    first_g: tuple[int, ...]
    n_rows_g: tuple[int, ...]


def cut_into_pieces(n_rows_g: tuple[int, ...], max_rows: int | None) -> list[Piece]:
    """All rows of all ranks in the order of the ranks, cut wherever `max_rows` are reached; none for no rows."""
    n_rows = sum(n_rows_g)
    if n_rows == 0:
        return []
    if max_rows is None or n_rows <= max_rows:
        return [Piece((0,) * len(n_rows_g), n_rows_g)]
    begin_g = list(accumulate(n_rows_g, initial=0))[:-1]
    pieces = []
    for start in range(0, n_rows, max_rows):
        first_g = tuple(min(max(start - b, 0), n) for b, n in zip(begin_g, n_rows_g, strict=True))
        stop_g = (min(max(start + max_rows - b, 0), n) for b, n in zip(begin_g, n_rows_g, strict=True))
        pieces.append(Piece(first_g, tuple(stop - first for stop, first in zip(stop_g, first_g, strict=True))))
    return pieces


def contradictions(parallel: ParallelConfig, shape: ModelShape) -> list[str]:
    """Everything about these group sizes that cannot work with this model, one line each; empty when all is well."""
    n_tensor, n_data, n_hosts = parallel.tensor, parallel.data, len(parallel.hosts)
    if n_tensor < 1 or n_data < 1 or n_hosts < 1:
        checks = [
            (n_tensor < 1, f"--tensor-parallel-size {n_tensor}: must be at least 1"),
            (n_data < 1, f"--data-parallel-size {n_data}: must be at least 1"),
            (n_hosts < 1, "--ips: names no machine; give one address for each, or leave it out for one machine"),
        ]
        return [line for wrong, line in checks if wrong]
    return [*_wrong_ranks(parallel), *_wrong_shards(n_tensor, parallel.expert, shape), *_wrong_experts(parallel, shape)]


def _wrong_ranks(parallel: ParallelConfig) -> list[str]:
    n_data, hosts = parallel.data, parallel.hosts
    lines = []
    if n_data % len(hosts):
        lines.append(
            f"--data-parallel-size {n_data}: --ips names {len(hosts)} machines, which need equal shares of the "
            f"replicas; use a multiple of {len(hosts)}"
        )
    doubled = sorted({host for host in hosts if hosts.count(host) > 1})
    if doubled:
        lines.append(f"--ips {','.join(hosts)}: {', '.join(doubled)} is named twice; name each machine once")
    if not 0 <= parallel.data_rank < n_data:
        lines.append(
            f"--local-data-parallel-id {parallel.data_rank}: must be in 0..{n_data - 1}, below "
            f"--data-parallel-size {n_data}"
        )
    return lines


def _wrong_shards(n_tensor: int, expert: bool, shape: ModelShape) -> list[str]:
    wrong = _not_shareable(n_tensor, expert, shape)
    if not wrong:
        return []
    possible = [n for n in range(1, shape.n_heads + 1) if not _not_shareable(n, expert, shape)]
    advice = f"this model can be split over {', '.join(map(str, possible))}"
    return [f"--tensor-parallel-size {n_tensor}: must divide the {line}; {advice}" for line in wrong]


def _not_shareable(n_tensor: int, expert: bool, shape: ModelShape) -> list[str]:
    """What `n_tensor` ranks cannot share equally."""
    moe = shape.moe
    sizes = {"attention heads": shape.n_heads}
    if moe is None or len(moe.layers) < shape.n_layers:
        sizes["width of the feed-forward network"] = shape.ffn_width
    if moe is not None:
        sizes["width of the shared expert"] = moe.shared_width
        if not expert:
            sizes["width of an expert (--enable-expert-parallel keeps experts whole)"] = moe.expert_width
    lines = [f"{what}, {n}" for what, n in sizes.items() if n % n_tensor]
    if shape.n_kv_heads % n_tensor and n_tensor % shape.n_kv_heads:
        lines.append(f"key heads, {shape.n_kv_heads}, or be a multiple of them")
    if shape.vocab_size < n_tensor:
        lines.append(f"vocabulary, {shape.vocab_size}")
    return lines


def _wrong_experts(parallel: ParallelConfig, shape: ModelShape) -> list[str]:
    if not parallel.expert:
        return []
    if shape.moe is None:
        return [
            f"--enable-expert-parallel: {shape.architecture} has no experts to spread; leave it out "
            f"(--data-parallel-size {parallel.data} needs no expert parallelism)"
        ]
    n_experts, n_ranks = shape.moe.n_experts, parallel.n_ranks
    if n_experts < n_ranks:
        return [
            f"--enable-expert-parallel: the model has {n_experts} experts for {n_ranks} ranks "
            f"(--tensor-parallel-size {parallel.tensor} x --data-parallel-size {parallel.data}); use at most "
            f"{n_experts} ranks"
        ]
    return []
