"""Which device is taken, and in which words one is refused."""

import pytest
import torch

from quire.core.errors import ConfigError
from quire.engine import device as device_module
from quire.engine.device import device_fault, memory_for, resolve_device

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@no_gpu
def test_without_a_gpu_auto_is_the_cpu_and_silent(capsys):
    assert resolve_device("auto") == torch.device("cpu") == resolve_device("cpu")
    assert capsys.readouterr().err == ""


@no_gpu
def test_a_gpu_that_torch_cannot_use_is_told_of(capsys, monkeypatch, tmp_path):
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr("quire.core.machine._GPU_FILES", (str(tmp_path / "nvidiactl"),))
    assert resolve_device("auto") == torch.device("cpu")
    told = capsys.readouterr().err
    assert "there is a GPU, but" in told
    assert torch.__version__ in told or "finds none" in told


@no_gpu
@pytest.mark.parametrize("asked", ["cuda", "cuda:3", "xpu"])
def test_a_device_that_is_not_there_is_refused_with_the_reason(asked):
    with pytest.raises(ConfigError, match=asked) as caught:
        resolve_device(asked)
    assert caught.value.param == "device"
    assert "--device cpu" in caught.value.remedy


def test_one_gpu_too_many_is_refused(monkeypatch):
    monkeypatch.setattr(device_module, "_trouble", lambda kind: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="torch sees 2"):
        resolve_device("cuda:2")


def test_what_a_gpu_says_is_put_into_words():
    out = device_fault(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB."))
    assert "Tried to allocate 20.00 MiB." in out
    assert "--memory-utilization" in out
    lost = device_fault(RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be..."))
    assert "unspecified launch failure" in lost
    assert device_fault(RuntimeError("shapes cannot be multiplied")) is None
    assert device_fault(ValueError("CUDA error")) is None


def test_the_host_has_memory():
    assert memory_for(torch.device("cpu")) > 2**20
