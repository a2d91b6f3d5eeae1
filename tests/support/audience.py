"""Many stream clients on one thread. Each reads, and reconnects until it has seen the end of enough
tasks.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

from tests.support.event_streams import END, Parser

PATIENCE = 120.0


@dataclass
class Spectator:
    """One client.

    :param path: of its stream.
    :param ends: how many ended tasks it waits for.
    """

    path: str
    ends: int
    seen: set[str] = field(default_factory=set)
    connections: int = 0
    has_begun: bool = False


class Audience:
    """Clients that read streams. The context ends when all have seen the expected ends."""

    def __init__(self, port: int, spectators: list[Spectator]) -> None:
        self.spectators = spectators
        self._port = port
        self._over: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Audience:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._over.result()

    def begin(self) -> None:
        """Connect all clients."""
        self._thread.start()

    @property
    def begun(self) -> int:
        """How many clients have received data."""
        return sum(each.has_begun for each in self.spectators)

    def _run(self) -> None:
        try:
            asyncio.run(self._follow_all())
        except BaseException as error:
            self._over.set_exception(error)
        else:
            self._over.set_result(None)

    async def _follow_all(self) -> None:
        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
            for each in self.spectators:
                group.create_task(self._follow(each))
                await asyncio.sleep(0.002)  # the backlog of a listening socket is limited

    async def _follow(self, spectator: Spectator) -> None:
        last_id: str | None = None
        while len(spectator.seen) < spectator.ends:
            spectator.connections += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            parser = Parser()
            parser.last_id = last_id
            try:
                await self._read(spectator, parser, reader, writer)
            finally:
                writer.close()
            last_id = parser.last_id
            if len(spectator.seen) < spectator.ends:
                assert parser.retry is not None, f"{spectator.path} ended without a retry time"
                await asyncio.sleep((parser.retry or 0) / 1000)

    async def _read(
        self,
        spectator: Spectator,
        parser: Parser,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        resumed = "" if parser.last_id is None else f"Last-Event-ID: {parser.last_id}\r\n"
        head = f"GET {spectator.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n{resumed}\r\n"
        writer.write(head.encode())
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        assert status.split()[1] == "200", f"{spectator.path} returned {status}"
        fields = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
        is_whole = "content-length" in fields
        while True:
            size = (
                int(fields["content-length"])
                if is_whole
                else int(await reader.readuntil(b"\r\n"), 16)
            )
            data = await reader.readexactly(size if is_whole else size + 2)
            for message in parser.feed(data[:size]):
                if message.name == END:
                    assert message.data["Id"] not in spectator.seen, (
                        f"{spectator.path} sent task.completed twice"
                    )
                    spectator.seen.add(message.data["Id"])
            spectator.has_begun = spectator.has_begun or parser.has_begun
            if is_whole or not size or len(spectator.seen) >= spectator.ends:
                return
