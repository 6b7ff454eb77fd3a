"""lora, fuse and others: mlx-lm's own commands, which know TTT models once this package is imported."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from ..errors import TTTError
from .command import INTERRUPTED, OneLine, fail


class MLXLM(OneLine):
    """A command of mlx-lm. It gets all arguments unchanged, so that --help shows its own options.

    mlx-lm checks little, and says what is wrong by exceptions of any kind. All of them end in one line here.
    """

    def __init__(self, name: str, module: str, help: str):
        super().__init__(name, help=help, add_help_option=False)
        self.module = module

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = args
        return args

    def invoke(self, ctx: click.Context) -> None:
        sys.argv = [ctx.command_path, *ctx.args]
        try:
            with _one_line_usage(), self.around():
                importlib.import_module(f"mlx_lm.{self.module}").main()
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except ModuleNotFoundError as error:
            fail(TTTError(f"{self.name} needs the package {error.name}: pip install {error.name}"))
        except KeyError as error:
            fail(TTTError(f"a line of the data has no {error}"))
        except Exception as error:
            if type(error).__module__.startswith("huggingface_hub"):
                fail(TTTError(f"{_model(ctx.args)}: not on this machine, and not to be had from the Hub: {error}"))
            fail(error)

    def around(self) -> contextlib.AbstractContextManager[Any]:
        """What mlx-lm's command runs in."""
        return contextlib.nullcontext()


def _model(arguments: list[str]) -> str:
    """The model that is asked for."""
    given = dict(itertools.pairwise(arguments))
    return given.get("--model", "mlx-lm's default model")


@contextlib.contextmanager
def _one_line_usage() -> Iterator[None]:
    """Have argparse say what is wrong without the usage of all options."""

    def error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise TTTError(f"{message} (`{parser.prog} --help` shows what there is)")

    own = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = error  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = own  # type: ignore[method-assign]


class Lora(MLXLM):
    """Fine-tuning, with gradients that take little memory however long the texts are."""

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        from ..distributed.group import joined
        from ..training.lora import in_mlx_lm

        with joined(), in_mlx_lm():
            yield


class Fuse(MLXLM):
    """Checks first what mlx-lm would only find out after it has loaded the model."""

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        from mlx_lm import fuse

        from ..training.lora import check_adapter

        own = fuse.load

        def load(*args: Any, **kwargs: Any) -> Any:
            check_adapter(kwargs["adapter_path"])
            return own(*args, **kwargs)

        fuse.load = load
        try:
            yield
        finally:
            fuse.load = own


lora = Lora("lora", "lora", "Fine-tune a model: LoRA, DoRA, or all of some layers.")
fuse = Fuse("fuse", "fuse", "Merge what lora has learned into a model.")
