import time

from flask import Flask

from flask_asyncroute import AsyncRoute

app = Flask(__name__)
async_routes = AsyncRoute(app)


@app.post("/reports/<int:year>")
@async_routes.task()
def report(year):
    time.sleep(5)  # simulates slow work
    return {"year": year, "sales": 12345}
