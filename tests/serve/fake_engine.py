"""An engine process that has no model: it speaks the real protocol, and its tokens are a function of the prompt.

Token i of a request is `token(prompt, seed, i)`. A prompt may carry a spell, `!name` or `!name:argument`, as text
(token ids are the bytes of the text):

    !crash:N   the process ends after N tokens of this request, once (a file in $FAKE_ENGINE_STATE remembers)
    !poison    the process ends whenever it sees this request
    !hang      the engine falls silent for ever, once
    !slow:MS   milliseconds between tokens
    !full      refused with QueueFull
    !refuse    refused with PromptTooLong
    !wait      no token before the request is cancelled
    !nan       (pooling) numbers that are none
    !none      (pooling) an end without a result

With $FAKE_ENGINE_QUEUE it refuses a request while so many are there; it tells the front end of $FAKE_ENGINE_QUEUE_TOLD
requests, and of $FAKE_ENGINE_TOKENS_TOLD tokens.
With $FAKE_ENGINE_POOLING (JSON of a `PoolingInfo`) it is a pooling model: the numbers of a result are a function of the
token ids and of what was asked for them.

$FAKE_ENGINE_STATE is a directory; `events` in it gets a line per submit and cancel. `start` in it, if there, has the
words fail, exit or slow: what the start does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq

from quire.core.errors import CheckpointError, PromptTooLong, QueueFull, QuireError
from quire.core.model_info import ModelInfo
from quire.core.pooling import Pooled, PoolingInfo
from quire.core.request import EngineOutput, EngineRequest, FinishReason, RequestTimes, TokenLogprobs
from quire.wire.rpc import Cancel, Outputs, Ready, StartFailed, Stats, Submit, decode_to_engine, encode

EOS = 257
STATE = Path(os.environ["FAKE_ENGINE_STATE"])
POOLING = os.environ.get("FAKE_ENGINE_POOLING")
QUEUE = int(os.environ.get("FAKE_ENGINE_QUEUE", "1048576"))
INFO = ModelInfo(
    max_model_len=int(os.environ.get("FAKE_ENGINE_CONTEXT", "4096")),
    vocab_size=260,
    block_size=16,
    num_blocks=100,
    eos_token_ids=(EOS,),
    dtype="float32",
    architecture="Fake",
    weight_bytes=0,
    kv_bytes_per_token=1,
    max_num_queued_reqs=int(os.environ.get("FAKE_ENGINE_QUEUE_TOLD", "1024")),
    max_num_queued_tokens=int(os.environ.get("FAKE_ENGINE_TOKENS_TOLD", "4000000")),
    num_token_types=int(os.environ.get("FAKE_ENGINE_TOKEN_TYPES", "0")),
    pooling=None if POOLING is None else msgspec.json.decode(POOLING, type=PoolingInfo),
)


def token(prompt: bytes, seed: int, index: int) -> int:
    digest = hashlib.sha256(prompt + b"|%d|%d" % (seed, index)).digest()
    return ord("a") + digest[0] % 26


def numbers(request: EngineRequest, count: int) -> list[float]:
    """From -1 to 1."""
    asked = request.pooling
    assert asked is not None
    what = [asked.task.value, asked.dimensions, asked.normalize, asked.activation, request.token_type_ids]
    seed = json.dumps([list(request.prompt_token_ids), what]).encode()
    digests = (hashlib.sha256(seed + b"|%d" % index).digest() for index in range(count))
    return [digest[0] / 128 - 1 for digest in digests]


def pool(request: EngineRequest) -> Pooled:
    info, asked = INFO.pooling, request.pooling
    assert info is not None
    assert asked is not None
    assert asked.task in info.tasks
    embeds = asked.task in ("embed", "token_embed")
    columns = (asked.dimensions or info.embedding_size) if embeds else len(info.labels) or 1
    columns = 1 if asked.task == "score" else columns
    rows = len(request.prompt_token_ids) if asked.task.startswith("token") else 1
    if b"!nan" in bytes(t for t in request.prompt_token_ids if t < 256):
        return Pooled(num_rows=rows, num_columns=columns, data=struct.pack("<f", float("nan")) * rows * columns)
    data = struct.pack(f"<{rows * columns}f", *numbers(request, rows * columns))
    return Pooled(num_rows=rows, num_columns=columns, data=data)


@dataclass
class Running:
    request: EngineRequest
    prompt: bytes
    spells: dict[str, str]
    made: int = 0
    next_at: float = 0.0
    started: float = field(default_factory=time.monotonic)


def note(*words: object) -> None:
    with (STATE / "events").open("a") as events:
        events.write(" ".join(map(str, words)) + "\n")


def first_time(name: str) -> bool:
    try:
        (STATE / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def take(request: EngineRequest) -> Running:
    prompt = bytes(t for t in request.prompt_token_ids if t < 256)
    spells = {m[1].decode(): (m[2] or b"").decode() for m in re.finditer(rb"!([a-z]+)(?::(\d+))?", prompt)}
    note("submit", request.request_id, request.tenant or "-", request.priority)
    if "poison" in spells:
        print("fake engine: poisoned", flush=True)
        os._exit(13)
    if "hang" in spells and first_time("hung"):
        while True:
            time.sleep(3600)
    return Running(request, prompt, spells)


def logprobs_of(running: Running, token_id: int) -> list[TokenLogprobs] | None:
    count = running.request.sampling.logprobs
    if count is None:
        return None
    ids = tuple([token_id, *range(ord("A"), ord("A") + count)][:count])
    return [TokenLogprobs(token_id, -0.5, 1, ids, tuple(-0.5 - i for i in range(len(ids))))]


def prompt_logprobs_of(running: Running) -> list[TokenLogprobs | None] | None:
    if running.request.sampling.prompt_logprobs is None or running.made:
        return None
    ids = running.request.prompt_token_ids
    return [None, *(TokenLogprobs(t, -1.0, 2, (ord("x"),), (-0.25,)) for t in ids[1:])]


def advance(running: Running, now: float) -> EngineOutput | None:
    request, sampling = running.request, running.request.sampling
    if "wait" in running.spells or now < running.next_at:
        return None
    if "crash" in running.spells and running.made >= int(running.spells["crash"] or 0) and first_time("crashed"):
        print("fake engine: crashing as told", flush=True)
        os._exit(9)
    if request.pooling is not None:
        times = RequestTimes(arrival=request.arrival_time, first_scheduled=running.started)
        return EngineOutput(
            request_id=request.request_id,
            finish_reason=FinishReason.STOP,
            times=times,
            pooled=None if "none" in running.spells else pool(request),
        )
    running.next_at = now + float(running.spells.get("slow", 0)) / 1000
    token_id = token(running.prompt, sampling.seed, running.made)
    if "word" in running.spells:
        word = b"the end is nigh "
        token_id = word[running.made % len(word)]
    if "eos" in running.spells and running.made == int(running.spells["eos"]):
        token_id = EOS
    prompt_logprobs = prompt_logprobs_of(running)
    running.made += 1
    reason = stop = None
    if token_id == EOS and not sampling.ignore_eos:
        reason = FinishReason.STOP
    elif token_id in sampling.stop_token_ids:
        reason, stop = FinishReason.STOP, token_id
    elif running.made >= sampling.max_tokens:
        reason = FinishReason.LENGTH
    times = RequestTimes(arrival=request.arrival_time, first_scheduled=running.started, first_token=now, last_token=now)
    return EngineOutput(
        request_id=request.request_id,
        token_ids=(token_id,),
        logprobs=logprobs_of(running, token_id),
        prompt_logprobs=prompt_logprobs,
        finish_reason=reason,
        stop_reason=stop,
        num_cached_tokens=len(request.prompt_token_ids) // 16 * 16,
        times=times if reason or running.made == 1 else None,
    )


def stats(step: int, running: int, made: int) -> Stats:
    return Stats(
        step=step,
        num_running=running,
        num_waiting=0,
        num_waiting_tokens=0,
        kv_cache_usage=0.25,
        prefix_cache_queries=10 * step,
        prefix_cache_hits=5 * step,
        num_preemptions=0,
        num_swaps=0,
        prompt_tokens=made,
        generation_tokens=made,
        iteration_tokens=(1,),
    )


def refusal(one: Running, num_running: int) -> QuireError | None:
    if "full" in one.spells or num_running >= QUEUE:
        return QueueFull("The queue is full.", remedy="Try later.", retry_after=3.2)
    return PromptTooLong("The prompt is too long for this engine.") if "refuse" in one.spells else None


def serve(socket: zmq.Socket[bytes]) -> None:
    running: dict[str, Running] = {}
    step = made = 0
    next_stats = 0.0
    while True:
        now = time.monotonic()
        if now >= next_stats:
            socket.send(encode(stats(step, len(running), made)))
            next_stats = now + 0.05
        outputs = []
        wait_ms = 1 if running else 20
        while socket.poll(wait_ms):
            wait_ms = 0
            message = decode_to_engine(socket.recv())
            if isinstance(message, Submit):
                for request in message.requests:
                    one = take(request)
                    error = refusal(one, len(running))
                    if error is not None:
                        info = error.to_info()
                        outputs.append(
                            EngineOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR, error=info)
                        )
                    else:
                        running[request.request_id] = one
            elif isinstance(message, Cancel):
                for request_id in message.request_ids:
                    note("cancel", request_id)
                    running.pop(request_id, None)
            else:
                note("stop")
                return
        for one in list(running.values()):
            output = advance(one, now)
            if output is not None:
                made += 1
                outputs.append(output)
                if output.finish_reason is not None:
                    del running[one.request.request_id]
        step += 1
        if outputs:
            socket.send(encode(Outputs(outputs)))


def leave_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def main() -> int:
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=leave_with_parent, daemon=True).start()
    start = (STATE / "start").read_text() if (STATE / "start").exists() else ""
    print("fake engine: starting", order["config"].get("model"), flush=True)
    if start == "exit":
        print("fake engine: no luck", file=sys.stderr, flush=True)
        return 3
    if start == "never":
        time.sleep(3600)
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.LINGER, 2000)
        socket.connect(f"ipc://{order['socket']}")
        if start == "fail":
            error = CheckpointError("model.safetensors is not there.", remedy="Check the path.")
            socket.send(encode(StartFailed(error.to_info())))
            return 1
        note("start", os.getpid())
        socket.send(encode(Ready(INFO, os.getpid())))
        serve(socket)
    return 0


if __name__ == "__main__":
    sys.exit(main())
