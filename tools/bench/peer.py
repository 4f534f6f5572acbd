"""`skerry bench peer`: how long a peer takes to answer, over a real broker on this machine.

Two processes and a broker: the asking device here, the answering one in a child (`python -m tools.bench.peer`). What is
timed is what the token loop sees: from `PeerResolver.ask` to being woken with a Reply, with the codec, the memory
lookup, the signature checks of two entries that were never seen before and the judging of their keys in between.
Questions follow each other at once; `paced_*` are some that come 50 ms apart, and find processors that have gone to
sleep and caches that others have used.
"""

from __future__ import annotations

import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.link.identity import identity
from agent.memory.key import KEY_BYTES
from agent.memory.memory import EntryMemory
from agent.peers.answer import AnswerLimits
from agent.peers.intake import IntakeLimits
from agent.peers.network import Network
from agent.peers.resolver import AskOptions, Lookup
from agent.peers.trust import Trust
from agent.resolver import Provenance, Reply, Traffic
from protocol.errors import LinkError
from protocol.memory import Entry, sign_entry
from protocol.topics import Cluster
from protocol.transport.mqtt import MqttOptions, MqttTransport
from tools.mosquitto import mosquitto
from tools.processes import Child

WIDTH = KEY_BYTES
_ALIKE = 2  # entries near each key, all of which come with an answer
_SPACE = b"bench peer......"
_TAIL = b"\x01\x02\x03\x04\x05\x06\x07\x08"
_PAUSE_SECONDS = 0.05
_WARM_UP = 50
_PACED = 100  # questions
_NO_LIMIT = 1 << 30  # nobody asks as much as a bench
_READY_SECONDS = 30.0


def measure(*, questions: int, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The object of `skerry bench peer --json`. Raises LinkError without Mosquitto."""
    with TemporaryDirectory() as folder, mosquitto(Path(folder)) as (url, _):
        times, paced = _times(url, questions, progress)
    with Child(["broker", "--port", "0"]) as broker:
        embedded, _ = _times(broker.wait_for(r"ready on (mqtt://\S+)")[1], questions // 4, progress)
    return {
        **_summary(times),
        **{f"paced_{name}": value for name, value in _summary(paced).items()},
        **{f"embedded_{name}": value for name, value in _summary(embedded).items()},
        "questions": len(times),
        "entries_per_answer": _ALIKE,
        "key_bytes": WIDTH,
    }


def _summary(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(np.array(seconds) * 1000, (50, 99))
    return {"p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3)}


def _keys(questions: int) -> NDArray[np.int8]:
    """(questions, _ALIKE, WIDTH): groups of keys that are near to each other and to no other group."""
    rng = np.random.default_rng(0)
    middle = rng.standard_normal((questions, 1, WIDTH))
    spread = middle + 0.1 * rng.standard_normal((questions, _ALIKE, WIDTH))
    return np.asarray(np.clip(spread * 40.0, -127, 127).round(), np.int8)


@contextmanager
def _device(url: str, name: str, folder: Path) -> Iterator[Network]:
    who = identity(folder / "device.key")
    with EntryMemory(folder / "memory") as memory:
        options = MqttOptions(url=url, client_id=name)
        asking = AskOptions(floor=_READY_SECONDS, cap=_READY_SECONDS, hops=0)  # nobody gives up here
        trust = Trust(who.public, bound=0.1, base=0.05)
        cluster, transport = Cluster("bench", "peer"), MqttTransport(options)
        network = Network(
            cluster,
            name,
            who,
            transport,
            memory,
            trust,
            folder,
            [_SPACE],
            lambda entry: len(entry.key) == WIDTH,
            asking=asking,
            intake=IntakeLimits(sender_burst=_NO_LIMIT),
            answering=AnswerLimits(asker_burst=_NO_LIMIT, burst=_NO_LIMIT),
        )
        network.start()
        try:
            yield network
        finally:
            network.close()


def _times(url: str, questions: int, progress: Callable[[str], None]) -> tuple[list[float], list[float]]:
    """Seconds from each question to its reply: asked one after the other, and with pauses."""
    keys = _keys(_WARM_UP + questions + _PACED)
    arguments = [url, str(len(keys))]
    with (
        Child(arguments, module="tools.bench.peer") as answerer,
        TemporaryDirectory() as folder,
        _device(url, "asker", Path(folder)) as network,
    ):
        answerer.wait_for("ready")
        deadline = time.monotonic() + _READY_SECONDS
        while not network.around.holders(_SPACE):
            if time.monotonic() > deadline:
                raise LinkError("the answering device does not show up")
            time.sleep(0.02)
        times = [_ask(network, key, 0.0) for key in keys[:-_PACED, 0]][_WARM_UP:]
        paced = [_ask(network, key, _PAUSE_SECONDS) for key in keys[-_PACED:, 0]]
    progress(f"{len(times)} questions over {url}: {_summary(times)}")
    return times, paced


def _ask(network: Network, key: NDArray[np.int8], pause: float) -> float:
    woken = threading.Event()

    def judge(entries: list[Entry]) -> Reply | None:
        """As the hit rule does: exact similarities, then a vote."""
        found = np.stack([np.frombuffer(entry.key, np.int8) for entry in entries]).astype(np.float32)
        query = key.astype(np.float32)
        lengths = np.sqrt(np.einsum("nw,nw->n", found, found) * np.einsum("w,w->", query, query))
        weights = np.exp(np.einsum("nw,w->n", found, query) / lengths)
        best = entries[int(weights.argmax())]
        return Reply([best.token], [best.p], np.empty(0, np.intp), np.empty(0, np.float32), -1.0, Provenance.PEER)

    time.sleep(pause)
    began = time.perf_counter()
    ticket = network.resolver.ask(Lookup(_SPACE, key, _TAIL, 0.9), judge, woken.set, Traffic())
    if ticket is None or not woken.wait(_READY_SECONDS) or ticket.reply is None:
        raise LinkError("a question was not answered: nothing to measure")
    return time.perf_counter() - began


def _answer(url: str, questions: int) -> None:
    """The answering device; ends with the process."""
    with TemporaryDirectory() as folder, _device(url, "answerer", Path(folder)) as network:
        who = identity(Path(folder) / "device.key")
        entries = [
            sign_entry(Entry(_SPACE, key.tobytes(), secrets.token_bytes(8), number, 0.9, 1, 0, who.public), who.sign)
            for number, key in enumerate(_keys(questions).reshape(-1, WIDTH))
        ]
        network.memory.add(entries)
        print("ready", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    _answer(sys.argv[1], int(sys.argv[2]))
