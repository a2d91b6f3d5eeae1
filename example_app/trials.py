"""Shell commands for more operations on tasks, with the URL that the visitor used."""

from __future__ import annotations

import shlex
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trial:
    """Commands to try.

    :param text: a description in one or two sentences.
    :param commands: shell commands to run one after the other.
    """

    title: str
    text: str
    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Trials of one subject."""

    title: str
    trials: tuple[Trial, ...]


def trials(root: str) -> tuple[Group, ...]:
    """Return all trials.

    :param root: the URL of the application, without a trailing slash. It is quoted, because it
        comes from the request.
    """

    def url(path: str) -> str:
        return shlex.quote(root + path)

    one_task = url("/task/") + "$ID"
    an_id = """ | sed 's/.*"Id":"\\([^"]*\\)".*/\\1/'"""

    return (
        Group(
            "Start, get and stop",
            (
                Trial(
                    "An argument",
                    "The view sleeps two seconds and returns its argument. The response 202 with "
                    "the task comes at once.",
                    (f"curl -i -X PUT {url('/asyncParam')}",),
                ),
                Trial(
                    "A closure",
                    "The view sleeps five seconds. Keep the task's id to get the task: it is "
                    "Running with its Progress, then Completed with a Result.",
                    (
                        f"ID=$(curl -s -X PUT {url('/asyncUsing')}{an_id})",
                        f"curl {one_task}",
                        f"curl {one_task}/result",
                    ),
                ),
                Trial(
                    "Shared state",
                    "The view returns a message that all workers share. Change it, and the next "
                    "task returns the new message.",
                    (
                        f"curl -X PUT -d message=Hello {url('/state')}",
                        f"curl -X PUT {url('/asyncState')}",
                    ),
                ),
                Trial(
                    "Stop",
                    "DELETE stops the task, whichever worker runs it. Its State is then Aborted.",
                    (
                        f"ID=$(curl -s -X PUT {url('/asyncUsing')}{an_id})",
                        f"curl -X DELETE {one_task}",
                    ),
                ),
            ),
        ),
        Group(
            "Without polling",
            (
                Trial(
                    "Wait",
                    "The response comes at the end of the task. The last command starts a task "
                    "and waits for it in one request.",
                    (
                        f"ID=$(curl -s -X PUT {url('/asyncParam')}{an_id})",
                        f"curl {one_task}'?wait=10'",
                        f"curl -X PUT -H 'Prefer: wait=10' {url('/asyncParam')}",
                    ),
                ),
                Trial(
                    "Follow",
                    "The response streams the task's state, progress and messages until it ends.",
                    (
                        f"ID=$(curl -s -X POST -d traveller=Ada {url('/tour')}{an_id})",
                        f"curl -N {one_task}/events",
                    ),
                ),
            ),
        ),
        Group(
            "Three query styles",
            (
                Trial(
                    "Simple",
                    "Compares fields for equality.",
                    (f"curl {url('/tasks?State=Completed&Cancellable=true')}",),
                ),
                Trial(
                    "deepObject",
                    "Uses any operator, in the query string.",
                    (
                        "curl -g "
                        f"{url('/tasks?filter[State][op]=NE&filter[State][value]=Completed')}",
                    ),
                ),
                Trial(
                    "JSON",
                    "Uses any operator, in a JSON body.",
                    (
                        "curl -H 'Content-Type: application/json' "
                        """-d '{"AsyncRouteId": {"op": "LIKE", "value": "async"}}' """
                        f"{url('/tasks/query')}",
                    ),
                ),
            ),
        ),
        Group(
            "Permission",
            (
                Trial(
                    "Anonymous caller: 401",
                    "Routes with a permission require a known caller.",
                    (f"curl -X PUT {url('/auth/asyncUsing')}",),
                ),
                Trial(
                    "The group may read",
                    "Alice starts the task. Bob is in her group: he may read it, but not stop it. "
                    "Carol gets 404.",
                    (
                        f"ID=$(curl -s -u alice:alice -X PUT {url('/auth/asyncUsing')}{an_id})",
                        f"curl -u bob:bob {one_task}",
                        f"curl -u bob:bob -X DELETE {one_task}",
                        f"curl -u carol:carol {one_task}",
                    ),
                ),
                Trial(
                    "The group may stop",
                    "Here the group may read and stop the task.",
                    (
                        f"ID=$(curl -s -u alice:alice -X PUT {url('/auth/asyncState')}{an_id})",
                        f"curl -u bob:bob -X DELETE {one_task}",
                    ),
                ),
                Trial(
                    "Named in the request",
                    "A permission function reads from the request who else may read the task: here "
                    "Carol.",
                    (
                        "ID=$(curl -s -u alice:alice -X PUT "
                        f"{url('/auth/asyncParam?reader=carol')}{an_id})",
                        f"curl -u carol:carol {one_task}",
                    ),
                ),
            ),
        ),
    )
