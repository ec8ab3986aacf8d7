"""quire beside its peers on one machine: the same workloads, in turns, each engine at its best.

`python -m benchmarks.peers --help`, from the root of the repository; the page is docs/benchmarks.md. The walk:
`__main__` reads the command; `measure` takes the turns; a turn is asked of a `process.Worker` (an engine in its own
environment, which runs `worker`) or sent to a `process.Server` by `online`; `report` turns the records into tables,
ratios and a picture. A peer is one file, a subclass of `peer.Peer`.
"""
