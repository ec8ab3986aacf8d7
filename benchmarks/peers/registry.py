"""The engines, by name. Standard library only: the worker looks its own up here."""

from __future__ import annotations

from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.peer import Peer
from benchmarks.peers.quire import Quire
from benchmarks.peers.transformers import Transformers
from benchmarks.peers.vllm import Vllm

PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Quire, Vllm, LlamaCpp, OpenVino, Transformers)}
