"""Requests that come with the beginning of their answer: they wait like others until a token is added."""

import pytest

from fastdeploy.admission.accepted import Accepted, Entry
from fastdeploy.errors import RequestTimeout
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.wire.messages import Submit, TokenDelta

TTL_S = 10.0


class Inbox:
    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []

    def put(self, delta: TokenDelta) -> None:
        self.deltas.append(delta)


@pytest.mark.parametrize("known", [[], [7, 8]])
def test_only_a_new_token_ends_the_wait(known: list[int]) -> None:
    placed: list[Entry] = []
    accepted, inbox = Accepted(placed.append, lambda _: None, lambda _: None), Inbox()
    for name in ("served", "late"):
        accepted.add(Submit(name, [1, 2, 3], SamplingParams(), 100.0, output_ids=known), inbox)
        accepted.entries[name].nodes = ("first", "second")
    accepted.deliver(placed[0], TokenDelta("served", [9]))
    assert accepted.on_nodes({"second"}) == [placed[1]]
    accepted.expire(100.0 + TTL_S - 1, TTL_S)
    assert list(accepted.entries) == ["served", "late"]
    accepted.expire(100.0 + TTL_S + 1, TTL_S)
    assert list(accepted.entries) == ["served"]
    assert accepted.entries["served"].output_ids == [*known, 9]
    assert [(one.request_id, one.error_kind) for one in inbox.deltas] == [
        ("served", None),
        ("late", RequestTimeout.__name__),
    ]
