"""docs/tour.md names real things: every dotted name in it can be imported."""

import importlib
import re
from pathlib import Path

import pytest

TOUR = Path(__file__).parents[2] / "docs" / "tour.md"
NAMES = sorted(set(re.findall(r"`(quire\.[\w.]+)`", TOUR.read_text())))


def test_the_tour_names_the_walk():
    assert len(NAMES) > 25


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_the_tour_exists(name):
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return
    pytest.fail(f"nothing called {name}")


def test_the_table_of_rooms_is_the_tree():
    rooms = set(re.findall(r"^\| \d+ \| `(\w+)/`", TOUR.read_text(), re.MULTILINE))
    package = Path(importlib.import_module("quire").__file__).parent
    assert rooms == {path.parent.name for path in package.glob("*/__init__.py")} - {"assets"}
