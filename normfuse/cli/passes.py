"""`normfuse passes`."""

import inspect
import json
import textwrap

import click

from normfuse.cli.help import Command
from normfuse.cli.options import json_option, verbosity

__all__ = ["passes"]


@click.command(cls=Command, short_help="List the passes.")
@click.option("--list", "_list", is_flag=True, hidden=True, help="What the command does anyway.")
@json_option
@verbosity
def passes(_list: bool, as_json: bool, quiet: bool) -> None:
    """List the passes in the order in which they are of use, each with the identity that it uses."""
    from normfuse.api import DEFAULT
    from normfuse.passes import PASSES

    known = {name: _first_line(entry) for name, entry in PASSES.items()}
    if as_json:
        listed = [{"name": name, "default": name in DEFAULT, "identity": identity} for name, identity in known.items()]
        click.echo(json.dumps(listed, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("pass", "default", "what it does", box=None, pad_edge=False)
    for name, identity in known.items():
        table.add_row(name, "yes" if name in DEFAULT else "", escape(identity))
    Console().print(table)
    click.echo("\n" + textwrap.fill("The default pipeline: " + ", ".join(DEFAULT), 80))
    click.echo("Add one to it: --passes default,NAME")


def _first_line(entry: object) -> str:
    return (inspect.getdoc(entry) or "").partition("\n")[0]
