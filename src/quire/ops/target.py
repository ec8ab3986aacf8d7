"""What kernels are built for: one engine's device, dtype and threads."""

from __future__ import annotations

from functools import cached_property
from typing import Any, get_args

import torch

from quire.config.engine import Isa
from quire.core.errors import ConfigError
from quire.core.kv_format import resolve_kv_dtype
from quire.ops.cpu.library import REFERENCE, kernels_module, open_backend
from quire.ops.cpu.rounding import CpuRounding
from quire.ops.triton.launch import Launch, run
from quire.ops.triton.library import GPU_TYPES, TRITON, interprets, is_installed


class Target:
    """`threads` and `isa` concern the CPU: None takes what the machine has; see `ops.cpu.library`. `kv_cache_dtype` is
    `EngineConfig`'s. `backend`: the compiled kernels that have been opened for this engine already. `launch`: how
    Triton's are started; `shared_bytes`: what one block may have of the memory on the chip, of a GPU that is not here.
    Raises ConfigError for an `isa` of no name known, compiled kernels or not."""

    def __init__(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        threads: int | None = None,
        isa: str | None = None,
        kv_cache_dtype: str = "auto",
        backend: Any = None,
        launch: Launch = run,
        shared_bytes: int | None = None,
    ) -> None:
        if isa is not None and isa not in get_args(Isa):
            raise ConfigError(f"isa is {isa!r}.", param="isa", remedy=f"It must be one of {', '.join(get_args(Isa))}.")
        self.device = torch.device(device)
        self.dtype = dtype
        self.kv_dtype = resolve_kv_dtype(kv_cache_dtype, str(dtype).removeprefix("torch."))
        self.threads = threads
        self.isa = isa
        self.launch = launch
        self.shared_bytes = shared_bytes
        self._backend = backend

    @cached_property
    def cpu(self) -> Any:
        """The compiled kernels' thread pool and tables, shared by all ops of this engine."""
        return self._backend or open_backend(self.threads, self.isa)

    @cached_property
    def rounding(self) -> CpuRounding | None:
        """Compiled kernels that round bfloat16 weights, if they serve here."""
        return CpuRounding(self.cpu) if self.unfit_for_cpu_kernels() is None else None

    def unfit_for_cpu_kernels(self) -> str | None:
        """Why the compiled kernels cannot serve here, or None."""
        if self.dtype != torch.bfloat16:
            return f"it computes in bfloat16, not in {str(self.dtype).removeprefix('torch.')}"
        return self.unfit_for_cpu_sampling()

    def unfit_for_cpu_sampling(self) -> str | None:
        """As above, for kernels that do not mind the dtype: logits are float32 in every engine."""
        if self.device.type != "cpu":
            return f"it computes on CPUs, not on {self.device.type}"
        if self.isa in (REFERENCE, TRITON):
            return f"switched off by isa={self.isa}"
        if kernels_module() is None:
            return "this installation has no compiled kernels (it was made without a C++ compiler)"
        return None

    def unfit_for_triton(self) -> str | None:
        """Why Triton's kernels cannot serve here, or None."""
        if self.isa == REFERENCE:
            return "switched off by isa=reference"
        if not is_installed():
            return "Triton is not installed"
        if self.device.type in GPU_TYPES or self.launch is not run:
            return None
        if self.isa != TRITON:
            return f"it computes on GPUs, not on {self.device.type}"
        return None if interprets() else "on a CPU it needs the variable TRITON_INTERPRET=1"

    def unfit_for_fp8_rows(self) -> str | None:
        """As above, for products of 8-bit floats, of the kind that checkpoints have."""
        if (why := self.unfit_for_triton()) is not None or self.device.type != "cuda":
            return why
        if torch.version.hip:
            return "AMD's matrix units have other 8-bit floats (e4m3fnuz)"
        if not torch.cuda.is_available():
            return None  # what is not here is taken to be of today
        major, minor = torch.cuda.get_device_capability(self.device)
        return None if (major, minor) >= (8, 9) else f"no matrix unit for 8-bit floats (sm_{major}{minor}, from sm_89)"
