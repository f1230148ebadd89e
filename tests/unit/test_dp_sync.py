"""The rules by which the engine cores of a group agree, and what ends a group."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.engine.dp_sync import SILENCE_LIMIT_S, Hub, agree
from fastdeploy.wire.group import Agreed, Alive, Complete, Dismissed, GroupFailed, Join, Leave, Missing, StepOpen, Vote
from fastdeploy.wire.messages import GroupStore, StepAgreement

NAMES = [b"a", b"b", b"c"]


def complete_hub(n: int = 3) -> Hub:
    hub = Hub(n, "same")
    for rank in range(n):
        out = hub.take(NAMES[rank], Join(rank, "same"), 0.0)
    assert out == [(name, Complete()) for name in NAMES[:n]]
    return hub


@given(st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=16))
def test_agreement_holds_for_all_votes(given_votes: list[tuple[int, bool]]) -> None:
    votes = [Vote(7, n_tokens, graph_ok) for n_tokens, graph_ok in given_votes]
    sizes = [1, 8, 64]
    agreed = agree(votes, sizes)
    assert agreed.n_tokens_d == [n for n, _ in given_votes]
    n_most = max(agreed.n_tokens_d)
    assert agreed.n_rows >= n_most
    if agreed.use_graph:
        assert all(ok for _, ok in given_votes) and agreed.n_rows in sizes and n_most > 0
    else:
        assert agreed.n_rows == n_most
        assert n_most == 0 or n_most > 64 or not all(ok for _, ok in given_votes)


def test_without_graphs_rows_are_those_of_the_busiest() -> None:
    assert agree([Vote(0, 3, True), Vote(0, 0, True)]) == StepAgreement([3, 0], 3, False)


def test_who_wants_experts_moved_is_enough() -> None:
    for graph_sizes in ((), (8,)):
        agreed = agree([Vote(0, 3, True), Vote(0, 0, True, rearrange=True)], graph_sizes)
        assert agreed.rearrange and agreed.use_graph == bool(graph_sizes)


def test_prompts_of_a_step_are_as_even_as_they_can_be() -> None:
    votes = [Vote(0, 1472, False, 1470), Vote(0, 383, False, 383), Vote(0, 9, True)]
    assert agree(votes, (), 256).n_tokens_d == [385, 383, 9]
    assert agree(votes, (), 512).n_tokens_d == [514, 383, 9]
    assert agree(votes, (), None).n_tokens_d == [1472, 383, 9]
    alone = [Vote(0, 1472, False, 1470), Vote(0, 9, True)]
    assert agree(alone, (), 256).n_tokens_d == [1472, 9]  # the other waits for it in any case


def test_a_step_goes_its_way() -> None:
    hub = complete_hub()
    assert hub.take(b"b", Vote(0, 5, True), 1.0) == [(b"a", StepOpen(0)), (b"c", StepOpen(0))]
    assert hub.take(b"a", Vote(0, 0, True), 1.0) == []
    agreed = Agreed(0, StepAgreement([0, 5, 2], 5, False))
    assert hub.take(b"c", Vote(0, 2, True), 1.0) == [(name, agreed) for name in NAMES]
    assert hub.take(b"a", Vote(1, 1, True), 1.0) == [(b"b", StepOpen(1)), (b"c", StepOpen(1))]


def test_votes_out_of_turn_end_the_group() -> None:
    for wrong in ([Vote(1, 1, True)], [Vote(0, 1, True), Vote(0, 1, True)]):
        hub = complete_hub()
        for vote in wrong:
            out = hub.take(b"b", vote, 1.0)
        assert [type(event) for _, event in out] == [GroupFailed] * 3 and "rank 1" in (hub.failed or "")


def test_who_is_missing_is_told_until_all_are_there() -> None:
    hub = Hub(3, "same")
    hub.take(b"c", Join(2, "same"), 0.0)
    assert hub.tick(1.0) == [(b"c", Missing([0, 1]))]
    hub.take(b"a", Join(0, "same"), 1.0)
    assert hub.tick(2.0)[0] == (b"c", Missing([1])) or hub.tick(2.0)[0] == (b"a", Missing([1]))
    assert hub.take(b"b", Join(1, "same"), 2.0)[0][1] == Complete()
    assert hub.tick(3.0) == [(name, Alive()) for name in NAMES]


def test_a_core_that_starts_again_before_the_group_is_complete_takes_its_place() -> None:
    hub = Hub(2, "same")
    hub.take(b"a", Join(0, "same"), 0.0)
    hub.take(b"x", Join(1, "same"), 0.0)
    assert hub.missing() == []  # complete
    hub = Hub(2, "same")
    hub.take(b"x", Join(1, "same"), 0.0)
    hub.take(b"b", Join(1, "same"), 1.0)
    assert hub.take(b"a", Join(0, "same"), 1.0) == [(b"a", Complete()), (b"b", Complete())]
    assert hub.take(b"x", GroupStore("127.0.0.1", 1), 1.0) == []


def test_one_that_falls_silent_while_the_group_forms_is_awaited_again() -> None:
    hub = Hub(2, "same")
    hub.take(b"a", Join(0, "same"), 0.0)
    hub.tick(SILENCE_LIMIT_S + 1)
    assert hub.missing() == [0, 1] and hub.failed is None


def test_a_core_that_joins_a_complete_group_shows_that_its_predecessor_is_gone() -> None:
    hub = complete_hub()
    out = hub.take(b"new", Join(1, "same"), 1.0)
    assert [name for name, _ in out] == NAMES  # not the new one: it waits for the next group
    assert all(isinstance(event, GroupFailed) for _, event in out)
    assert hub.take(b"new", Join(1, "same"), 2.0) == []


def test_members_of_a_former_group_are_told_that_it_is_gone() -> None:
    hub = Hub(2, "same")
    for command in (Alive(), Vote(7, 1, True)):
        ((name, event),) = hub.take(b"old", command, 1.0)
        assert name == b"old" and isinstance(event, GroupFailed) and "rank 0" in event.reason
    assert hub.take(b"old", Leave("died"), 1.0) == [] and hub.failed is None


def test_another_command_is_refused_and_the_group_goes_on() -> None:
    hub = complete_hub(2)
    ((name, event),) = hub.take(b"odd", Join(1, "other"), 1.0)
    assert name == b"odd" and isinstance(event, GroupFailed) and "rank 1" in event.reason
    assert hub.failed is None


def test_silence_and_failure_end_the_group_with_a_name() -> None:
    hub = complete_hub()
    hub.take(b"a", Alive(), SILENCE_LIMIT_S)
    hub.take(b"c", Alive(), SILENCE_LIMIT_S)
    out = hub.tick(SILENCE_LIMIT_S + 0.5)
    assert len(out) == 3 and "rank 1 has been silent" in (hub.failed or "")
    hub = complete_hub()
    hub.take(b"c", Leave("rank 2 was killed"), 1.0)
    assert hub.failed == "data-parallel rank 2: rank 2 was killed"
    assert hub.take(b"a", Vote(0, 1, True), 1.0) == [] and hub.tick(99.0) == []
    hub = complete_hub()
    assert hub.end("first") == [(name, GroupFailed("first")) for name in NAMES]
    assert hub.end("second") == [] and hub.failed == "first"


def test_the_store_reaches_all_whenever_it_is_opened() -> None:
    hub = Hub(2, "same")
    store = GroupStore("127.0.0.1", 4711)
    hub.take(b"a", Join(0, "same"), 0.0)
    assert hub.take(b"a", store, 0.0) == []
    assert hub.take(b"b", Join(1, "same"), 0.0)[2:] == [(b"a", store), (b"b", store)]
    hub = complete_hub(2)
    assert hub.take(b"a", store, 0.0) == [(b"a", store), (b"b", store)]


def test_all_go_when_all_want_to() -> None:
    hub = complete_hub(2)
    assert hub.take(b"a", Leave(), 1.0) == []
    assert hub.take(b"b", Vote(0, 4, False), 1.0) == [(b"a", StepOpen(0))]  # it still serves the other
    assert len(hub.take(b"a", Vote(0, 0, False), 1.0)) == 2
    assert hub.take(b"b", Leave(), 1.0) == [(b"a", Dismissed()), (b"b", Dismissed())]
