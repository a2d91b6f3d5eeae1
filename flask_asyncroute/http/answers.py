"""Tasks as answers: the task object with its Location, ETag and Retry-After, for `route` and `http.operations` alike."""

from __future__ import annotations

from typing import Any

from flask import Response

from ..pace import Pace
from ..task import AsyncRouteTask, now_us
from .negotiation import etag_suffix, render


def task_answer(
    task: AsyncRouteTask, pace: Pace, media_type: str, status: int = 200, headers: list[tuple[str, str]] | None = None
) -> Response:
    """Return the task object; with Retry-After while it has not ended."""
    fields = [] if headers is None else headers
    if not task.state.is_terminal:
        fields.append(("Retry-After", str(pace.rest(task, now_us()))))
    return render(document_of(task, media_type), media_type, "AsyncRouteTask", status, fields)


def document_of(task: AsyncRouteTask, media_type: str) -> dict[str, Any]:
    """Return the task object for the encoder of ``media_type``; for JSON its result stays encoded."""
    return task.to_wire() if media_type == "application/json" else task.to_dict()


def etag_of(task: AsyncRouteTask, media_type: str) -> str:
    """Return the strong ETag of a task's present revision in one media type."""
    return f"{task.revision}-{etag_suffix(media_type)}"
