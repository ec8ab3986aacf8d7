"""Which dtype a model runs in. No torch here: `quire plan` asks too."""

from __future__ import annotations

from quire.core.errors import ConfigError
from quire.models.checkpoint import Checkpoint

_STORED = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SUPPORTED = ("float32", "bfloat16", "float16")


def resolve_dtype(asked: str, checkpoint: Checkpoint, device: str) -> str:
    """`auto` takes what config.json names, or else the dtype of most of the weights; float16 becomes bfloat16 on a CPU.

    Raises ConfigError for a name that is not a dtype.
    """
    if asked != "auto":
        if asked not in _SUPPORTED:
            raise ConfigError(
                f"dtype {asked!r} is not known.", param="dtype", remedy=f"Choose auto, {', '.join(_SUPPORTED)}."
            )
        return asked
    named = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")).removeprefix("torch.")
    found = named if named in _SUPPORTED else _most_common(checkpoint)
    return "bfloat16" if found == "float16" and device.startswith("cpu") else found


def _most_common(checkpoint: Checkpoint) -> str:
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        name = _STORED.get(tensor.dtype, "float32")
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
    return max(sizes, key=lambda name: sizes[name], default="float32")
