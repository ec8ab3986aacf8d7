"""The plan of the house holds: who imports whom, and who never sees torch."""

import subprocess
import sys

import pytest

LIGHT_ROOMS = ["core", "config", "wire", "text", "cache", "sched", "serve", "fleet", "cli"]

IMPORT_ALL = """
import importlib, pkgutil, sys
room = importlib.import_module("quire." + sys.argv[1])
for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
    importlib.import_module(module.name)
heavy = {"torch", "transformers"} & set(sys.modules)
sys.exit(f"importing quire.{sys.argv[1]} loaded {heavy}" if heavy else 0)
"""


@pytest.mark.parametrize("room", LIGHT_ROOMS)
def test_a_light_room_leaves_torch_unloaded(room):
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, room], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_contracts_are_kept():
    from importlinter.cli import lint_imports

    assert lint_imports() == 0
