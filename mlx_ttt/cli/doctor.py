"""doctor: what this machine has, and whether what it runs is right."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..errors import OutputError
from .command import CONTEXT, Command, Progress, show_table, styled

if TYPE_CHECKING:
    from ..proof.checks import Check


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--prove", is_flag=True, help="Compute everything in two ways, and measure speed: some minutes.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@click.option("--output", "-o", metavar="FILE", help="Write the report to a file, too, as JSON: for an issue.")
def doctor(prove: bool, as_json: bool, output: str | None) -> None:
    """Say what this machine has, what is missing, and what that would bring.

    With --prove, the update rule as it runs here (on a Mac: the Metal kernels) is compared with its definition, and a
    Core ML package with the model. The exit status is 1 if something is wrong.
    """
    from ..proof.facts import facts

    found = facts()
    if not as_json:
        _show_facts(found)
    report: dict[str, Any] = {"facts": [asdict(fact) for fact in found]}
    wrong = False
    if prove:
        checks = _prove(report, as_json)
        wrong = any(check.holds is False for check in checks)
    text = json.dumps(report, indent=1, default=str)
    if as_json:
        click.echo(text)
    if output is not None:
        try:
            with open(output, "w", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise OutputError(f"--output {output}: {error.strerror}") from error
    if wrong:
        sys.exit(1)


def _show_facts(found: list[Any]) -> None:
    width = max(len(fact.name) for fact in found)
    for fact in found:
        if fact.found is not None:
            click.echo(f"{fact.name:{width}}  {fact.found}")
        else:
            missing = styled("missing", sys.stdout, fg="yellow")
            click.echo(f"{fact.name:{width}}  {missing}: {fact.brings}")


def _prove(report: dict[str, Any], quiet: bool) -> list[Check]:
    """Make all checks and measure speed; what came of it goes to the report."""
    from ..proof.checks import core_ml_checks, model_check, rule_checks, speeds

    with Progress("update rule") as progress:
        checks = list(rule_checks(progress))
    checks += [model_check(), *core_ml_checks()]
    measured = list(speeds())
    report["checks"] = [{**asdict(check), "holds": check.holds} for check in checks]
    report["speeds"] = [asdict(speed) for speed in measured]
    if not quiet:
        click.echo()
        for check in checks:
            click.echo(_line(check))
        click.echo()
        rows = [(s.name, f"{s.median:,.0f}", f"{s.least:,.0f} to {s.largest:,.0f}") for s in measured]
        show_table([("tokens per second", "median", "range"), *rows])
    return checks


def _line(check: Check) -> str:
    if check.error is None:
        return f"not done  {check.name}: {check.note}"
    verdict = "holds" if check.holds else styled("WRONG", sys.stdout, fg="red")
    return f"{verdict}     {check.name}: {check.error:.1e}, allowed {check.bound:.0e}"
