"""The command line. All messages to the user are printed here. MLX is imported only when a command runs."""

from __future__ import annotations

import click

from ..version import __version__
from .chat import chat
from .command import Group
from .completion import completion
from .convert import convert
from .doctor import doctor
from .generate import generate
from .mlx_lm import fuse, lora
from .models import cache, models
from .perplexity import perplexity
from .serve import serve
from .state import state
from .train import train
from .watch import watch

_SECTIONS = {
    "Write": (generate, chat, serve),
    "Models": (models, cache, convert),
    "Train": (train, lora, fuse),
    "Look": (perplexity, state, watch),
    "This machine": (doctor, completion),
}


class _Main(Group):
    """Shows its commands by what people want."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(c.name or "", c.get_short_help_str(80)) for c in commands], col_max=12)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-ttt")
def main() -> None:
    """Test-Time Training language models on Apple silicon."""


for commands in _SECTIONS.values():
    for subcommand in commands:
        main.add_command(subcommand)
