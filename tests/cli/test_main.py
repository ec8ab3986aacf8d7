"""The command line as a whole: light, honest in its exit codes, and free of tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from quire import __version__
from quire.cli.main import BENCHMARKS, COMMANDS, main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quire", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("arguments", [["--version"], ["version"], ["version", "--json"]])
def test_the_version_is_told(arguments, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert __version__ in out
    if "--json" in arguments:
        found = json.loads(out)
        assert found["quire"] == __version__
        assert found["torch"].startswith("2.")


@pytest.mark.parametrize(
    ("arguments", "without"),
    [
        (["--version"], ["cyclopts", "asyncio", "rich", "yaml", "numpy", "torch", "importlib.metadata"]),
        (["version"], ["cyclopts", "asyncio", "rich", "yaml", "numpy", "torch"]),
        (["serve", "--help"], ["asyncio", "numpy", "torch", "transformers", "uvicorn", "zmq", "tokenizers", "aiohttp"]),
        (["serve", "--port", "none at all"], ["asyncio", "rich", "yaml", "numpy", "torch", "uvicorn", "zmq"]),
        (["bench", "serve", "--slo", "wrong"], ["torch", "transformers"]),
    ],
)
def test_a_command_imports_no_more_than_it_needs(arguments, without):
    code = (
        "import sys\n"
        "from quire.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {without!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_every_command_has_a_page_of_help(capsys):
    commands = [[name] for name in COMMANDS] + [["bench", name] for name in BENCHMARKS]
    for command in commands:
        assert main([*command, "--help"]) == 0
        assert f"Usage: quire {' '.join(command)}" in capsys.readouterr().out


def test_a_wrong_setting_ends_with_code_2_and_one_message():
    done = run("serve", "--port", "70000")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "quire: --port is 70000. It must be from 0 to 65,535.\n"


def test_an_unknown_flag_is_answered_with_the_closest_one():
    done = run("serve", "--max-modle-len", "5")
    assert done.returncode == 2
    assert "--max-model-len" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_model_is_named():
    done = run("serve", "./no-such-model")
    assert done.returncode == 2
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_variable_is_named(monkeypatch, capsys):
    monkeypatch.setenv("QUIRE_BLOCK_SIEZ", "16")
    assert main(["serve"]) == 2
    assert "QUIRE_BLOCK_SIZE" in capsys.readouterr().err


def test_a_settings_file_is_read(tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text("max_num_seqs: 0\n")
    assert main(["serve", "--config", str(path)]) == 2
    assert "max_num_seqs in" in capsys.readouterr().err
    assert main(["serve", "--config", str(path), "--max-num-seqs", "x"]) == 2
    assert "--max-num-seqs is 'x'" in capsys.readouterr().err


def test_an_interrupt_ends_quietly(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Interrupting())
    assert main(["complete", "-"]) == 130
    assert "Traceback" not in capsys.readouterr().err


class Interrupting:
    """A terminal whose user presses Ctrl-C."""

    def read(self) -> str:
        raise KeyboardInterrupt
