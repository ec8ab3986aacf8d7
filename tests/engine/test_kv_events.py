"""The engine's KV events, read as any subscriber would: by ZeroMQ and msgpack's own library."""

import contextlib
import threading
import time

import msgpack
import pytest
import zmq

from quire.cache.groups import ALL_OF_THE_PAST, Sight
from quire.cache.journal import CacheJournal
from quire.cache.pool import BlockPool
from quire.config.engine import EngineConfig
from quire.config.kv_events import KVEventsConfig, read_kv_events
from quire.core.errors import ConfigError
from quire.core.prefix import ROOT, block_hash
from quire.core.request import EngineRequest
from quire.core.sampling import SamplingParams
from quire.engine import kv_publisher
from quire.engine.build import build_engine
from quire.engine.kv_publisher import KVEventPublisher
from quire.engine.pace import Pace
from quire.wire.kv_events import AllBlocksCleared, BlockRemoved


@pytest.fixture
def context():
    with zmq.Context() as context:
        yield context
        context.destroy(linger=0)


@pytest.fixture
def publish(context):
    """Makes publishers on free ports."""
    made = []

    def publish(**settings) -> KVEventPublisher:
        config = KVEventsConfig(
            **{"endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*", "topic": "kv@a@b"} | settings
        )
        made.append(KVEventPublisher(config, context, clock=lambda: 5.0))
        return made[-1]

    yield publish
    for publisher in made:
        publisher.close()


def connected(context, publisher: KVEventPublisher, topic: bytes = b"") -> zmq.Socket:
    """A subscriber that misses nothing from now on."""
    reader = context.socket(zmq.SUB)
    reader.setsockopt(zmq.RCVTIMEO, 30_000)
    reader.setsockopt(zmq.SUBSCRIBE, topic)
    reader.connect(publisher.info.endpoint)
    while not reader.poll(10):
        publisher.publish([BlockRemoved([0])])
    return reader


def replay(context, publisher: KVEventPublisher, first: bytes, kind=zmq.DEALER) -> list[list[bytes]]:
    with context.socket(kind) as asking:
        asking.setsockopt(zmq.RCVTIMEO, 30_000)
        asking.connect(publisher.info.replay_endpoint)
        asking.send_multipart([b"", first] if kind == zmq.DEALER else [first])
        answers = []
        while not answers or answers[-1][-2] != b"\xff" * 8:
            answers.append(asking.recv_multipart())
        return answers


def sequence(frame: bytes) -> int:
    return int.from_bytes(frame, "big")


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def test_batches_come_in_order_under_the_topic(publish, context):
    publisher = publish()
    with connected(context, publisher, b"kv@a@b") as reader:
        start = publisher.num_published
        for number in range(50):
            publisher.publish([BlockRemoved([1000 + number])])
        received = {}
        while start + 49 not in received:
            topic, number, payload = reader.recv_multipart()
            assert topic == b"kv@a@b"
            received[sequence(number)] = msgpack.unpackb(payload)
    assert [received[start + number] for number in range(50)] == [
        [5.0, [["BlockRemoved", [1000 + number], None, None]], 0] for number in range(50)
    ]
    assert sorted(received) == list(range(min(received), start + 50))


def test_what_was_missed_is_replayed(publish, context):
    publisher = publish(buffer_steps=10)
    for number in range(30):
        publisher.publish([BlockRemoved([number])])
    until(lambda: [sequence(a[-2]) for a in replay(context, publisher, bytes(8))][:-1] == list(range(20, 30)))
    answers = replay(context, publisher, (27).to_bytes(8, "big"))
    assert [answer[:3] for answer in answers[:-1]] == [[b"", b"kv@a@b", n.to_bytes(8, "big")] for n in (27, 28, 29)]
    assert [msgpack.unpackb(answer[3])[1][0][1] for answer in answers[:-1]] == [[27], [28], [29]]
    assert answers[-1] == [b"", b"", b"\xff" * 8, b""]
    assert len(replay(context, publisher, (30).to_bytes(8, "big"))) == 1
    assert len(replay(context, publisher, b"\xff" * 8)) == 1
    assert replay(context, publisher, (31).to_bytes(8, "big"), zmq.REQ) == [[b"", b"\xff" * 8, b""]]


def test_the_buffer_is_bounded_in_bytes(publish, context, monkeypatch):
    monkeypatch.setattr(kv_publisher, "MAX_BUFFER_BYTES", 10_000)
    publisher = publish()
    for _ in range(100):
        publisher.publish([BlockRemoved([b"x" * 60] * 10)])
    until(lambda: sequence(replay(context, publisher, (99).to_bytes(8, "big"))[0][-2]) == 99)
    answers = replay(context, publisher, bytes(8))[:-1]
    assert sum(len(answer[-1]) for answer in answers) <= 10_000
    assert 10 < len(answers) < 20


def test_requests_that_make_no_sense_are_not_answered_and_do_no_harm(publish, context):
    publisher = publish()
    publisher.publish([BlockRemoved([1])])
    with context.socket(zmq.DEALER) as asking:
        asking.connect(publisher.info.replay_endpoint)
        for frames in ([b""], [b"", b"1234567"], [b"", bytes(8), b"more"], [bytes(8)], [b"", b"x" * 4000]):
            asking.send_multipart(frames)
        until(lambda: len(replay(context, publisher, bytes(8))) == 2)
        assert not asking.poll(0)


def test_a_reader_that_does_not_read_costs_one_buffer_and_holds_nobody_up(publish, context):
    publisher = publish(buffer_steps=50, hwm=2)
    with context.socket(zmq.DEALER) as asking:
        asking.setsockopt(zmq.RCVHWM, 1)
        asking.setsockopt(zmq.RCVBUF, 4096)
        asking.connect(publisher.info.replay_endpoint)
        for _ in range(50):
            publisher.publish([BlockRemoved([b"x" * 60] * 1000)])
        for _ in range(200):
            asking.send_multipart([b"", bytes(8)])
        until(lambda: len(replay(context, publisher, (49).to_bytes(8, "big"))) == 2)


def test_what_waits_for_readers_that_do_not_read_is_bounded_for_all_together(publish, context, monkeypatch):
    """The third waits, and is served when the first two have gone."""
    monkeypatch.setattr(kv_publisher, "MAX_REPLAY_BYTES", 80_000_000)
    publisher = publish()
    for _ in range(50):
        publisher.publish([BlockRemoved([b"x" * 60] * 10_000)])  # 31 MB: more than the kernel's buffers hold

    def ask(first: int) -> zmq.Socket:
        asking = context.socket(zmq.DEALER)
        asking.setsockopt(zmq.RCVHWM, 1)
        asking.setsockopt(zmq.RCVBUF, 4096)
        asking.connect(publisher.info.replay_endpoint)
        asking.send_multipart([b"", first.to_bytes(8, "big")])
        return asking

    until(lambda: len(replay(context, publisher, (49).to_bytes(8, "big"))) == 2)
    idle = [ask(0), ask(0)]
    for one in idle:
        assert one.poll(30_000)
    third = ask(0)
    until(lambda: len(replay(context, publisher, (49).to_bytes(8, "big"))) == 2)  # a small one still has room
    until(lambda: len(publisher._asked) == 1)
    assert not third.poll(50)
    for one in idle:
        one.close(0)
    assert third.poll(30_000)
    third.close(0)
    until(lambda: not publisher._asked)


def test_no_more_requests_wait_than_so_many(publish, context, monkeypatch):
    monkeypatch.setattr(kv_publisher, "MAX_ASKED", 2)
    publisher = publish()
    monkeypatch.setattr(publisher, "_has_room", lambda *_: False)
    with contextlib.ExitStack() as closing:
        for _ in range(5):
            asking = closing.enter_context(context.socket(zmq.DEALER))
            asking.connect(publisher.info.replay_endpoint)
            for _ in range(3):
                asking.send_multipart([b"", bytes(8)])
        until(lambda: len(publisher._asked) == 2)
        one_more = closing.enter_context(context.socket(zmq.DEALER))
        one_more.connect(publisher.info.replay_endpoint)
        one_more.send_multipart([b"", bytes(8)])
        assert not one_more.poll(50)
        assert len(publisher._asked) == 2


def test_a_batch_that_cannot_be_published_is_told_and_counted_and_the_next_ones_come(publish, context, capfd):
    publisher = publish()
    for number in range(20):
        publisher.publish([BlockRemoved([number if number % 2 else {}])])  # half of them cannot be encoded
        publisher.publish([object()])
    until(lambda: publisher.num_dropped == 20)
    assert publisher.num_published == 20
    until(lambda: len(replay(context, publisher, bytes(8))) == 21)
    told = capfd.readouterr().err
    assert "batch 1 of KV events could not be published" in told
    assert told.count("could not be published") == 5


def test_a_request_that_cannot_be_answered_is_told_and_ends_nothing(publish, context, monkeypatch, capfd):
    publisher = publish()
    with monkeypatch.context() as broken:
        broken.setattr(publisher, "_has_room", lambda *_: 1 / 0)
        with context.socket(zmq.DEALER) as asking:
            asking.connect(publisher.info.replay_endpoint)
            asking.send_multipart([b"", bytes(8)])
            until(lambda: publisher._num_faults == 1)
    publisher.publish([BlockRemoved([1])])
    until(lambda: len(replay(context, publisher, bytes(8))) == 2)
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert publisher.num_dropped == 0


def test_a_publisher_whose_thread_ends_says_so_and_counts_what_is_lost(publish, monkeypatch, capfd):
    publisher = publish()
    monkeypatch.setattr(publisher, "_publish_all", lambda: 1 / 0)
    publisher.publish([BlockRemoved([1])])
    publisher._thread.join(30)
    assert not publisher._thread.is_alive()
    lost = publisher.num_dropped
    for _ in range(10):
        publisher.publish([BlockRemoved([2])])
    assert (lost, publisher.num_dropped, len(publisher._queue)) == (1, 11, 0)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_full_queue_drops_batches_and_tells_by_a_gap(publish, context, monkeypatch):
    """The thread is held at its first batch, so that the queue fills."""
    held, go = threading.Event(), threading.Event()

    def slow(batch):
        held.set()
        assert go.wait(30)
        return msgpack.packb([0, [], 0])

    monkeypatch.setattr(kv_publisher, "encode_batch", slow)
    publisher = publish(max_queue_size=3)
    publisher.publish([])
    assert held.wait(30)
    for _ in range(7):
        publisher.publish([])
    assert (publisher.num_published, publisher.num_dropped) == (4, 4)
    go.set()
    until(lambda: len(replay(context, publisher, bytes(8))) == 5)
    publisher.publish([])
    until(lambda: len(replay(context, publisher, bytes(8))) == 6)
    assert [sequence(answer[-2]) for answer in replay(context, publisher, bytes(8))[:-1]] == [0, 1, 2, 3, 8]


def test_a_port_that_is_taken_is_an_error_that_names_it(publish):
    publisher = publish()
    with pytest.raises(ConfigError, match="Address already in use") as raised:
        publish(endpoint=publisher.info.endpoint, bind=True)
    assert publisher.info.endpoint in raised.value.message
    assert raised.value.param == "kv_events_config"
    with pytest.raises(ConfigError, match="in use"):
        publish(replay_endpoint=publisher.info.replay_endpoint)


def test_an_engine_connects_to_a_subscriber_that_binds(publish, context):
    with context.socket(zmq.SUB) as reader:
        reader.setsockopt(zmq.SUBSCRIBE, b"kv@")
        port = reader.bind_to_random_port("tcp://127.0.0.1")
        publisher = publish(endpoint=f"tcp://127.0.0.1:{port}")
        while not reader.poll(10):
            publisher.publish([BlockRemoved([3])])
        assert reader.recv_multipart()[0] == b"kv@a@b"


def test_a_journal_tells_groups_apart_and_forgets_with_the_pool():
    journal = CacheJournal(2, (ALL_OF_THE_PAST, Sight(window=5), Sight(chunk=8)))
    pool = BlockPool(9, 2, sights=journal._sights, journal=journal)
    hashes = [block_hash(ROOT, [1, 2]), b"b", b"c", b"d"]
    for group in range(3):
        [block] = pool.allocate(1)
        assert pool.publish(block, hashes[1], group)
        journal.stored(group, [1, 2, 3] if group == 0 else [1, 3], hashes, list(range(8)), "salt")
    rows = journal.take()
    assert [(r.group_idx, r.kv_cache_spec_kind, r.kv_cache_spec_sliding_window) for r in rows] == [
        (0, "full_attention", None),
        *[(1, "sliding_window", 5)] * 2,
        *[(2, "chunked_local_attention", 8)] * 2,
    ]
    assert [(r.block_hashes, r.parent_block_hash, r.token_ids, r.extra_keys) for r in rows[:3]] == [
        ([b"b", b"c", b"d"], hashes[0], [2, 3, 4, 5, 6, 7], None),
        ([b"b"], hashes[0], [2, 3], None),
        ([b"d"], b"c", [6, 7], None),
    ]
    pool.release([1, 2])
    pool.allocate(8 - 1)
    assert journal.take() == [
        BlockRemoved([b"b"], "GPU", 1),
        BlockRemoved([b"b"], "GPU", 0),
    ]
    pool.reset()
    assert journal.take() == [AllBlocksCleared()]


def test_settings_are_vllms():
    assert not read_kv_events(None).enabled
    assert not read_kv_events("{}").enabled
    assert not read_kv_events('{"enable_kv_cache_events": true, "publisher": "null"}').enabled
    text = '{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:5557","topic":"kv@pod@m","hwm":7}'
    given = read_kv_events(text)
    assert (given.enabled, given.binds, given.topic, given.hwm) == (True, True, "kv@pod@m", 7)
    assert read_kv_events(given.to_json()) == given
    assert given.resolved("10.0.0.1", "10.0.0.1", 80, "m") == given
    assert not read_kv_events('{"endpoint": "tcp://router:5557"}').binds
    filled = read_kv_events("{}").resolved("0.0.0.0", "10.0.0.1", 8000, "org/model")
    assert (filled.endpoint, filled.binds, filled.topic) == ("tcp://*:5557", True, "kv@10.0.0.1:8000@org/model")
    filled = read_kv_events("{}").resolved("::1", "::1", 8000, "m")
    assert (filled.endpoint, filled.binds, filled.topic) == ("tcp://[::1]:5557", True, "kv@[::1]:8000@m")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", r"not an object but \[\]"),
        ('{"port": 1}', '"port"'),
        ('{"enable_kv_cache_events": "yes"}', 'enable_kv_cache_events in kv_events_config is "yes"'),
        ('{"bind": 1}', "bind"),
        ('{"publisher": "kafka"}', "kafka"),
        ('{"hwm": 0}', "hwm in kv_events_config is 0"),
        ('{"buffer_steps": true}', "buffer_steps"),
        ('{"max_queue_size": 1e3}', "max_queue_size"),
        ('{"endpoint": "5557"}', "endpoint"),
        ('{"replay_endpoint": 5558}', "replay_endpoint"),
        ('{"topic": 5}', "topic"),
    ],
)
def test_settings_that_are_wrong_are_named(text, named):
    with pytest.raises(ConfigError, match=named) as raised:
        read_kv_events(text)
    assert raised.value.remedy


def test_what_steps_cost():
    pace = Pace()
    assert (pace.prefill_seconds_per_token, pace.decode_seconds_per_step, pace.decode_seconds_per_sequence) == (0, 0, 0)
    for _ in range(200):
        pace.note(0, 4, 0.02)
    assert pace.decode_seconds_per_step == pytest.approx(0.02)
    assert pace.decode_seconds_per_sequence == pytest.approx(0.005)
    for _ in range(200):  # a prompt's piece, beside two that decode
        pace.note(100, 2, 0.01 + 100 * 0.001)
    assert pace.prefill_seconds_per_token == pytest.approx(0.001)
    assert pace.decode_seconds_per_step == pytest.approx(0.02)
    for _ in range(200):  # the machine has become slower
        pace.note(100, 0, 100 * 0.003)
        pace.note(0, 1, 0.03)
        pace.note(5, 5, 0.0)
    assert pace.prefill_seconds_per_token == pytest.approx(0.003, rel=0.01)
    assert pace.decode_seconds_per_step == pytest.approx(0.03, rel=0.01)


def test_an_engine_says_when_its_events_go_nowhere(checkpoints, capsys):
    events = '{"enable_kv_cache_events": true}'
    config = EngineConfig(model=str(checkpoints["llama-float32"]), kv_cache_memory=0.001, kv_events_config=events)
    engine = build_engine(config)
    assert "kv_events_config has no effect: only `quire serve` publishes events." in capsys.readouterr().err
    asked = EngineRequest(
        request_id="a",
        prompt_token_ids=range(5, 25),
        sampling=SamplingParams(seed=0, temperature=0, ignore_eos=True, max_tokens=3),
        arrival_time=time.monotonic(),
    )
    assert engine.submit(asked) is None
    while engine.has_work:
        engine.step()
    told = engine.stats()
    assert told.num_cached_blocks == 0  # 22 tokens are less than a block of 32
    assert told.prefill_seconds_per_token > 0
    assert told.decode_seconds_per_step == told.decode_seconds_per_sequence > 0
