"""`quire quantize`: a checkpoint in 8 or 4 bits, in the format of compressed-tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from quire.cli.flags import ConfigFile, settings
from quire.config.engine import EngineConfig
from quire.core.errors import ConfigError

Method = Literal["rtn", "gptq"]
Format = Literal["int8", "int4", "fp8"]

GROUP_SIZES = (32, 64, 128)
FEWEST_TOKENS = 512


def quantize(
    model: str,
    out: Path,
    /,
    *,
    format: Annotated[Format, Parameter(name="--format")],  # noqa: A002 - the flag's name
    group_size: int = 32,
    method: Method | None = None,
    calibration: Path | None = None,
    calibration_tokens: int = 32_768,
    threads: int | None = None,
    config: ConfigFile = None,
) -> None:
    """Write a quantised checkpoint, which needs no flag to be served.

    Parameters
    ----------
    model
        A local directory, a Hugging Face id, an s3:// URL, or quire-tiny, the built-in model.
    out
        The directory to write to; it must not be there yet, or be empty.
    format
        int8, int4 or fp8: what the weights of linear layers become.
    group_size
        Input features that share a scale, for int4: 32, 64 or 128.
    method
        rtn rounds each weight to the nearest value; gptq makes up for rounding errors, for inputs like the calibration
        text's (int8 and int4). Unset: gptq if there is a calibration text.
    calibration
        A text file like what the model will read and write, at best in its chat template's form.
    calibration_tokens
        Read no more of the text than this.
    threads
        CPU threads; one per core otherwise.
    """
    chosen = method or ("gptq" if calibration else "rtn")
    _check(format, group_size, chosen, calibration)

    import torch

    from quire.models.fit import format_bytes
    from quire.models.quantization.write import Source, rounded, write_checkpoint
    from quire.models.source import resolve_model

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    directory = resolve_model(settings(EngineConfig, {}, config=config, model=model).value)
    source = Source.open(directory, format, group_size)
    if calibration is None or chosen == "rtn":
        weights = rounded(source, source.quantized)
    else:
        from quire.models.quantization.calibrate import calibrated, windows

        weights = calibrated(source, windows(source, _token_ids(calibration, directory), calibration_tokens))
    from rich.console import Console
    from rich.progress import track

    shown = track(weights, "Quantising", total=len(source.quantized), console=Console(stderr=True))
    write_checkpoint(source, out, shown)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"{out}: {format_bytes(written)}, from {format_bytes(source.checkpoint.weight_bytes)}.")


def _check(form: Format, group_size: int, method: Method, calibration: Path | None) -> None:
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"--group-size is {group_size}.", param="group_size", remedy="It must be 32, 64 or 128.")
    if method == "gptq" and calibration is None:
        raise ConfigError(
            "--method gptq has no text to calibrate with.", param="calibration", remedy="Name one with --calibration."
        )
    if method == "gptq" and form == "fp8":
        raise ConfigError("--method gptq is for int8 and int4.", param="method", remedy="Use rtn for fp8.")
    if method == "rtn" and calibration is not None:
        raise ConfigError(
            "--method rtn does not read a calibration text.", param="calibration", remedy="Leave one of them out."
        )


def _token_ids(path: Path, directory: Path) -> list[int]:
    from quire.cli.text_file import read_text
    from quire.text.tokenizer import Tokenizer

    ids = Tokenizer.load(directory).encode(read_text(path, param="calibration"), add_special_tokens=False)
    if len(ids) < FEWEST_TOKENS:
        raise ConfigError(
            f"{path} has {len(ids)} tokens.", param="calibration", remedy=f"Name a text of {FEWEST_TOKENS} at least."
        )
    return ids
