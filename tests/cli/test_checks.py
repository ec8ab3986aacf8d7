"""`quire doctor`: each check on what it looks at."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from quire.cli.checks import cgroup_cpus, check_port, run_checks
from quire.cli.main import main
from quire.ops.cpu.library import usable_isas
from quire.ops.triton.library import is_installed


@pytest.mark.parametrize(("text", "cpus"), [("max 100000", None), ("150000 100000", 1.5), ("", None), ("x", None)])
def test_a_share_of_cores(tmp_path: Path, text, cpus):
    path = tmp_path / "cpu.max"
    path.write_text(text)
    assert cgroup_cpus(path) == cpus
    assert cgroup_cpus(tmp_path / "none") is None


def test_a_port_that_is_taken_is_told_with_a_remedy():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        taken = check_port("127.0.0.1", port)
    assert (taken.status, "--port" in taken.remedy) == ("warn", True)
    assert check_port("127.0.0.1", port).status == "ok"


def test_a_check_that_breaks_fails_alone():
    checks = run_checks("no such host", 80, ask_model=False)
    by_name = {check.name: check for check in checks}
    assert by_name["port"].status == "fail"
    assert by_name["python"].status == "ok"
    assert all(check.remedy for check in checks if check.status != "ok")


def test_the_report_as_json(capsys):
    assert main(["doctor", "--json", "--no-model", "--port", "0"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert {"python", "torch", "memory", "cores", "disk", "port", "kernels"} <= {
        check["name"] for check in report["checks"]
    }


def test_a_failed_check_gives_exit_code_1(capsys):
    assert main(["doctor", "--no-model", "--host", "no such host"]) == 1
    assert "fail" in capsys.readouterr().out


def test_kernels_of_another_instruction_set(capsys, monkeypatch):
    assert main(["kernels", "--json", "--dtype", "bfloat16", "--isa", "reference"]) == 0
    asked = capsys.readouterr().out
    monkeypatch.setenv("QUIRE_ISA", "reference")
    assert main(["kernels", "--json", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == asked
    lines = json.loads(asked)["kernels"]["bfloat16"]
    assert {line["implementation"] for line in lines} == {"reference"}
    assert "switched off" in next(line["reason"] for line in lines if line["op"] == "linear") or not usable_isas()


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_kernels_of_a_gpu_are_listed_without_one(capsys, device):
    assert main(["kernels", "--json", "--device", device]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == device
    lines = {line["op"]: line for line in report["kernels"]["bfloat16"]}
    assert {line["implementation"] for line in lines.values()} <= {"triton", "reference"}
    served = "triton" if is_installed() else "reference"
    assert lines["rms_norm"]["implementation"] == served
    assert "not cpu: it computes on CPUs" in lines["linear"]["reason"]


def test_a_device_that_nobody_knows(capsys):
    assert main(["kernels", "--device", "tpu"]) == 2
    assert "cuda:N" in capsys.readouterr().err


def test_an_instruction_set_that_nobody_knows(capsys):
    assert main(["kernels", "--isa", "avx9"]) != 0
    assert "avx512_bf16" in capsys.readouterr().err


def test_kernels_are_listed_with_reasons(capsys):
    assert main(["kernels", "--json", "--dtype", "float32"]) == 0
    lines = json.loads(capsys.readouterr().out)["kernels"]["float32"]
    assert {"attention", "linear", "rms_norm"} <= {line["op"] for line in lines}
    assert all(line["implementation"] and line["reason"] for line in lines)


def test_the_whole_way_works_on_the_built_in_model(capsys):
    assert main(["doctor", "--json", "--port", "0"]) == 0
    (model,) = [check for check in json.loads(capsys.readouterr().out)["checks"] if check["name"] == "model"]
    assert model["status"] == "ok"
    assert "42" in model["detail"]
