"""`quire complete`: one prompt, continued."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from quire.cli.chat import ApiKey, Url, visible
from quire.cli.flags import ConfigFile, OwnEngineFlags
from quire.cli.generation import Generation, GenerationFlags
from quire.cli.partner import connect

DEFAULT_MAX_TOKENS = 128


def complete(
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    model: str | None = None,
    url: Url = None,
    api_key: ApiKey = None,
    config: ConfigFile = None,
    generation: GenerationFlags = None,
    engine: OwnEngineFlags = None,
) -> None:
    """Continue one prompt.

    The model is chosen as by `quire chat`. At most 128 tokens unless --max-tokens says otherwise.

    Parameters
    ----------
    prompt
        The text to continue; - reads it from standard input.
    model
        A local directory, a Hugging Face id, an s3:// URL or quire-tiny; with --url, a name the server knows.
    """
    wanted = generation or Generation()
    if wanted.max_tokens is None:
        wanted = replace(wanted, max_tokens=DEFAULT_MAX_TOKENS)
    text = sys.stdin.read() if prompt == "-" else prompt
    to_terminal = sys.stdout.isatty()
    with connect(model=model, url=url, api_key=api_key, generation=wanted, engine=engine, config=config) as partner:
        for piece in partner.complete(text):
            sys.stdout.write(visible(piece) if to_terminal else piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
