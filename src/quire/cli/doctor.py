"""`quire doctor`: is the installation whole, and is this machine fit?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from quire.cli.bench.report import print_json
from quire.cli.checks import Check, run_checks
from quire.cli.flags import ConfigFile, settings
from quire.config.server import ServerConfig

_MARKS = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]"}


def doctor(
    *,
    host: str | None = None,
    port: int | None = None,
    model: Annotated[bool, Parameter(negative="--no-model")] = True,
    gateway: str | None = None,
    api_key: str | None = None,
    config: ConfigFile = None,
    json: bool = False,
) -> int:
    """Check the installation and the machine, and a gateway that runs. The exit code is 1 if a check fails.

    Parameters
    ----------
    host
        Address that a server would listen on.
    port
        Port that a server would listen on.
    model
        Load the built-in model and ask it a question.
    gateway
        URL of a gateway: its endpoints, and whether the KV events of its engines have any effect.
    api_key
        Sent to the gateway.
    json
        Print JSON.
    """
    given = {"host": host, "port": port}
    flags = {name: value for name, value in given.items() if value is not None}
    wanted = settings(ServerConfig, flags, config=config).value
    checks = run_checks(wanted.host, wanted.port, ask_model=model)
    if gateway is not None:
        from quire.cli.gateway_checks import check_endpoints, check_kv_events

        checks.extend(check_endpoints(gateway, api_key))
        checks.extend(check_kv_events(gateway, api_key))
    failed = any(check.status == "fail" for check in checks)
    if json:
        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        _print(checks)
    return 1 if failed else 0


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for check in checks:
        detail = escape(check.detail) + (f"\n[dim]{escape(check.remedy)}[/dim]" if check.remedy else "")
        table.add_row(_MARKS[check.status], check.name, detail)
    Console().print(table)
