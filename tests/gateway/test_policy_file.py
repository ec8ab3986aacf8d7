"""A policy that changes while the gateway runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.core.errors import ConfigError
from quire.gateway.policy_file import PolicyFile
from quire.gateway.traffic.policy import Policy


def write(path: Path, active: str) -> None:
    routes = [{"name": name, "targets": [{"model": name}]} for name in ("blue", "green")]
    spec = {"model": "chat", "routes": routes, "active": active}
    document = {"apiVersion": "quire.ai/v1alpha1", "kind": "TrafficPolicy", "metadata": {"name": "t"}, "spec": spec}
    fresh = path.with_suffix(".new")  # as editors and operators save: whole, by renaming
    fresh.write_text(json.dumps(document))
    fresh.rename(path)


def twice(followed: PolicyFile) -> None:
    """A change is read when the next look finds it as it was."""
    followed.look()
    followed.look()


def test_what_is_saved_holds_and_what_is_wrong_does_not(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    write(path, "blue")
    heard: list[Policy] = []
    followed = PolicyFile(path, changed=heard.append)
    assert followed.read()
    assert followed.policy.traffic["chat"].active == "blue"
    twice(followed)
    assert heard == []
    write(path, "green")
    twice(followed)
    assert [policy.traffic["chat"].active for policy in heard] == ["green"]
    write(path, "red")
    twice(followed)
    path.unlink()
    twice(followed)
    assert followed.policy.traffic["chat"].active == "green"
    write(path, "blue")
    twice(followed)
    assert heard[-1].traffic["chat"].active == "blue"


def test_a_file_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    write(path, "blue")
    heard: list[Policy] = []
    followed = PolicyFile(path, changed=heard.append)
    followed.read()
    twice(followed)
    with path.open("w") as stream:  # empty, which is a policy of nothing
        followed.look()
        stream.write("# green")
        stream.flush()
        followed.look()
    write(path, "green")
    followed.look()
    assert followed.policy.traffic["chat"].active == "blue"
    assert heard == []
    followed.look()
    assert [policy.traffic["chat"].active for policy in heard] == ["green"]


def test_at_the_start_a_wrong_file_is_an_error(tmp_path: Path) -> None:
    assert not PolicyFile(None).read()
    with pytest.raises(ConfigError, match="No such file"):
        PolicyFile(tmp_path / "none").read()
    write(tmp_path / "policy.yaml", "red")
    with pytest.raises(ConfigError, match="'red', the active one"):
        PolicyFile(tmp_path / "policy.yaml").read()
