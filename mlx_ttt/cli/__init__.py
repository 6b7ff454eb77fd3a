"""The command line. Every message a user sees is made here; MLX is imported only when a command runs."""

from __future__ import annotations

import click

from .. import __version__
from .convert import convert
from .generate import generate
from .mlx_lm import COMMANDS


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-ttt")
def main() -> None:
    """Test-Time Training language models on Apple silicon."""


for subcommand in (generate, convert, *COMMANDS):
    main.add_command(subcommand)
