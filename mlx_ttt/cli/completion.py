"""completion: the script that has a shell complete commands and options."""

from __future__ import annotations

import click

from .command import CONTEXT, Command


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands and options.

    \b
    bash: mlx-ttt completion bash >> ~/.bashrc
    zsh:  mlx-ttt completion zsh >> ~/.zshrc
    fish: mlx-ttt completion fish > ~/.config/fish/completions/mlx-ttt.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    # click's class for bash would ask the bash on this machine for its version, and there need not be one.
    script = kind(ctx.find_root().command, {}, "mlx-ttt", "_MLX_TTT_COMPLETE")
    click.echo(script.source_template % script.source_vars())
