"""models: the public checkpoints; cache: those that were fetched by name."""

from __future__ import annotations

import json

import click

from ..errors import TTTError
from .command import CONTEXT, Command, Group, show_table

_SHOWN = 12  # characters of a commit


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--json", "as_json", is_flag=True, help="Write JSON, with all that is known.")
def models(as_json: bool) -> None:
    """List the public TTT checkpoints, and the line that converts each.

    Every command with --model takes their names, too: it downloads and converts them the first time.
    """
    from ..checkpoint.public import CHECKPOINTS, where_tokenizers_are

    if as_json:
        click.echo(json.dumps([checkpoint.facts() for checkpoint in CHECKPOINTS], indent=1))
        return
    rows = [
        (
            checkpoint.name,
            checkpoint.inner_model,
            checkpoint.size,
            f"{checkpoint.context:,}" if checkpoint.context else "not known",
            checkpoint.tokenizer,
            checkpoint.licence,
            checkpoint.format,
            checkpoint.download,
        )
        for checkpoint in CHECKPOINTS
    ]
    show_table([("checkpoint", "inner model", "size", "context", "tokenizer", "licence", "format", "download"), *rows])
    click.echo()
    for checkpoint in CHECKPOINTS:
        click.echo(checkpoint.command)
    click.echo(f"\nWithout a tokenizer: {where_tokenizers_are()}. What of this was checked how: docs/checkpoints.md.")


@click.group(cls=Group, context_settings=CONTEXT)
def cache() -> None:
    """What was downloaded and converted by name, and is kept for the next start."""


@cache.command("list", cls=Command, context_settings=CONTEXT)
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def list_(as_json: bool) -> None:
    """List the models that start at once, and how large they are."""
    from ..checkpoint.by_name import human
    from ..checkpoint.converted import cache_root, homes
    from ..checkpoint.hub import cache_folder, downloads

    found = downloads()
    entries = [entry for home in homes() for entry in home.entries()]
    if as_json:
        facts = [
            {
                "name": entry.repo,
                "commit": entry.commit,
                "revisions": entry.revisions,
                "path": str(entry.path),
                "bytes": entry.nbytes,
                "downloaded_bytes": found.get(entry.repo, 0),
            }
            for entry in entries
        ]
        click.echo(json.dumps(facts, indent=1))
        return
    if not entries:
        click.echo(f"{cache_root()}: holds no models")
        return
    rows = [
        (
            entry.repo,
            ", ".join(entry.revisions),
            entry.commit[:_SHOWN],
            human(entry.nbytes) if entry.nbytes else "as downloaded",
            human(found.get(entry.repo, 0)),
        )
        for entry in entries
    ]
    show_table([("model", "revision", "commit", "converted", "download"), *rows])
    click.echo(f"\nconverted: {cache_root()}\ndownload: {cache_folder()}")


@cache.command(cls=Command, context_settings=CONTEXT)
@click.argument("names", nargs=-1, metavar="ORG/NAME...")
@click.option("--all", "everything", is_flag=True, help="All that `cache list` shows.")
@click.option("--download", is_flag=True, help="Remove what was downloaded, and keep what was converted.")
def remove(names: tuple[str, ...], everything: bool, download: bool) -> None:
    """Remove models that were converted, so that the next start fetches the newest ones.

    What the Hub's library has downloaded stays in its cache, unless --download is given.
    """
    from ..checkpoint.by_name import human
    from ..checkpoint.converted import Home, cache_root, homes
    from ..checkpoint.hub import downloads, forget

    if everything == bool(names):
        raise TTTError("remove what? Give names, or --all")
    known = {home.repo: home for home in homes()}
    found = downloads() if download else {}
    for name in names:
        if name not in known and name not in found:
            raise TTTError(f"{name}: not in {cache_root()}; `mlx-ttt cache list` shows what is")
    for name in known if everything else dict.fromkeys(names):
        home = known.get(name, Home(name))
        if download:
            home.unlink()
            click.echo(f"{name}: {human(forget(name))} removed, of what was downloaded")
        else:
            click.echo(f"{name}: {human(home.remove())} removed")
