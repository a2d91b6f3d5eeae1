"""Responses that are sent when a task ends or changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from tempfile import SpooledTemporaryFile
from typing import Any, cast

from flask import Response, current_app
from werkzeug.datastructures import Headers
from werkzeug.wsgi import ClosingIterator

from ..task import AsyncRouteTask
from ..workers import shutdown
from ..workers.runner import Runner

IDENTITY = "identity"
BLOCKING_SECONDS = 5.0
"""Maximum wait in seconds if a waiting request blocks all other requests of the process."""


def longest(environ: Mapping[str, Any], seconds: float) -> float:
    """Return the maximum wait for a request in seconds.

    This is ``seconds``, or less if a waiting request blocks all other requests.
    """
    if not _blocks_others(environ):
        return seconds
    # gunicorn kills a sync worker and its tasks if a request exceeds gunicorn's timeout.
    return min(seconds, BLOCKING_SECONDS, shutdown.restart_gunicorn_timeout() * 2 / 3)


def _blocks_others(environ: Mapping[str, Any]) -> bool:
    if environ.get("wsgi.multithread", True):
        return is_asgiref(environ)
    # gevent's server reports False, but runs requests concurrently if gevent has patched threads.
    is_gevent = type(environ.get("wsgi.input")).__module__ == "gevent.pywsgi"
    monkey = sys.modules.get("gevent.monkey")
    return not (is_gevent and monkey is not None and monkey.is_module_patched("threading"))


def is_asgiref(environ: Mapping[str, Any]) -> bool:
    """Check whether a request came through asgiref's WsgiToAsgi."""
    # WsgiToAsgi reports several threads, but runs all requests of a process on one thread.
    # Only asgiref passes a SpooledTemporaryFile as the body.
    body = environ.get("wsgi.input")
    return "asgiref.wsgi" in sys.modules and isinstance(body, SpooledTemporaryFile)


def held(
    runner: Runner,
    task: AsyncRouteTask,
    seconds: float,
    is_enough: Callable[[AsyncRouteTask], bool],
    announced: Response,
    answer: Callable[[AsyncRouteTask | None, bool], Response],
    failed: Callable[[Exception], Response],
) -> Response:
    """Return a response that is sent when a task satisfies ``is_enough``, or after ``seconds``.

    If this process has too many streams and waits, the response is sent at once.

    :param announced: the response that ``after_request`` functions see before the wait.
    :param answer: returns the final response. Its arguments are the task (None: it was deleted) and
        whether the process had capacity for the wait. It can be called outside the request context.
    :param failed: returns the final response if the wait raises an exception.
    """
    # The wait begins after Flask has torn down the request context (except on Granian), so that a
    # waiting request keeps no resources. The final status and headers are known after the wait.
    if seconds <= 0 or is_enough(task):
        return answer(task, True)
    slots = runner.stream_slots
    if not slots.acquire(blocking=False):
        return answer(task, False)
    # Release the slot (capacity for one wait) until the server begins to send. Otherwise, an
    # ``after_request`` function that fails or replaces the response would leak it.
    slots.release()

    def wait() -> Response:
        if not slots.acquire(blocking=False):
            return answer(task, False)
        try:
            found = runner.notifier.wait(task.id, is_enough, seconds)
        except Exception as error:
            return failed(error)
        finally:
            slots.release()
        return answer(found, True)

    response = _held_class(current_app.response_class)(  # type: ignore[arg-type]
        status=announced.status, headers=Headers(announced.headers)
    )
    del response.headers["Content-Length"]
    # Compressors skip a response with this header. Flask-Compress would keep the request context
    # alive during the wait.
    response.headers["Content-Encoding"] = IDENTITY
    response.announced = announced
    response.final = []
    response.response = response.body = _body(wait, response.final)
    return cast(Response, response)


def _body(wait: Callable[[], Response], final: list[Response]) -> Iterator[bytes]:
    final.append(wait())
    yield final[0].get_data()


class _Held(Response):
    """A response whose body waits for the task. The server sends the status after the wait.

    The app can wrap the body, as compressors do. Code that reads the body waits too.
    """

    announced: Response
    body: Iterator[bytes]
    final: list[Response]
    """A list that contains the final response after the wait. It is empty before."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        pieces = ClosingIterator(self._pieces(environ, start_response), self.close)
        if environ.get("SERVER_SOFTWARE") != "Granian":
            return pieces
        # Granian reads the status before the first piece, so wait here, although this keeps the
        # request context alive.
        try:
            return list(pieces)
        finally:
            pieces.close()

    def _pieces(self, environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        pieces = self.iter_encoded()
        begun = []
        for piece in pieces:
            begun.append(piece)
            if self.final:  # a compressor can yield a header of its format first
                break
        if self.final:
            self._copy_final(self.final[0])
        if self.headers.get("Content-Encoding") == IDENTITY:
            del self.headers["Content-Encoding"]
        start_response(self.status, self.get_wsgi_headers(environ).to_wsgi_list())
        if environ["REQUEST_METHOD"] == "HEAD" or self.status_code == 304:
            yield b""  # hypercorn sends the headers with the first piece
            return
        yield from begun
        yield from pieces

    def _copy_final(self, final: Response) -> None:
        # Keep the status and headers that the app has set.
        if self.status == self.announced.status:
            self.status = final.status
        if final.mimetype != self.announced.mimetype:  # the final document is a problem
            self.headers["Content-Type"] = final.headers["Content-Type"]
        if self.response is not self.body:
            # The app has changed the body, so a strong ETag would be wrong.
            del final.headers["Content-Length"]
            etag, _ = final.get_etag()
            if etag is not None:
                final.set_etag(etag, weak=True)
        for name, value in final.headers:
            if name not in self.headers:
                self.headers.add(name, value)


@lru_cache
def _held_class(base: type[Response]) -> Any:
    # A subclass, because Flask converts a response of another class to `base`: the wait would be
    # lost.
    return type("HeldResponse", (_Held, base), {})
