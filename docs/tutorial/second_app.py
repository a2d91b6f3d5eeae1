import time

from flask import Flask, abort, request

from flask_asyncroute import AsyncRoute, current_task

app = Flask(__name__)
async_routes = AsyncRoute(app)

REGIONS = ("north", "south")


def sales_of(year, month, region):
    time.sleep(0.5)  # simulates slow work
    return 1000 + month


@app.post("/reports/<int:year>")
@async_routes.task(timeout=60)
def report(year):
    region = request.form.get("region", "north")
    if region not in REGIONS:
        abort(400, f"The regions are {' and '.join(REGIONS)}.")
    sales = 0
    for month in current_task.track(range(1, 13)):
        current_task.check()
        sales += sales_of(year, month, region)
    return {"year": year, "region": region, "sales": sales}
