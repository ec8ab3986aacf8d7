"""Subscribers against an engine that loses, repeats and reorders its messages, dies, comes back, and lies."""

import asyncio
import contextlib
import time

import msgpack
import pytest
import zmq
import zmq.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.gateway.endpoint import Endpoint, EndpointMetrics, Pool
from quire.gateway.kv.index import KVIndex
from quire.gateway.kv.sequence import BatchSequence, Turn
from quire.gateway.kv.subscriber import KVEventSubscriber, Patience
from quire.gateway.kv.subscriptions import KVSubscriptions, PortsOf

END = b"\xff" * 8
QUICK = Patience(answer=0.5, replay=5.0, retry=0.0)


def bound(opened, address: str):
    """A socket that was closed gives its port back a moment later, by a thread of ZeroMQ's."""
    deadline = time.monotonic() + 30
    while True:
        try:
            opened.bind(address)
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE or time.monotonic() > deadline:
                raise
        else:
            return opened


class FakeEngine:
    """A publisher and a replay port on real sockets. What is said is up to the test."""

    def __init__(self, context, events="tcp://127.0.0.1:*", replay="tcp://127.0.0.1:*") -> None:
        self.publishing = bound(context.socket(zmq.XPUB), events)  # tells of who subscribes
        self.events = self.publishing.getsockopt(zmq.LAST_ENDPOINT).decode()
        self.replaying = bound(context.socket(zmq.ROUTER), replay)
        self.replay = self.replaying.getsockopt(zmq.LAST_ENDPOINT).decode()
        self.buffer: dict[int, bytes] = {}
        self.next = 0
        self.ts = 1.0
        self.with_topic = True
        self.asked: list[int] = []
        self.serving = asyncio.create_task(self.serve())

    async def subscribed(self) -> None:
        assert (await asyncio.wait_for(self.publishing.recv_multipart(), 30)) == [b"\x01"]

    def pack(self, *events) -> bytes:
        self.ts += 1
        return msgpack.packb([self.ts, list(events), 0])

    async def say(self, *events, lost=False, forgotten=False) -> int:
        number, payload = self.next, self.pack(*events)
        self.next += 1
        if not forgotten:
            self.buffer[number] = payload
        if not lost:
            await self.send(number, payload)
        return number

    async def send(self, number: int, payload: bytes, topic=b"kv@pod@model") -> None:
        await self.publishing.send_multipart([topic, number.to_bytes(8, "big"), payload])

    async def serve(self) -> None:
        while True:
            client, delimiter, first = await self.replaying.recv_multipart()
            self.asked.append(int.from_bytes(first, "big"))
            await self.answer([client, delimiter], self.asked[-1])

    async def answer(self, to, first) -> None:
        topic = [b"kv@pod@model"] if self.with_topic else []
        for number, payload in sorted(self.buffer.items()):
            if number >= first:
                await self.replaying.send_multipart([*to, *topic, number.to_bytes(8, "big"), payload])
        await self.replaying.send_multipart([*to, *topic[:1], END, b""])

    async def die(self) -> None:
        self.serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.serving
        self.publishing.close(linger=0)
        self.replaying.close(linger=0)


def stored(number: int, parent: int | None = None) -> list:
    return ["BlockStored", [number], parent, [number, number], 2]


def removed(number: int) -> list:
    return ["BlockRemoved", [number]]


def holds(index: KVIndex, *numbers: int) -> bool:
    """Whether the index knows of these blocks, and of no other."""
    return index.num_blocks == len(numbers) and all(index.lookup([n, n]) for n in numbers)


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


class Scene:
    """An engine, and an index whose subscriber hears it."""

    def __init__(self) -> None:
        self.context = zmq.asyncio.Context()
        self.index = KVIndex()
        self.tasks: list[asyncio.Task] = []
        self.engines: list[FakeEngine] = []

    async def engine(self, **places) -> FakeEngine:
        self.engines.append(FakeEngine(self.context, **places))
        return self.engines[-1]

    async def hear(self, engine: FakeEngine, replay=True, patience=QUICK) -> KVEventSubscriber:
        subscriber = KVEventSubscriber(
            "e",
            self.index,
            self.context,
            address=engine.events,
            replay_address=engine.replay if replay else None,
            patience=patience,
        )
        self.tasks.append(asyncio.create_task(subscriber.run()))
        await engine.subscribed()
        await until(lambda: subscriber.health.connected and (engine.asked or not replay))
        return subscriber

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for engine in self.engines:
            await engine.die()
        self.context.destroy(linger=0)


@pytest.fixture
async def scene():
    made = Scene()
    yield made
    await made.close()


async def test_what_is_said_is_known(scene):
    engine = await scene.engine()
    subscriber = await scene.hear(engine)
    await engine.say(stored(1), stored(2))
    await engine.say(removed(1))
    await until(lambda: subscriber.health.batches == 2)
    assert holds(scene.index, 2)
    assert subscriber.health.last_topic == "kv@pod@model"
    assert (subscriber.health.missed, subscriber.health.resyncs, subscriber.health.bad_messages) == (0, 0, 0)
    await engine.say(["AllBlocksCleared"])
    await until(lambda: subscriber.health.cleared)
    assert holds(scene.index)


@pytest.mark.parametrize("with_topic", [True, False])
async def test_who_comes_late_asks_for_what_was_said(scene, with_topic):
    engine = await scene.engine()
    engine.with_topic = with_topic
    for number in range(5):
        await engine.say(stored(number))
    await engine.say(removed(3))
    subscriber = await scene.hear(engine)
    await until(lambda: subscriber.health.batches == 6)
    assert holds(scene.index, 0, 1, 2, 4)
    assert subscriber.health.last_topic == ("kv@pod@model" if with_topic else "")
    await engine.say(stored(9))
    await until(lambda: subscriber.health.batches == 7)
    assert subscriber.health.repeated == subscriber.health.missed == subscriber.health.resyncs == 0


async def test_a_gap_is_filled(scene):
    engine = await scene.engine()
    subscriber = await scene.hear(engine)
    await engine.say(stored(1))
    await engine.say(removed(1), lost=True)
    await engine.say(stored(2), lost=True)
    await engine.say(stored(3))
    await until(lambda: subscriber.health.batches == 4)
    assert holds(scene.index, 2, 3)
    assert (subscriber.health.missed, subscriber.health.replayed, subscriber.health.resyncs) == (2, 3, 0)
    assert engine.asked[-1] == 1


async def test_a_gap_that_cannot_be_filled_is_a_resync(scene):
    """The removal is lost for ever: nothing from before it can be trusted."""
    engine = await scene.engine()
    subscriber = await scene.hear(engine)
    await engine.say(stored(1), forgotten=True)
    await engine.say(removed(1), lost=True, forgotten=True)
    await engine.say(stored(2), lost=True)
    await engine.say(stored(3))
    await until(lambda: subscriber.health.resyncs)
    await until(lambda: holds(scene.index, 2, 3))
    assert subscriber.health.resyncs == 1


async def test_a_gap_in_a_replay_is_a_resync_too(scene):
    engine = await scene.engine()
    subscriber = await scene.hear(engine)
    await engine.say(stored(1))
    await engine.say(stored(2), lost=True)
    await engine.say(removed(1), lost=True, forgotten=True)
    await engine.say(stored(3))
    await until(lambda: subscriber.health.resyncs)
    await until(lambda: holds(scene.index, 3))


@pytest.mark.parametrize("replay", [False, True])
async def test_without_a_replay_a_gap_is_a_resync(scene, replay):
    engine = await scene.engine()
    subscriber = await scene.hear(engine, replay=replay)
    await engine.say(stored(1))
    await until(lambda: holds(scene.index, 1))
    if replay:  # there is a port, but nobody answers
        engine.serving.cancel()
    await engine.say(removed(1), lost=True)
    await engine.say(stored(2))
    await until(lambda: holds(scene.index, 2))
    assert (subscriber.health.missed, subscriber.health.resyncs) == (1, 1)
    await engine.say(stored(3))
    await until(lambda: holds(scene.index, 2, 3))


async def test_repeated_and_reordered_batches_change_nothing(scene):
    engine = await scene.engine()
    subscriber = await scene.hear(engine)
    await engine.say(stored(1))
    await engine.say(removed(1))
    await engine.say(stored(2))
    for number in (2, 0, 1, 0):
        await engine.send(number, engine.buffer[number])
    await until(lambda: subscriber.health.repeated == 4)
    assert holds(scene.index, 2)
    assert subscriber.health.restarts == subscriber.health.resyncs == 0


@pytest.mark.parametrize("said", [0, 1, 3, 6])
@pytest.mark.parametrize("replay", [True, False])
async def test_another_engine_at_the_address_begins_with_nothing(scene, said, replay):
    """It has said less, as much or more than the one before: the sequence alone does not tell them apart."""
    first = await scene.engine()
    subscriber = await scene.hear(first, replay=replay)
    for number in range(3):
        await first.say(stored(number))
    await until(lambda: holds(scene.index, 0, 1, 2))
    await first.die()
    second = await scene.engine(events=first.events, replay=first.replay)
    second.ts = first.ts
    for number in range(said):
        await second.say(stored(100 + number))
    await second.subscribed()
    await until(lambda: subscriber.health.restarts + subscriber.health.resyncs)
    await second.say(stored(200))
    expected = [*range(100, 100 + said), 200] if replay else [200]
    await until(lambda: holds(scene.index, *expected))


async def test_a_connection_that_was_lost_and_came_back_loses_nothing(scene):
    """The same engine, at the same addresses: only what was said meanwhile is asked for."""
    engine = await scene.engine()
    subscriber = await scene.hear(engine)
    await engine.say(stored(1))
    await until(lambda: holds(scene.index, 1))
    engine.publishing.close(linger=0)
    await until(lambda: not subscriber.health.connected)
    await engine.say(stored(2), lost=True)
    engine.publishing = bound(scene.context.socket(zmq.XPUB), engine.events)
    await engine.subscribed()
    await until(lambda: holds(scene.index, 1, 2))
    assert subscriber.health.restarts == subscriber.health.resyncs == 0


async def test_a_new_engine_on_a_standing_connection_is_told_by_the_time(scene):
    engine = await scene.engine()
    subscriber = await scene.hear(engine)
    for number in range(3):
        await engine.say(stored(number))
    await until(lambda: holds(scene.index, 0, 1, 2))
    engine.next, engine.buffer = 0, {}
    await engine.say(stored(7), lost=True)
    await engine.say(stored(8))
    await until(lambda: holds(scene.index, 7, 8))
    assert subscriber.health.restarts == 1


HOSTILE = [
    [],
    [b"topic"],
    [b"topic", bytes(8)],
    [b"topic", b"short", b""],
    [b"topic", END, b""],
    [b"topic", bytes(8), b"", b"more"],
    [b"\xff" * 5000, b"", b"x" * 100],
]


async def test_messages_that_are_none_change_nothing(scene):
    engine = await scene.engine()
    subscriber = await scene.hear(engine)
    await engine.say(stored(1))
    for frames in HOSTILE:
        await engine.publishing.send_multipart(frames or [b""])
    await engine.say(stored(2))
    await until(lambda: subscriber.health.batches == 2)
    assert holds(scene.index, 1, 2)
    assert subscriber.health.bad_messages == len(HOSTILE)


async def test_after_a_batch_that_cannot_be_read_nothing_is_certain(scene):
    engine = await scene.engine()
    subscriber = await scene.hear(engine)
    await engine.say(stored(1))
    await engine.send(1, b"\xc1")
    engine.next = 2
    await engine.say(stored(2))
    await until(lambda: subscriber.health.batches == 2)
    assert holds(scene.index, 2)
    assert (subscriber.health.bad_messages, subscriber.health.resyncs) == (1, 1)


@pytest.mark.parametrize(
    "answers",
    [
        [[END]],
        [[b"x", b"y", b"z", b"q", b"r"]],
        [[b"kv", b"short", b"p"]],
        [[b"kv", bytes(8), b"\xc1"]],
        [[b"kv", (0).to_bytes(8, "big"), msgpack.packb([1.0, [stored(9)], 0])]] * 10,
        [[b"kv", n.to_bytes(8, "big"), msgpack.packb([1.0, [stored(9)], 0])] for n in (9, 3, 7)],
    ],
)
async def test_replays_that_lie_do_not_stop_the_hearing(scene, answers):
    engine = await scene.engine()
    subscriber = await scene.hear(engine)
    await until(lambda: engine.asked)

    async def lie(to, first):
        for frames in answers:
            await engine.replaying.send_multipart([*to, *frames])

    engine.answer = lie
    await engine.say(stored(1))
    await engine.say(stored(2), lost=True)
    await engine.say(stored(3))
    await until(lambda: subscriber.health.resyncs)
    last = subscriber.health.batches
    for _ in range(20):
        await engine.say(stored(4))
    await until(lambda: scene.index.lookup([4, 4]))
    assert subscriber.health.batches > last


async def test_what_is_no_longer_heard_is_no_longer_known(scene):
    engine = await scene.engine()
    subscriber = await scene.hear(engine)
    await engine.say(stored(1))
    await until(lambda: holds(scene.index, 1))
    scene.tasks[0].cancel()
    await asyncio.gather(*scene.tasks, return_exceptions=True)
    assert holds(scene.index)
    assert not subscriber.health.connected


def port(address: str) -> int:
    return int(address.rpartition(":")[2])


async def test_subscriptions_follow_the_pool(scene):
    """By labels, by what the metrics page said, and by the configuration."""
    one, two, three = [await scene.engine() for _ in range(3)]
    for number, engine in enumerate((one, two, three)):
        await engine.say(stored(number))
    pool = Pool()
    ports = PortsOf(events=port(three.events), replay=port(three.replay))
    subscriptions = KVSubscriptions(pool, scene.index, scene.context, ports, QUICK)
    labels = {"quire.ai/kv-events-port": str(port(one.events)), "quire.ai/kv-replay-port": str(port(one.replay))}
    pool.put(Endpoint("one", "127.0.0.1", 1, labels=labels))
    subscriptions.start()
    second = Endpoint("two", "127.0.0.1", 2)
    pool.put(second)  # by the configuration, until its metrics are read
    await until(lambda: len(scene.index.lookup([2, 2])) == 1)
    metrics = EndpointMetrics(time=0.0, kv_events_port=port(two.events), kv_replay_port=port(two.replay))
    second.metrics = metrics
    subscriptions.refresh(second)
    await until(lambda: scene.index.lookup([0, 0]) and scene.index.lookup([1, 1]))
    assert set(scene.index.lookup([0, 0])) == {"default/one"}
    assert set(scene.index.lookup([1, 1])) == {"default/two"}
    assert not scene.index.lookup([2, 2])
    assert [finding.detail for finding in subscriptions.findings()] == []
    pool.remove("default/one")
    assert not scene.index.lookup([0, 0])
    assert set(scene.index.health()) == {"default/two"}
    pool.put(Endpoint("two", "127.0.0.1", 3))  # another server by that name
    assert not scene.index.lookup([1, 1])
    await until(lambda: scene.index.lookup([2, 2]))
    await subscriptions.stop()
    assert scene.index.num_blocks == 0


async def test_an_endpoint_that_does_not_say_where_is_a_finding_beside_those_that_do(scene):
    pool = Pool()
    subscriptions = KVSubscriptions(pool, scene.index, scene.context)
    subscriptions.start()
    wrong = ("x", "0", "65536", "1234567")
    for text in wrong:
        pool.put(Endpoint(f"p{text}", "127.0.0.1", 1, labels={"quire.ai/kv-events-port": text}))
    assert subscriptions.findings() == []
    engine = await scene.engine()
    pool.put(Endpoint("e", "127.0.0.1", 2, labels={"quire.ai/kv-events-port": str(port(engine.events))}))
    await until(lambda: any(health.connected for health in scene.index.health().values()))
    await engine.say(stored(1))
    assert [(finding.endpoint, finding.status) for finding in subscriptions.findings()][-4:] == [
        (f"default/p{text}", "warn") for text in wrong
    ]
    await subscriptions.stop()


@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 100)), max_size=20))
@settings(max_examples=200, deadline=None)
def test_no_batch_is_taken_twice_and_none_is_passed_over_in_silence(heard):
    """Numbers by plain counting: each is the next one, or a gap, or has been."""
    sequence, taken, newest = BatchSequence(), [], 0.0
    for number, ts in heard:
        turn = sequence.judge(number, ts)
        if turn is Turn.NEXT:
            assert number == (taken[-1] + 1 if taken else 0)
        elif turn is Turn.FIRST:
            assert not taken
            assert number > 0
        elif turn is Turn.GAP:
            assert number > taken[-1] + 1
        elif turn is Turn.REPEATED:
            assert number <= taken[-1]
            assert ts <= newest
            continue
        else:
            assert number <= taken[-1]
            assert ts > newest
            taken.clear()
            sequence.forget()
        taken.append(number)
        newest = ts
        sequence.take(number, ts, b"%d %f" % (number, ts))
        assert sequence.is_last(number, b"%d %f" % (number, ts))
        assert not sequence.is_last(number, b"other")
