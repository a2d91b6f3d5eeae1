"""The directive ``command-help``, which shows what a command of ``flask asyncroute`` prints for
``--help``.
"""

from __future__ import annotations

import click
from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from flask_asyncroute.cli import group

WIDTH = 86  # characters that fit on the page


class CommandHelp(Directive):
    """Without an argument, show the help of the group."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        command: click.Command = group
        name = "flask asyncroute"
        if self.arguments:
            command = group.commands[self.arguments[0]]
            name = f"{name} {self.arguments[0]}"
        context = click.Context(
            command, info_name=name, max_content_width=WIDTH, terminal_width=WIDTH
        )
        text = command.get_help(context)
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
