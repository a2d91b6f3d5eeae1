"""``POST /tour``: visits the planets and sends an event at each, as an example of a live stream."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from flask import Blueprint, abort, request

from flask_asyncroute import Sse, current_task

from .extension import async_routes

blueprint = Blueprint("tour", __name__)

PLANETS = Path(__file__).parent / "static" / "planets.csv"
SECONDS = 0.8
"""Duration of a visit."""
MAX_NAME = 40


@blueprint.post("/tour")
@async_routes.task(timeout=60, sse=Sse(group="tours", send_result=True))
def tour() -> dict[str, Any]:
    """Visit the planets one after the other. The form field "traveller" names the traveller."""
    traveller = request.form.get("traveller", "").strip() or "Somebody"
    if len(traveller) > MAX_NAME:
        abort(400, f"The traveller's name is too long; use at most {MAX_NAME} characters.")
    with PLANETS.open(encoding="utf-8", newline="") as file:
        planets = list(csv.DictReader(file))
    for number, planet in enumerate(planets):
        current_task.set_progress(100 * number / len(planets), f"on the way to {planet['name']}")
        current_task.sleep(SECONDS)
        current_task.check()
        current_task.send_event(
            {"text": f"{traveller} visits {planet['name']}: {planet['note'] or planet['kind']}."}
        )
    current_task.set_progress(100, "at the end of the tour")
    return {"traveller": traveller, "visited": len(planets), "last": planets[-1]["name"]}
