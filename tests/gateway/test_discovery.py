"""Endpoints from lists, files and DNS, and the pool that follows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.core.errors import ConfigError
from quire.gateway.discovery import Discovery, DnsName, EndpointsFile, UrlList, endpoint_of_url
from quire.gateway.endpoint import Pool


def write(path: Path, *entries: dict[str, object]) -> None:
    path.write_text(json.dumps({"endpoints": entries}))  # JSON is YAML


def keys(pool: Pool) -> list[str]:
    return sorted(endpoint.key for endpoint in pool)


async def test_the_pool_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(
        "endpoints:\n- {name: vllm-0, address: 10.0.0.1, port: '8000', labels: {llm-d.ai/role: decode}}\n"
        "- {name: vllm-1, address: '::1', port: 8001, namespace: other}\n"
    )
    pool = Pool()
    source = EndpointsFile(path)
    discovery = Discovery(pool, [source, UrlList("http://127.0.0.1:9000, https://models.example")])
    await discovery.start()
    try:
        assert keys(pool) == [
            "default/127.0.0.1-9000",
            "default/models.example-443",
            "default/vllm-0",
            "other/vllm-1",
        ]
        assert pool.get("other/vllm-1").url == "http://[::1]:8001"  # type: ignore[union-attr]
        kept = pool.get("default/vllm-0")
        write(path, {"name": "vllm-0", "address": "10.0.0.1", "port": 8000, "labels": {"quire.ai/state": "draining"}})
        discovery.reconcile(source, await source.read())
        assert keys(pool) == ["default/127.0.0.1-9000", "default/models.example-443", "default/vllm-0"]
        assert pool.get("default/vllm-0") is kept
        assert kept is not None
        assert kept.draining
        assert await source.read() is None
    finally:
        await discovery.stop()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"name": "a", "address": "10.0.0.1", "port": "99999"}, "has the port '99999'"),
        ({"name": "a", "address": "10.0.0.1\r\nHost: x", "port": 1}, "has the address"),
        ({"name": "../a", "address": "10.0.0.1", "port": 1}, "cannot be an endpoint's name"),
        ({"name": "a", "address": "10.0.0.1", "port": 1, "scheme": "file"}, "the scheme 'file'"),
        ({"name": "a", "address": "10.0.0.1"}, "missing required field `port`"),
        ({"name": "a", "address": "10.0.0.1", "port": 1, "lables": {}}, "unknown field `lables`"),
    ],
)
async def test_a_wrong_file_is_refused_at_the_start_and_passed_over_later(
    tmp_path: Path, entry: dict[str, object], words: str
) -> None:
    path = tmp_path / "endpoints.yaml"
    write(path, entry)
    with pytest.raises(ConfigError, match=words):
        await Discovery(Pool(), [EndpointsFile(path)]).start()


async def test_what_is_no_file_or_names_an_endpoint_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    with pytest.raises(ConfigError, match="No such file"):
        await Discovery(Pool(), [EndpointsFile(path)]).start()
    one = {"name": "a", "address": "10.0.0.1", "port": 1}
    write(path, one, one)
    with pytest.raises(ConfigError, match="two endpoints 'default/a'"):
        await Discovery(Pool(), [EndpointsFile(path)]).start()
    path.write_text("a: &a [1,2]\nb: [*a,*a]\n")
    with pytest.raises(ConfigError, match="aliases"):
        await Discovery(Pool(), [EndpointsFile(path)]).start()
    path.write_text("[" * 10_000)
    with pytest.raises(ConfigError, match=r"nested deeper|not YAML"):
        await Discovery(Pool(), [EndpointsFile(path)]).start()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:y", "http://a b", "http://x/v1"])
def test_wrong_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the address"):
        endpoint_of_url(url)


async def test_a_name_that_resolves_is_an_endpoint_per_address() -> None:
    endpoints = await DnsName("localhost:8000").read()
    assert {endpoint.host for endpoint in endpoints} <= {"127.0.0.1", "::1"}
    assert endpoints
    with pytest.raises(ConfigError, match="not a name and a port"):
        await DnsName("localhost").read()
