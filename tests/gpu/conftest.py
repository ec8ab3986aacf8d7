"""Everything here needs a GPU, and says so where there is none."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quire.core.errors import ConfigError
from quire.engine.device import resolve_device


def missing() -> str | None:
    """Why nothing here can run, or None."""
    try:
        return None if resolve_device("cuda").type == "cuda" else "no GPU"
    except ConfigError as error:
        return error.message
    except UserWarning as error:  # by torch, of a driver that it cannot work with
        return str(error)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here, why = Path(__file__).parent, missing()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            # torch and the libraries below it have things to say on a GPU that are not our faults.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if why is not None:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def calls() -> ModuleType:
    """How each op's kernel is called, from the tests of implementations on a CPU."""
    path = Path(__file__).parents[1] / "ops" / "test_implementations.py"
    spec = importlib.util.spec_from_file_location("calls_of_implementations", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
