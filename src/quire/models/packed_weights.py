"""Packed weights that are there before torch is: from a cache on disk, or packed early.

With the cache a model that was loaded once starts again without being read, rounded and packed. One file for each
checkpoint and way of loading it, named by a digest of all that its bytes depend on. What is not certain to be right is
not used: a file that is damaged, stale or of other code is told, and made anew. No torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.config.engine import ModelImpl, Quantization
from quire.core.errors import CheckpointError, MissingFile
from quire.core.json_file import open_regular
from quire.models.arch import Arch
from quire.models.checkpoint import Checkpoint
from quire.models.dtype import resolve_dtype
from quire.models.fallback.choice import by_transformers
from quire.models.mapped_files import MappedFiles
from quire.models.parameters import Parameter, list_parameters
from quire.models.serving import DEFAULT_SERVING, Serving, identify_served
from quire.models.slots import EMBEDDING, HEAD, POOLING
from quire.ops.cpu.library import REFERENCE, kernels_module, open_backend
from quire.ops.cpu.packed_file import PackedFileFault, packed_bytes, read_packed, write_packed
from quire.ops.triton.library import TRITON

GIB = 1 << 30
SUFFIX = ".packed"

_PARTIAL_SUFFIX = ".partial"
_FORGOTTEN_SECONDS = 86_400.0
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """Where the files are, and how many bytes of them there may be: the ones that were not used for longest go."""

    directory: Path
    max_bytes: int


@dataclass(slots=True, kw_only=True)
class EarlyPacked:
    """`packed`: a model's packed weights by path, all or none. `backend` is the compiled kernels' that they were made
    for, and the one to use them with. `kept`: a file in the cache that has yet to be written."""

    backend: Any
    packed: Mapping[str, Any]
    kept: KeptWeights | None = None


class KeptWeights:
    """One model's file in the cache."""

    def __init__(self, settings: CacheSettings, checkpoint: Checkpoint, described: Mapping[str, object], backend: Any):
        self._settings = settings
        self._checkpoint = checkpoint
        self._described = described
        self._key = digest(checkpoint, described)
        self.path = settings.directory / (self._key[:32] + SUFFIX)
        self._backend = backend

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """What the file has, by path; nothing if there is none, or if anything is wrong with it."""
        try:
            with open_regular(self.path) as file:
                packed = read_packed(file, self._key, shapes, self._backend)
        except MissingFile:
            return {}
        except (PackedFileFault, CheckpointError, OSError) as error:
            _tell(f"The packed weights in {self.path} are not used, and made anew: {error}.")
            return {}
        with contextlib.suppress(OSError):  # the time of the last use; the directory may be read-only
            os.utime(self.path)
        return packed

    def keep(self, packed: Mapping[str, Any]) -> None:
        """Writes the file. Where that cannot be, it is told, and nothing else is the worse for it."""
        begin = time.monotonic()
        nbytes = packed_bytes(packed)
        try:
            if digest(self._checkpoint, self._described) != self._key:
                _tell("The checkpoint changed while it was loaded: its packed weights are not kept.")
                return
            self._settings.directory.mkdir(parents=True, exist_ok=True)
            if not self._make_room(nbytes):
                return
            self._write(packed)
        except (OSError, CheckpointError) as error:
            _tell(f"The packed weights cannot be kept in {self._settings.directory}: {error}.")
            return
        seconds = time.monotonic() - begin
        _tell(f"The packed weights are kept in {self.path} ({nbytes / GIB:.2f} GiB, written in {seconds:.1f} s).")

    def _write(self, packed: Mapping[str, Any]) -> None:
        """The file has its name when all of it is there; of two processes that write it the later one wins."""
        handle, partial = tempfile.mkstemp(suffix=_PARTIAL_SUFFIX, prefix=self._key[:32], dir=self._settings.directory)
        try:
            with open(handle, "wb") as file:
                write_packed(file, self._key, packed, self._backend)
            os.replace(partial, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise

    def _make_room(self, nbytes: int) -> bool:
        directory, limit = self._settings.directory, self._settings.max_bytes
        if nbytes > limit:
            _tell(
                f"The packed weights, {nbytes / GIB:.2f} GiB, are not kept: packed_weights_cache_size is "
                f"{limit / GIB:.2f} GiB."
            )
            return False
        files = _files(directory)
        total = sum(size for _, size, _ in files)
        for used, size, path in sorted(files):
            forgotten = path.suffix == _PARTIAL_SUFFIX and used < time.time() - _FORGOTTEN_SECONDS
            if forgotten or (total + nbytes > limit and path.suffix == SUFFIX):
                path.unlink(missing_ok=True)
                total -= size
        free = shutil.disk_usage(directory).free
        if free < nbytes:
            _tell(f"The packed weights, {nbytes / GIB:.2f} GiB, are not kept: {directory} has {free / GIB:.2f} GiB.")
            return False
        return True


def pack_early(
    cache: CacheSettings | None,
    directory: Path,
    *,
    dtype: str,
    quantization: Quantization | None,
    threads: int | None,
    isa: str | None,
    serving: Serving = DEFAULT_SERVING,
    model_impl: ModelImpl = "auto",
) -> EarlyPacked | None:
    """What the cache has for a model, or what can be packed without torch: matrices that are bfloat16 and stay so.

    None where the compiled kernels, or quire's own decoder, do not serve the model. Raises QuireError for what is wrong
    with the checkpoint or the settings, as loading it does.
    """
    if isa in (REFERENCE, TRITON) or kernels_module() is None:
        return None
    checkpoint = Checkpoint.open(directory)
    if resolve_dtype(dtype, checkpoint, "cpu") != "bfloat16" or by_transformers(checkpoint.config, model_impl):
        return None
    served = identify_served(checkpoint, serving)
    checkpoint, family, arch = served.checkpoint, served.family, served.arch
    parameters = list_parameters(checkpoint, family, arch, quantization=quantization)
    backend = open_backend(threads, isa)
    early = EarlyPacked(backend=backend, packed={})
    if cache is not None:
        described = {
            "isa": backend.isa,
            "dtype": "bfloat16",
            "quantization": quantization,
            "head": arch.lm_head,
        }
        try:
            kept = KeptWeights(cache, checkpoint, described, backend)
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be read: {error}.", param="model") from error
        early.packed = kept.read(linear_shapes(parameters, arch))
        early.kept = None if early.packed else kept
    if not early.packed:
        early.packed = _pack_plain(checkpoint, parameters, arch, backend)
    return early


def _pack_plain(checkpoint: Checkpoint, parameters: list[Parameter], arch: Arch, backend: Any) -> dict[str, Any]:
    """All matrices, if each is stored as the kernels take it; one at a time, its pages given back."""
    tensors = {parameter.path: parameter for parameter in parameters if _is_packed(parameter)}
    if arch.lm_head:
        embedding = next(parameter for parameter in parameters if parameter.path == EMBEDDING)
        tensors = {HEAD: embedding, **tensors}
    infos = {path: checkpoint.tensors.get(parameter.tensor) for path, parameter in tensors.items()}
    plain = not any(
        parameter.cut or parameter.normed or parameter.storage or parameter.scheme for parameter in parameters
    )
    if not plain or not all(
        info is not None and info.dtype == "BF16" and info.offset % 2 == 0 for info in infos.values()
    ):
        return {}
    module: Any = kernels_module()
    files = MappedFiles()
    packed: dict[str, Any] = {}
    for path, info in infos.items():
        assert info is not None
        packed[path] = module.pack_bf16(backend, files.address(info), *info.shape)
        files.drop(info)
    return packed


def linear_shapes(parameters: list[Parameter], arch: Arch) -> dict[str, tuple[int, ...]]:
    """By path, those parameters that a decoder packs; a head that is tied to the embedding is packed apart from it."""
    shapes = {parameter.path: parameter.shape for parameter in parameters if _is_packed(parameter)}
    embedding = next(parameter.shape for parameter in parameters if parameter.path == EMBEDDING)
    return {HEAD: embedding, **shapes} if arch.lm_head else shapes


def _is_packed(parameter: Parameter) -> bool:
    return len(parameter.shape) == 2 and not parameter.path.startswith(("embedding.", POOLING))


def digest(checkpoint: Checkpoint, described: Mapping[str, object]) -> str:
    """Of all that the packed weights depend on, without reading them all: of each weight file its name, size, time of
    change, header and 64 pieces of 4 KiB; config.json; how it is loaded; and the code that does that."""
    content = {
        **described,
        "code": _code_digest(),
        "config": hashlib.sha256((checkpoint.directory / "config.json").read_bytes()).hexdigest(),
        "files": [_file_digest(path) for path in checkpoint.files],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> list[object]:
    sums = hashlib.sha256()
    with open_regular(path) as file:
        found = os.fstat(file.fileno())
        prefix = file.read(8)
        left = int.from_bytes(prefix, "little")
        while left > 0 and (piece := file.read(min(left, _HASHED_AT_ONCE))):
            sums.update(piece)
            left -= len(piece)
        begin = file.tell()
        step = max(1, (found.st_size - begin) // _SAMPLES)
        for index in range(_SAMPLES):
            sums.update(os.pread(file.fileno(), min(_SAMPLE_BYTES, step), begin + index * step))
    return [path.name, found.st_size, found.st_mtime_ns, sums.hexdigest()]


def _code_digest() -> str:
    """Of quire's version, the sources that make packed weights, and the compiled kernels."""
    package = Path(__file__).parents[1]
    module: Any = kernels_module()
    sums = hashlib.sha256()
    sources = [package / "__init__.py", *package.glob("ops/**/*.py"), *package.glob("models/**/*.py")]
    for path in [*sorted(sources), Path(module.__file__)]:
        sums.update(hashlib.sha256(path.read_bytes()).digest())
    return sums.hexdigest()


def _files(directory: Path) -> list[tuple[float, int, Path]]:
    """(last use, bytes, path) of what is ours there."""
    found = []
    for path in directory.iterdir():
        if path.suffix in (SUFFIX, _PARTIAL_SUFFIX):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
    return found


def _tell(sentence: str) -> None:
    print(f"quire: {sentence}", file=sys.stderr)
