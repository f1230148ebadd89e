"""The owner's side of the TCP transport: sends its pages to who knows its key."""

from __future__ import annotations

import logging
import secrets
import socket
import threading

from fastdeploy.errors import TransferUnavailable
from fastdeploy.transfer.layout import PageLayout
from fastdeploy.transfer.tcp_wire import (
    KEY_BYTES,
    HandshakeError,
    page_views,
    prove_as_server,
    receive_request,
    send_status,
    send_views,
)

log = logging.getLogger("fastdeploy.transfer")

_HANDSHAKE_S = 5.0
_SEND_S = 30.0  # a reader that takes nothing for so long has gone
_MAX_CONNECTIONS = 256


class TcpServer:
    """Listens at `host` and `port` (0: any) and reads `memory`, all pages of this rank; a thread per connection.

    Raises TransferUnavailable when it cannot listen there.
    """

    def __init__(self, memory: memoryview, layout: PageLayout, host: str, port: int) -> None:
        self.key = secrets.token_bytes(KEY_BYTES)
        self._memory = memory
        self._layout = layout
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._closed = False
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._listener = socket.create_server(address[:2], family=family, backlog=64)
        except OSError as error:
            raise TransferUnavailable(f"tcp: cannot listen at {host} port {port} for KV pages: {error}") from error
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="transfer-accept", daemon=True).start()

    def close(self) -> None:
        """Stop listening and end all connections."""
        with self._lock:
            self._closed = True
            open_sockets = [self._listener, *self._connections]
        for open_socket in open_sockets:
            _end(open_socket)

    def _accept(self) -> None:
        while True:
            try:
                connection, (name, *_) = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                raise
            with self._lock:
                accepted = not self._closed and len(self._connections) < _MAX_CONNECTIONS
                if accepted:
                    self._connections.add(connection)
            if accepted:
                serve = threading.Thread(target=self._serve, args=(connection, name), name="transfer-send", daemon=True)
                serve.start()
            else:
                log.warning("tcp: refused a reader from %s: %d are connected", name, _MAX_CONNECTIONS)
                connection.close()

    def _serve(self, connection: socket.socket, name: str) -> None:
        try:
            set_options(connection)
            connection.settimeout(_HANDSHAKE_S)
            prove_as_server(connection, self.key)
            while True:
                connection.settimeout(None)  # readers keep connections; keep-alive notices those that are gone
                request = receive_request(connection)
                connection.settimeout(_SEND_S)
                problem = request.problem(self._layout)
                send_status(connection, problem)
                if problem:
                    continue
                for layer in range(request.first_layer, request.first_layer + request.n_layers):
                    heads = request.first_head, request.n_heads
                    send_views(connection, page_views(self._memory, self._layout, layer, request.page_ids, *heads))
        except (HandshakeError, ValueError) as error:
            log.warning("tcp: closed the connection of %s: %s", name, error)
        except (OSError, EOFError) as error:
            log.debug("tcp: the connection of %s ended: %s", name, error)
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()


def set_options(connection: socket.socket) -> None:
    """No waiting for more to send, and dead peers noticed within half a minute."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _end(open_socket: socket.socket) -> None:
    try:
        open_socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in it
    except OSError as error:
        log.debug("tcp: already ended: %s", error)
    open_socket.close()
