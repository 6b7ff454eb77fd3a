"""serve: answer requests over HTTP."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import TTTError
from .command import CONTEXT, INTERRUPTED, Command, Named, tokenizer_option

_GIGABYTE = 10**9
_MEGABYTE = 10**6
_SECONDS = click.FloatRange(0.1, 1e6)


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]DIR",
    help="A model directory, or org/name on the Hub; the bundled model by default. Several models: give it several"
    " times.",
)
@tokenizer_option
@click.option("--host", default="127.0.0.1", help="Where to listen. Other machines reach 0.0.0.0, not 127.0.0.1.")
@click.option("--port", default=8080, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option("--api-key", envvar="MLX_TTT_API_KEY", metavar="KEY", help="What clients must send as bearer token.")
@click.option(
    "--cors-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Web pages of this origin may ask, such as http://localhost:3000; * for all. Can be given several times.",
)
@click.option(
    "--chat-template", type=Path, metavar="FILE", help="A chat template in Jinja, in place of the model's own."
)
@click.option("--states", type=Path, metavar="FOLDER", help="Keep the states that requests save here.")
@click.option("--states-quota", type=click.FloatRange(0.001), default=10.0, metavar="GB", help="Size of all of them.")
@click.option("--decode-concurrency", type=click.IntRange(1, 1024), default=32, help="Texts written at a time.")
@click.option("--prompt-concurrency", type=click.IntRange(1, 1024), default=8, help="Prompts read at a time.")
@click.option(
    "--queue", type=click.IntRange(1, 10**6), default=256, help="Prompts that may wait; then clients get 429."
)
@click.option("--prompt-cache-size", type=click.IntRange(0), default=32, help="Texts whose state is kept for prompts.")
@click.option("--prompt-cache-gb", type=click.FloatRange(0), default=1.0, help="Size of these states.")
@click.option("--max-body", type=click.FloatRange(0.001, 10**6), default=16.0, metavar="MB", help="Size of a request.")
@click.option("--max-prompt", type=click.IntRange(1), default=1_000_000, help="Tokens of a prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=32_768, help="Tokens that a request may ask for.")
@click.option("--default-tokens", type=click.IntRange(1), default=512, help="Tokens if a request does not say.")
@click.option("--timeout", type=_SECONDS, default=600.0, metavar="SECONDS", help="Until an answer is complete.")
@click.option("--max-requests", type=click.IntRange(1), default=1000, help="Requests at a time; then clients get 503.")
@click.option("--drain", type=_SECONDS, default=30.0, metavar="SECONDS", help="For what runs, when the server ends.")
@click.option("--log-level", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]), default="INFO")
def serve(
    models: tuple[str, ...],
    tokenizer: str | None,
    api_key: str | None,
    cors_origin: tuple[str, ...],
    states_quota: float,
    decode_concurrency: int,
    prompt_concurrency: int,
    prompt_cache_size: int,
    prompt_cache_gb: float,
    **options: Any,
) -> None:
    """Answer requests over HTTP, with OpenAI's API.

    Nothing but the models named here is ever loaded. Ctrl-C ends the server when what runs is done.
    """
    if api_key == "":
        raise TTTError("--api-key is empty; leave it out, or give a key")
    if api_key is not None and not api_key.isprintable():
        raise TTTError("--api-key has characters that cannot be sent; take letters and digits")
    try:
        from ..serve.address import listen
        from ..serve.engine import Room
        from ..serve.server import Limits, Settings, front, run
    except ModuleNotFoundError as error:
        raise TTTError(f"serve needs {error.name}: pip install 'mlx-ttt[serve]'") from None

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("mlx_ttt.serve").setLevel(options["log_level"])
    settings = Settings(
        models=models or (None,),
        find=lambda name: Named(name, tokenizer).directory(),
        host=options["host"],
        port=options["port"],
        key=api_key,
        origins=cors_origin,
        chat_template=options["chat_template"],
        states=options["states"],
        quota=round(states_quota * _GIGABYTE),
        drain=options["drain"],
        room=Room(
            decode_concurrency,
            prompt_concurrency,
            options["queue"],
            prompt_cache_size,
            round(prompt_cache_gb * _GIGABYTE),
        ),
        limits=Limits(
            body=round(options["max_body"] * _MEGABYTE),
            prompt=options["max_prompt"],
            max_tokens=options["max_tokens"],
            default_tokens=options["default_tokens"],
            seconds=options["timeout"],
            requests=options["max_requests"],
        ),
    )
    listener = listen(settings.host, settings.port)  # fails now rather than when the model is loaded
    with listener:
        app = front(settings)
        _announce(settings, listener.getsockname(), list(app.models))
        if run(app, listener, settings.drain) == signal.SIGINT:
            sys.exit(INTERRUPTED)


def _announce(settings: Any, address: tuple, names: list[str]) -> None:
    """Say where the server is, and what is wrong with that."""
    from ..serve.address import is_loopback

    host, port = address[:2]
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"{', '.join(names)}: http://{shown}:{port}/v1", err=True)
    if not is_loopback(settings.host) and settings.key is None:
        click.echo("warning: everybody who can reach this machine may ask; --api-key asks for a key", err=True)
