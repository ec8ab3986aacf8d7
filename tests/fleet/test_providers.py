"""Providers of other packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.core.errors import ConfigError
from quire.fleet.directory import ServiceDirectory
from quire.fleet.processes import Processes
from quire.fleet.providers import choose_provider, open_provider


def test_a_provider_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quire.providers]\nrented = elsewhere_provider:Rented\n")
    (tmp_path / "elsewhere_provider.py").write_text(
        "class Rented:\n    def __init__(self, directory): self.service = directory.name\n"
    )
    directory = ServiceDirectory(tmp_path / "state", "mine")
    directory.make()
    with pytest.raises(ConfigError, match="rented"):
        choose_provider(directory, "rented")
    assert isinstance(open_provider(directory), Processes)
    monkeypatch.syspath_prepend(tmp_path)
    choose_provider(directory, "rented")
    assert open_provider(ServiceDirectory(tmp_path / "state", "mine")).service == "mine"
