"""The benchmark of the host's loop: it measures what it says, at a small size."""

from __future__ import annotations

import zmq

from benchmarks.host_loop import PHASES, build, measure, submit


def test_every_phase_of_a_step_is_seen(tmp_path):
    engine = build(tmp_path / "model", 3, prefix_caching=True)
    with zmq.Context() as context, context.socket(zmq.PAIR) as there, context.socket(zmq.PAIR) as here:
        there.bind("inproc://wire")
        here.connect("inproc://wire")
        for turn in range(2):
            submit(engine, turn, 3, 70)
            figures = measure(engine, here, 4)
            assert set(figures) == {*PHASES, "rest", "total", "process"}
            assert all(microseconds > 0 for microseconds in figures.values()), figures
            engine.check_integrity()
