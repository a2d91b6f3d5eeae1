import inspect

import app
import pytest

from flask_asyncroute import testing


@pytest.fixture(autouse=True)
def quick_sales(monkeypatch):
    monkeypatch.setattr(app, "sales_of", lambda year, month, region: 1000)


@pytest.fixture
def client():
    with testing.inline(app.app):
        yield app.app.test_client()


def test_report_over_http(client):
    start = client.post("/reports/2026", data={"region": "south"})
    assert start.status_code == 202
    assert start.json["State"] == "Completed"
    assert start.json["Result"] == {"year": 2026, "region": "south", "sales": 12000}


def test_report_function():
    with app.app.test_request_context(), testing.fake_task() as task:
        assert inspect.unwrap(app.report)(2026)["sales"] == 12000
        assert task.progress == 100
