"""`normfuse passes`."""

import inspect
import json

import click

from normfuse.cli.options import json_option, verbosity

__all__ = ["passes"]


@click.command(short_help="List the passes.")
@click.option("--list", "_list", is_flag=True, hidden=True, help="What the command does anyway.")
@json_option
@verbosity
def passes(_list: bool, as_json: bool, quiet: bool) -> None:
    """List the passes in the order in which they run, each with the identity that it uses."""
    from normfuse.passes import PASSES

    known = {name: _first_line(entry) for name, entry in PASSES.items()}
    if as_json:
        click.echo(json.dumps([{"name": name, "identity": identity} for name, identity in known.items()], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("pass", "identity", box=None, pad_edge=False)
    for name, identity in known.items():
        table.add_row(name, identity)
    Console().print(table)


def _first_line(entry: object) -> str:
    return (inspect.getdoc(entry) or "").partition("\n")[0]
