"""A client and a server of HTTP/1.1 that cost little, for loads that shall cost less than the proxy between them.

Plain sockets and epoll, one process each, constant bytes. They read no more of HTTP than where a message ends, so they
speak to programs that are known to answer well, and check whole answers.
"""

from __future__ import annotations

import json
import re
import select
import socket
import time

N_EVENTS = 64
PATH = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "word " * 40}], "max_tokens": 64}).encode()
STREAM_BODY = BODY[:-1] + b', "stream": true}'
ANSWER = json.dumps({"id": "x", "choices": [{"index": 0, "message": {"content": "y" * 200}}]}).encode()
EVENT = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"word"},"finish_reason":null}]}\n\n'
SILENCE_S = 10.0  # after which a load is given up

_JSON_REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(ANSWER),
    ANSWER,
)
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
_LAST_CHUNK = b"0\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_IS_STREAM = re.compile(rb'"stream": ?true')  # by what it says: routers write the JSON anew


def serve(listener: socket.socket) -> None:
    """Answers until the process ends: `N_EVENTS` events to who asks for a stream, else `ANSWER`, health checks too.

    Events are written one at a time, those of all streams in turn.
    """
    listener.setblocking(False)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    peers: dict[int, socket.socket] = {}
    begun: dict[int, bytes] = {}  # requests that are not whole
    streams: dict[int, int] = {}  # events sent
    while True:
        for fd, _ in poll.poll(0 if streams else -1):
            if fd == listener.fileno():
                peer, _ = listener.accept()
                peer.setblocking(False)
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                peers[peer.fileno()] = peer
                poll.register(peer, select.EPOLLIN)
                continue
            data = _received(peers[fd])
            if not data or data.startswith(b"PRI "):  # a router that tries HTTP/2 first
                poll.unregister(fd)
                peers.pop(fd).close()
                streams.pop(fd, None)
                begun.pop(fd, None)
                continue
            data = begun.pop(fd, b"") + data
            if not _is_whole(data):
                begun[fd] = data
            elif _IS_STREAM.search(data):
                peers[fd].send(_STREAM_HEAD)
                streams[fd] = 0
            else:
                peers[fd].send(_JSON_REPLY)
        for fd, n_sent in list(streams.items()):
            if n_sent == N_EVENTS:
                del streams[fd]
            else:
                streams[fd] = n_sent + 1
            try:
                peers[fd].send(_LAST_CHUNK if n_sent == N_EVENTS else _CHUNK)
            except ConnectionError:
                streams.pop(fd, None)  # it will be read as closed


def _received(peer: socket.socket) -> bytes:
    try:
        return peer.recv(65536)
    except ConnectionError:
        return b""


def _is_whole(request: bytes) -> bool:
    end = request.find(b"\r\n\r\n")
    if end < 0:
        return False
    found = _LENGTH.search(request, 0, end)
    if found is not None:
        return len(request) >= end + 4 + int(found[1])
    return b"chunked" not in request[:end] or request.endswith(_LAST_CHUNK)


def load(port: int, body: bytes, concurrency: int, seconds: float) -> list[tuple[float, float]]:
    """Latencies of requests sent one after the other on each of the connections: to the end, to the first bytes; in
    seconds. Raises RuntimeError for an answer that is not the server's."""
    request = b"POST %b HTTP/1.1\r\nhost: 127.0.0.1:%d\r\naccept: */*\r\ncontent-type: application/json\r\n" % (
        PATH.encode(),
        port,
    )
    request += b"content-length: %d\r\n\r\n%b" % (len(body), body)
    is_whole = _is_stream if body is STREAM_BODY else _is_answer
    peers = [socket.create_connection(("127.0.0.1", port)) for _ in range(concurrency)]
    poll, by_fd, got = select.epoll(), {}, {peer.fileno(): b"" for peer in peers}
    began, firsts = dict.fromkeys(got, 0.0), dict.fromkeys(got, 0.0)
    latencies: list[tuple[float, float]] = []
    clock = time.perf_counter
    end_s = clock() + seconds
    try:
        for peer in peers:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            by_fd[peer.fileno()] = peer
            poll.register(peer, select.EPOLLIN)
            began[peer.fileno()] = clock()
            peer.send(request)
        while got:
            ready = poll.poll(SILENCE_S)
            if not ready:
                raise RuntimeError(f"port {port}: nothing came for {SILENCE_S:g} s")
            for fd, _ in ready:
                data = by_fd[fd].recv(65536)
                now_s = clock()
                if not got[fd]:
                    firsts[fd] = now_s
                if not data:
                    raise RuntimeError(f"port {port}: the connection was closed: {got[fd][:300]!r}")
                data = got[fd] + data if got[fd] else data
                if not is_whole(data):
                    got[fd] = data
                    continue
                latencies.append((now_s - began[fd], firsts[fd] - began[fd]))
                if now_s >= end_s:
                    del got[fd]
                    continue
                got[fd] = b""
                began[fd] = now_s
                by_fd[fd].send(request)
    finally:
        poll.close()
        for peer in peers:
            peer.close()
    return latencies


def _is_answer(data: bytes) -> bool:
    """Whether a whole JSON answer is there. Raises RuntimeError when it is another one."""
    _check_status(data)
    return data.endswith(ANSWER) or (data.endswith(_LAST_CHUNK) and ANSWER in data)


def _is_stream(data: bytes) -> bool:
    """Whether a whole stream is there. Raises RuntimeError when events are missing."""
    _check_status(data)
    if not data.endswith(_LAST_CHUNK):
        return False
    if data.count(b"data:") != N_EVENTS:
        raise RuntimeError(f"{data.count(b'data:')} of {N_EVENTS} events: {data[:300]!r}")
    return True


def _check_status(data: bytes) -> None:
    if not data.startswith(b"HTTP/1.1 200"[: len(data)]):
        raise RuntimeError(f"not the server's answer: {data[:300]!r}")
