"""Fixtures of the gateway's tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def simulation() -> ModuleType:
    """`simulation.py`, which stands beside the tests and is in no package."""
    spec = importlib.util.spec_from_file_location("gateway_simulation", Path(__file__).with_name("simulation.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
