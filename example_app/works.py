"""The kinds of work that the start page can run, each with the curl command that does the same."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from .tour import MAX_NAME

PRIMES_UP_TO = 300_000_000


@dataclass(frozen=True, slots=True)
class Field:
    """A text field of a form."""

    name: str
    label: str
    value: str
    max_length: int


@dataclass(frozen=True, slots=True)
class Work:
    """A form with a Run button.

    :param text: a description in one or two sentences.
    :param path: the route that starts the task with POST.
    :param command: a shell command that starts the same task.
    """

    title: str
    text: str
    path: str
    command: str
    field: Field | None = None
    has_file: bool = False


def works(root: str) -> tuple[Work, ...]:
    """Return all kinds of work.

    :param root: the URL of the application, without a trailing slash. It is quoted, because it
        comes from the request.
    """

    def url(path: str) -> str:
        return shlex.quote(root + path)

    primes = f"/primes/{PRIMES_UP_TO}"
    return (
        Work(
            "Tour of the planets",
            "Reports progress, and sends a message at each planet.",
            "/tour",
            f"curl -d traveller=Ada {url('/tour')}",
            field=Field("traveller", "Traveller", "Ada", MAX_NAME),
        ),
        Work(
            "Summary of a CSV file",
            "Uploads a file of up to 64 MiB, then computes statistics of each column.",
            "/csv-summary",
            f"curl -s {url('/static/planets.csv')} | curl -F file=@- {url('/csv-summary')}",
            has_file=True,
        ),
        Work(
            "Prime numbers",
            f"Counts the primes up to {PRIMES_UP_TO:,} in a child process. A stop kills it.",
            primes,
            f"curl -X POST {url(primes)}",
        ),
        Work(
            "Report from an unreliable service",
            "The first two attempts fail, and the task runs again. If you are signed in, you have "
            "one report at a time: a second Run returns the same task.",
            "/report",
            f"curl -u alice:alice -X POST {url('/report')}",
        ),
        Work(
            "Plain view",
            "Sleeps two seconds and returns an argument. Its code does not use the task at all.",
            "/asyncParam",
            f"curl -X POST {url('/asyncParam')}",
        ),
    )
