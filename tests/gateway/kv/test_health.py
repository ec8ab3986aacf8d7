"""What `quire doctor` makes of KV events that do nothing: each silent failure has its words."""

import pytest

from quire.cli.gateway_checks import read_kv_status
from quire.gateway.kv.health import FEWEST_QUERIES, Expected, KVHealth, diagnose
from quire.gateway.kv.route import KVStatus

WELL = {
    "address": "tcp://10.0.0.1:5557",
    "connected": True,
    "batches": 10,
    "events": 20,
    "stored": 30,
    "last_topic": "kv@10.0.0.1:8000@model",
    "block_size": 16,
    "queries": 100,
    "matches": 5,
}
KNOWN = Expected(block_size=16, models=frozenset({"model", "alias"}), requests=50)


def said(known=KNOWN, **fields) -> list[tuple[str, str]]:
    findings = diagnose({"default/e": KVHealth(**(WELL | fields))}, {"default/e": known})
    assert all(finding.endpoint == "default/e" and finding.remedy for finding in findings)
    return [(finding.status, finding.detail) for finding in findings]


def test_nothing_is_said_when_all_is_well():
    assert said() == []
    assert diagnose({}) == []
    [check] = read_kv_status(KVStatus({"e": KVHealth(**WELL)}, [], 30, 20, 100))
    assert (check.status, "30 blocks (20 different)" in check.detail) == ("ok", True)


@pytest.mark.parametrize(
    ("status", "words", "fields"),
    [
        ("fail", "Nothing answers at tcp://10.0.0.1:5557", {"connected": False}),
        ("fail", "though 50 prompts came meanwhile", {"batches": 0, "stored": 0, "last_topic": ""}),
        ("warn", "names the model 'other', but it serves alias, model", {"last_topic": "kv@h:1@other"}),
        ("warn", "blocks of 32 tokens, its metrics say 16", {"block_size": 32}),
        ("warn", "none of 100 prompts began with one", {"matches": 0}),
        ("warn", "3 messages and 4 events made no sense", {"bad_messages": 3, "bad_events": 4}),
        ("fail", "see only part of the past", {"skipped": 9, "stored": 0}),
        (
            "warn",
            "7 batches were lost, and what was known given up 2 times",
            {"missed": 9, "replayed": 2, "resyncs": 2},
        ),
        ("warn", "20 blocks follow on blocks", {"orphans": 20}),
    ],
)
def test_each_failure_has_its_words(status, words, fields):
    [(found, detail)] = said(**fields)
    assert found == status
    assert words in detail


def test_what_may_pass_is_not_said():
    assert said(last_topic="") == []
    assert said(last_topic="kv-events") == []
    assert said(matches=0, queries=FEWEST_QUERIES - 1) == []
    assert said(missed=5, replayed=5, resyncs=0) == []
    assert said(known=Expected(), block_size=99, last_topic="kv@h:1@other") == []
    [(status, detail)] = said(known=Expected(), batches=0, stored=0, queries=3)
    assert (status, "so far" in detail) == ("warn", True)
    [(status, detail)] = said(known=Expected(), batches=0, stored=0)
    assert (status, "100 prompts" in detail) == ("fail", True)
    [(status, _)] = said(known=Expected(requests=0), batches=0, stored=0)
    assert status == "warn"
