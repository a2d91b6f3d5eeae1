"""What the start page offers to try: commands for a shell, written for the address that the visitor used."""

from __future__ import annotations

import shlex
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trial:
    """Something to try.

    :param text: what it shows, in a sentence.
    :param commands: for a shell, to be run one after the other.
    """

    title: str
    text: str
    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Trials that go together."""

    title: str
    trials: tuple[Trial, ...]


def trials(root: str) -> tuple[Group, ...]:
    """Return all trials.

    :param root: where the application answers, without a slash at the end. It comes from the request, so it is quoted.
    """

    def url(path: str) -> str:
        return shlex.quote(root + path)

    one_task = url("/task/") + "$ID"
    an_id = """ | sed 's/.*"Id":"\\([^"]*\\)".*/\\1/'"""

    return (
        Group(
            "Start, look, stop",
            (
                Trial(
                    "An argument",
                    "Sleeps two seconds, then answers with it. The 202 and the task come at once.",
                    (f"curl -i -X PUT {url('/asyncParam')}",),
                ),
                Trial(
                    "A closure",
                    "Sleeps five seconds. Keep the task's id: it is Running, with progress, then Completed with a Result.",
                    (
                        f"ID=$(curl -s -X PUT {url('/asyncUsing')}{an_id})",
                        f"curl {one_task}",
                        f"curl {one_task}/result",
                    ),
                ),
                Trial(
                    "Shared state",
                    "Answers with what all workers share. Change it, and the next task says so.",
                    (f"curl -X PUT -d message=Hello {url('/state')}", f"curl -X PUT {url('/asyncState')}"),
                ),
                Trial(
                    "Stop",
                    "Whichever worker runs the task: it is Aborted.",
                    (f"ID=$(curl -s -X PUT {url('/asyncUsing')}{an_id})", f"curl -X DELETE {one_task}"),
                ),
            ),
        ),
        Group(
            "Nobody has to poll",
            (
                Trial(
                    "Wait",
                    "The answer is held until the task has ended; the second asks for that with its start.",
                    (
                        f"ID=$(curl -s -X PUT {url('/asyncParam')}{an_id})",
                        f"curl {one_task}'?wait=10'",
                        f"curl -X PUT -H 'Prefer: wait=10' {url('/asyncParam')}",
                    ),
                ),
                Trial(
                    "Follow",
                    "Its state, its progress and what its view says, as they come, to the end.",
                    (
                        f"ID=$(curl -s -X POST -d traveller=Ada {url('/tour')}{an_id})",
                        f"curl -N {one_task}/events",
                    ),
                ),
            ),
        ),
        Group(
            "Real work",
            (
                Trial(
                    "A summary of a CSV file",
                    "Statistics of each column, row by row. This sends a small table from here; send one of your own.",
                    (f"curl -s {url('/static/planets.csv')} | curl -F file=@- {url('/csv-summary')}",),
                ),
                Trial(
                    "Prime numbers",
                    "Keeps a processor busy in a process of its own, tells its progress, and can be stopped.",
                    (f"curl -X POST {url('/primes/1000000000')}",),
                ),
            ),
        ),
        Group(
            "Query, in three styles",
            (
                Trial(
                    "Simple",
                    "Fields and the values they equal.",
                    (f"curl {url('/tasks?State=Completed&Cancellable=true')}",),
                ),
                Trial(
                    "deepObject",
                    "Any operator, in the query string.",
                    (f"curl -g {url('/tasks?filter[State][op]=NE&filter[State][value]=Completed')}",),
                ),
                Trial(
                    "JSON",
                    "The same in a body.",
                    (
                        f"""curl -H 'Content-Type: application/json' -d '{{"AsyncRouteId": {{"op": "LIKE", "value": "async"}}}}'"""
                        f" {url('/tasks/query')}",
                    ),
                ),
            ),
        ),
        Group(
            "Permission",
            (
                Trial(
                    "Nobody known: 401",
                    "Routes with a permission want to know who calls.",
                    (f"curl -X PUT {url('/auth/asyncUsing')}",),
                ),
                Trial(
                    "The group may look",
                    "Alice starts it. Bob is in her group: he sees it and may not stop it. For Carol it does not exist.",
                    (
                        f"ID=$(curl -s -u alice:alice -X PUT {url('/auth/asyncUsing')}{an_id})",
                        f"curl -u bob:bob {one_task}",
                        f"curl -u bob:bob -X DELETE {one_task}",
                        f"curl -u carol:carol {one_task}",
                    ),
                ),
                Trial(
                    "The group may stop",
                    "Here the analysts may do both.",
                    (
                        f"ID=$(curl -s -u alice:alice -X PUT {url('/auth/asyncState')}{an_id})",
                        f"curl -u bob:bob -X DELETE {one_task}",
                    ),
                ),
                Trial(
                    "Named in the request",
                    "A permission function reads who else may look: here Carol.",
                    (
                        f"ID=$(curl -s -u alice:alice -X PUT {url('/auth/asyncParam?reader=carol')}{an_id})",
                        f"curl -u carol:carol {one_task}",
                    ),
                ),
            ),
        ),
    )
