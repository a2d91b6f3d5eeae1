"""What was written since a change number, read from SQL."""

from __future__ import annotations

from collections.abc import Hashable

from ...task import AsyncRouteTask
from ..base import News
from ..events import Events
from .database import Database
from .event_log import EventLog
from .records import record_of
from .statements import Statements

NEWS_PAGE = 1000


class Changes:
    """Reads news and events. News are for one thread at a time."""

    def __init__(self, database: Database, statements: Statements, event_log: EventLog) -> None:
        self._database = database
        self._sql = statements
        self._event_log = event_log
        self._seen: tuple[Hashable, int] | None = None

    def forget(self) -> None:
        """Begin anew: the next connections are others."""
        self._seen = None

    def news(self, ns: int, since: int) -> News:
        """See `TaskStore.news`."""
        version = self._database.version()
        if version is not None and self._seen == (version, since):
            return News(since, ())
        # Read before the tasks: whatever has a number up to this one is committed, and among them.
        change = self.newest(ns)
        tasks: list[AsyncRouteTask] = []
        sent: list[str] = []
        if change < since:
            since = 0  # Another database is in its place: all of it is new.
        if 0 <= since < change:
            written, news = self._event_log.written, self._sql.news
            rows = self._database.fetch_all(news.sql, news.values(ns=ns, since=since, most=NEWS_PAGE))
            tasks = [record_of(row) for row in rows]
            # After them: what has a number below any of theirs is committed by now.
            sent = [row[0] for row in self._database.fetch_all(written.sql, written.values(ns=ns, since=since))]
            if len(tasks) == NEWS_PAGE:
                return News(tasks[-1].change, tasks, sent)
            change = max(change, tasks[-1].change if tasks else 0)
        if version is not None:
            self._seen = (version, change)
        return News(change, tasks, sent)

    def events(self, ns: int, since: int, most: int, task_id: str | None, group: str | None) -> Events:
        """See `TaskStore.events`."""
        change = self.newest(ns)
        rows = self._database.fetch_all(*self._event_log.read(ns, since, most, task_id, group))
        found = [self._event_log.event_of(row) for row in rows]
        last = found[-1].change if found else 0
        return Events(last if len(found) == most else max(change, last), found)

    def newest(self, ns: int) -> int:
        """See `TaskStore.newest`."""
        return self._database.fetch_one(self._sql.change.sql, self._sql.change.values(ns=ns))[0]  # type: ignore[no-any-return]
