"""``POST /csv-summary``: computes statistics of each column of a CSV file, with progress."""

from __future__ import annotations

from typing import IO, Any

from flask import Blueprint, abort, request

from flask_asyncroute import current_task

from .column import MAX_DISTINCT, Column
from .extension import async_routes
from .table import NotATable, Table

blueprint = Blueprint("csv_summary", __name__)

CHECK_INTERVAL = 1000
"""Rows between two checks for a stop, and between two progress reports."""


@blueprint.post("/csv-summary")
@async_routes.task(timeout=600)
def summarise_upload() -> dict[str, Any]:
    """Summarise the file in the form field "file"."""
    upload = request.files.get("file")
    if upload is None:
        abort(400, "Send a CSV file in the form field 'file' (multipart/form-data).")
    try:
        return summarise(upload.stream)
    except NotATable as error:
        abort(422, str(error))


def summarise(file: IO[bytes]) -> dict[str, Any]:
    """Return the statistics of each column of a CSV file, which is read row by row.

    :raises NotATable: if the file is not a CSV table.
    :raises TaskAborted: if the task is stopped.
    """
    table = Table(file)
    columns = [Column(name, MAX_DISTINCT // len(table.columns)) for name in table.columns]
    rows = 0
    for row in table.rows():
        for column, value in zip(columns, row, strict=True):
            column.add(value)
        rows += 1
        if rows % CHECK_INTERVAL == 0:
            current_task.check()
            current_task.set_progress(100 * table.position / table.size, f"{rows} rows")
    current_task.set_progress(100, f"{rows} rows")
    return {
        "rows": rows,
        "encoding": table.encoding,
        "delimiter": table.delimiter,
        "columns": [column.summary() for column in columns],
    }
