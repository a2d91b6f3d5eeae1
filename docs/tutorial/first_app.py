import time

from flask import Flask

from flask_asyncroute import AsyncRoute

app = Flask(__name__)
async_routes = AsyncRoute(app)


@app.post("/reports/<int:year>")
@async_routes.task()
def report(year):
    time.sleep(5)  # stands for work that takes long
    return {"year": year, "sales": 12345}
