"""`joy doctor`: what this machine has, what is missing, whether it matters here, and how to get it."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from launch.doctor import Finding, as_json, examine

app = typer.Typer()
MARKS = {"ok": "[green]ok[/]", "missing": "[dim]--[/]", "wrong": "[red]!![/]"}


@app.command(epilog="Example: joy doctor --json")
def doctor(json_output: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False) -> None:
    """Say what this machine has, what is missing, whether that matters here, and how to get it. Always exits 0."""
    console = Console(soft_wrap=True, highlight=False)
    if json_output:
        print(json.dumps(as_json(examine()), indent=2))
        return
    with Console(stderr=True).status("looking around (importing torch takes a moment)"):
        findings = examine()
    width = max(len(finding.name) for finding in findings)
    group = ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            console.print(f"\n[bold]{group}[/]")
        console.print(_row(finding, width))
    problems = [finding for finding in findings if finding.matters]
    if problems:
        console.print(f"\n[bold]To mend here:[/] {', '.join(finding.name for finding in problems)}")
    else:
        console.print("\n[bold]Nothing that is missing matters on this machine.[/]")


def _row(finding: Finding, width: int) -> str:
    mark = "[red]!![/]" if finding.matters else MARKS[finding.state]
    advice = f"  -> {escape(finding.advice)}" if finding.advice else ""
    return f"  {mark}  {finding.name:<{width}}  {escape(finding.found)}{advice}"
