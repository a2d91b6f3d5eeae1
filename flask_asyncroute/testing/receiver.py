"""A receiver of callbacks for tests."""

from __future__ import annotations

import base64
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from flask import Flask
from standardwebhooks import Webhook, WebhookVerificationError

from .. import config as configuration
from ..runtime import runtime_of

HOST = "127.0.0.1"
SECRET = "ASYNCROUTE_CALLBACK_SECRET"
ALLOWED_HOSTS = "ASYNCROUTE_CALLBACK_ALLOWED_HOSTS"


@dataclass(frozen=True)
class ReceivedCallback:
    """A callback whose signature is valid."""

    method: str
    path: str
    """With the query, as in the URL of the callback."""
    headers: Mapping[str, str]
    """The names are in lower case."""
    body: bytes
    data: Any
    """The decoded JSON; None for XML and YAML."""


class CallbackReceiver:
    """Receives the callbacks of an app on a loopback port, and verifies their signatures as
    Standard Webhooks define. Use it as a context manager.

    In the block, the app may send callbacks to 127.0.0.1, and signs them with a random secret if it
    has none. The receiver changes the configuration for this, so the app's store is closed and
    opened again at the beginning and at the end. Tasks in ``memory://`` are lost.

    A callback without a valid signature gets 401 and is not in ``calls``.
    """

    def __init__(self, app: Flask) -> None:
        self.url = ""
        """The URL for callbacks. Further paths below it are received too."""
        self.calls: list[ReceivedCallback] = []
        """In the order of their arrival. A callback that is sent again is received again."""
        self.status = 204
        """The status of each response. With 503, for example, the app sends the callback again."""
        self._app = app
        self._runtime = runtime_of(app)
        self._refusals: list[str] = []
        self._webhooks: list[Webhook] = []
        self._arrived = threading.Condition()
        self._opened = ExitStack()

    def __enter__(self) -> CallbackReceiver:
        configuration.read(self._app)  # an invalid value is refused before anything is changed
        with ExitStack() as opened:
            opened.callback(self._set_config(self._app.config))
            server = opened.enter_context(
                _Server((HOST, 0), type("Handler", (_Handler,), {"receiver": self}))
            )
            self.url = f"http://{HOST}:{server.server_address[1]}/"
            thread = threading.Thread(
                target=server.serve_forever, args=(0.01,), name="asyncroute-callback-receiver",
                daemon=True,
            )  # fmt: skip
            thread.start()
            opened.callback(thread.join)
            opened.callback(server.shutdown)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def _set_config(self, config: dict[str, Any]) -> Callable[[], None]:
        """Allow this receiver in the app's configuration; return the function that undoes this."""
        before = {name: config[name] for name in (SECRET, ALLOWED_HOSTS) if name in config}
        if not config.get(SECRET):
            config[SECRET] = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        config[ALLOWED_HOSTS] = [*(config.get(ALLOWED_HOSTS) or []), HOST]
        self._webhooks = [Webhook(each) for each in configuration.read(self._app).callback_secret]
        self._read_config_again()

        def undo() -> None:
            for name in (SECRET, ALLOWED_HOSTS):
                config.pop(name, None)
            config.update(before)
            self._read_config_again()

        return undo

    def wait(self, number: int = 1, timeout: float = 10.0) -> list[ReceivedCallback]:
        """Wait until ``number`` callbacks have arrived; return all that have arrived.

        :param timeout: in seconds.
        :raises TimeoutError: if fewer have arrived after ``timeout``.
        """
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.calls) >= number, timeout):
                refused = f" Refused: {'; '.join(self._refusals)}" if self._refusals else ""
                raise TimeoutError(
                    f"{len(self.calls)} of {number} callbacks have arrived within {timeout:g} s."
                    f"{refused}"
                )
            return list(self.calls)

    def _read_config_again(self) -> None:
        if self._runtime.is_prepared:
            self._runtime.reset(is_inline=self._runtime.is_inline)

    def take(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> int:
        """Handle a request; return the status of its response."""
        error = ""
        for webhook in self._webhooks:
            try:
                data = webhook.verify(body, dict(headers))
            except WebhookVerificationError as reason:
                error = str(reason)
                continue
            except ValueError:  # of the JSON decoder; the signature is valid
                data = None
            with self._arrived:
                self.calls.append(ReceivedCallback(method, path, headers, body, data))
                self._arrived.notify_all()
            return self.status
        self._refusals.append(f"{method} {path}: {error}")
        return 401


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() waits for them


class _Handler(BaseHTTPRequestHandler):
    receiver: CallbackReceiver
    timeout = 5.0

    def _receive(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {name.lower(): value for name, value in self.headers.items()}
        status = self.receiver.take(self.command, self.path, headers, body)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_DELETE = do_GET = do_PATCH = do_POST = do_PUT = _receive

    def log_message(self, format: str, *args: Any) -> None: ...
