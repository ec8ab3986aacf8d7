"""`quire plan`: what a model needs and what fits, told from config.json and the headers of its weights."""

from __future__ import annotations

from quire.cli.bench.report import print_json
from quire.cli.flags import ConfigFile, EngineFlags, settings
from quire.config.engine import EngineConfig


def plan(
    model: str | None = None,
    *,
    json: bool = False,
    config: ConfigFile = None,
    engine: EngineFlags = None,
) -> None:
    """Tell what fits in memory and how fast it can run, before reading a weight.

    Parameters
    ----------
    model
        A local directory, a Hugging Face id, an s3:// URL, or quire-tiny, the built-in model, if none is named.
    json
        Print JSON.
    """
    wanted = settings(EngineConfig, engine, config=config, model=model).value

    from quire.models.plan import plan_model
    from quire.models.source import resolve_model

    made = plan_model(resolve_model(wanted), wanted)
    if json:
        print_json(made.to_dict())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Plan of {wanted.model}", show_header=False, title_justify="left")
    for row in made.rows():
        table.add_row(*row)
    Console().print(table)
