"""serve, lora and others: mlx-lm's own commands, which know TTT models because this package is imported."""

from __future__ import annotations

import importlib
import sys

import click


class MLXLM(click.Command):
    """A command of mlx-lm. It gets all arguments as they are, so that --help shows its own options."""

    def __init__(self, name: str, module: str, help: str):
        super().__init__(name, help=help)
        self.module = module

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = args
        return args

    def invoke(self, ctx: click.Context) -> None:
        sys.argv = [ctx.command_path, *ctx.args]
        importlib.import_module(f"mlx_lm.{self.module}").main()


class Serve(MLXLM):
    """The server, with a store of prompts that suits states which cannot be trimmed."""

    def invoke(self, ctx: click.Context) -> None:
        if any(argument.startswith("--dr") for argument in ctx.args):
            # The server would start, and answer every request with an error: it cannot take back what a state has read.
            click.echo("error: no --draft-model here; `mlx-ttt generate --draft-model` has one", err=True)
            ctx.exit(2)
        from mlx_lm import server

        from ..prompt_store import PromptStore

        server.LRUPromptCache = PromptStore
        super().invoke(ctx)


COMMANDS = (
    Serve("serve", "server", "Answer requests over HTTP, by the API of OpenAI."),
    MLXLM("chat", "chat", "Chat in the terminal."),
    MLXLM("lora", "lora", "Fine-tune a model: LoRA, DoRA, or all of some layers."),
    MLXLM("fuse", "fuse", "Merge what lora has learned into a model."),
    MLXLM("perplexity", "perplexity", "Measure how well a model predicts a data set."),
)
