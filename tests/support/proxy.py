"""A proxy in front of a database server that can break connections and refuse new ones."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

Cut = Callable[[bytes], str | None]
"""Decides, for data from the client, where to break the connection: ``"before"`` the server
receives the data, ``"after"`` that, so that the response is lost, or None: not at all.
"""


class Proxy:
    """Forwards bytes between clients and ``address``, each connection with two threads."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self.cut: Cut = lambda data: None
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.is_refusing = False
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def go(self) -> None:
        """Break all connections and refuse new ones."""
        self.is_refusing = True
        self.break_off()

    def break_off(self) -> None:
        """Break all connections."""
        for end in list(self._sockets):
            _break_off(end)

    def come_back(self) -> None:
        """Accept connections again."""
        self.is_refusing = False

    def close(self) -> None:
        """Close all sockets and end all threads."""
        self.go()
        _break_off(self._listener)
        for thread in self._threads:
            thread.join(5)
        for end in self._sockets:
            end.close()
        self._listener.close()

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.add(client)
            if self.is_refusing:
                _break_off(client)
                continue
            try:
                server = socket.create_connection(self._address)
            except OSError:  # the server is being restarted
                _break_off(client)
                continue
            self._sockets.add(server)
            is_answer_lost = threading.Event()
            self._start(self._send, client, server, is_answer_lost)
            self._start(self._answer, client, server, is_answer_lost)

    def _send(
        self, client: socket.socket, server: socket.socket, is_answer_lost: threading.Event
    ) -> None:
        try:
            while data := client.recv(65536):
                how = self.cut(data)
                if how is not None:
                    self.cuts += 1
                if how == "before":
                    break
                if how == "after":
                    is_answer_lost.set()
                server.sendall(data)
        except OSError:
            pass
        _break_off(client)
        _break_off(server)

    def _answer(
        self, client: socket.socket, server: socket.socket, is_answer_lost: threading.Event
    ) -> None:
        try:
            while data := server.recv(65536):
                if is_answer_lost.is_set():
                    break
                client.sendall(data)
        except OSError:
            pass
        _break_off(client)
        _break_off(server)


def _break_off(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
