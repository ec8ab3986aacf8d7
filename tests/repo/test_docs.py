"""Every command in the documentation runs.

A page's `sh` and `python` blocks run in order, in one empty directory. A block that ends in `quire serve …` starts a
server, which lives until the next one or the end of the page. Port 8000 is replaced by a free one.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS_MORE_THAN_A_CHECKOUT = ("make serve", "pip install")
"""Blocks with these are the installation, which continuous integration does from a clean clone, or need a network."""


def blocks(page: Path) -> list[tuple[str, str]]:
    found = BLOCK.findall(page.read_text())
    return [(kind, text) for kind, text in found if not any(word in text for word in NEEDS_MORE_THAN_A_CHECKOUT)]


@pytest.fixture
def environment(tmp_path_factory) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    state = tmp_path_factory.mktemp("state")
    settings = {"QUIRE_PORT": str(port), "QUIRE_KV_CACHE_MEMORY": "0.05", "QUIRE_STATE_DIR": str(state)}
    # What conftest.py sets for the tests' own kernels is not in a reader's environment.
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return given | {"PATH": path} | settings


class Page:
    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.environment = environment
        self.server: subprocess.Popen[str] | None = None

    def run(self, kind: str, text: str) -> None:
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{self.environment['QUIRE_PORT']}")
        if kind == "python":
            self._finish([sys.executable, "-c", text])
        elif text.strip().splitlines()[-1].partition("quire serve")[1]:
            self._serve(text)
        else:
            url = f"http://127.0.0.1:{self.environment['QUIRE_PORT']}"
            text = text.replace("quire bench serve ", f"quire bench serve --url {url} ")
            self._finish(["bash", "-euo", "pipefail", "-c", text.replace("curl ", "curl --fail-with-body ")])

    def _finish(self, command: list[str]) -> None:
        done = subprocess.run(
            command,
            check=False,
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert done.stdout, command[-1]

    def _serve(self, text: str) -> None:
        self.stop()
        self.server = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line.startswith("quire serves "), (text, line)

    def stop(self) -> None:
        if self.server is not None:
            os.killpg(self.server.pid, signal.SIGTERM)
            self.server.communicate(timeout=60)

    def stop_services(self) -> None:
        """What a page has left running because it failed before its `quire down`."""
        for service in Path(self.environment["QUIRE_STATE_DIR"]).iterdir():
            subprocess.run(["quire", "down", service.name, "--now"], check=True, env=self.environment, timeout=60)


@pytest.fixture
def page(tmp_path, environment) -> Iterator[Page]:
    page = Page(tmp_path, environment)
    yield page
    page.stop()
    page.stop_services()


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path)], ids=lambda path: path.name)
def test_the_commands_of_a_page_run(path, page):
    if path.name == "README.md":
        page.run("sh", "quire serve\n")  # the README's examples talk to the server that its first block starts
    for kind, text in blocks(path):
        page.run(kind, text)


def test_links_between_pages_lead_somewhere():
    for path in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
