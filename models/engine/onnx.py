"""The Engine for ONNX model folders, on onnxruntime alone.

It runs decoders with a cache of keys and values, as Optimum (`text-generation-with-past`) and onnxruntime-genai's
builder export them. All that a step reads and writes is memory that was bound to the session beforehand, so a step
copies no cache through Python and allocates nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from models.engine.base import WINDOW, Engine, Floats, ModelInfo, Sequence, Step
from models.engine.hf_tokenizer import HfTokenizer
from models.engine.onnx_cache import Cache, GrownCache, SharedCache
from models.engine.threads import physical_cores
from models.fingerprint import fingerprint
from models.hf_config import read_config
from models.model_folder import Decoder, check_folder, check_tokenizer
from protocol.errors import BadModelFile, ConfigError

log = logging.getLogger(__name__)

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""Execution providers by our name, best first."""

_CHUNK = 256  # tokens per prefill pass
_LOGITS = 64 << 20  # bytes; a graph that gives logits for every token gets passes no longer than fits here


class OnnxEngine(Engine):
    """`context` cells are shared by up to `sequences` requests; `threads` 0 means every physical core.

    `hidden` makes each step also give the last hidden state; `providers` names execution providers by preference,
    () means the best that there are. Raises BadModelFile, UnsafePath, ConfigError.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str | None = None,
        context: int = 4096,
        sequences: int = 4,
        threads: int = 0,
        hidden: bool = True,
        providers: Seq[str] = (),
    ) -> None:
        super().__init__(sequences, context)
        decoder = check_folder(path)
        check_tokenizer(path, decoder.vocab)
        if hidden and not decoder.hidden:
            raise BadModelFile(
                f"{path}: the model gives no hidden states, which the memory needs: `skerry models export` makes one "
                "that does, or set memory.enabled = false"
            )
        config = read_config(path)
        self.tokenizer = HfTokenizer(path, decoder.vocab)
        self.context = min(context, config.context or context)
        self.info = ModelInfo(
            name=name or path.name,
            fingerprint=fingerprint(path),
            architecture=config.architecture,
            vocab=decoder.vocab,
            width=decoder.width or 0,
            context=self.context,
        )
        self._decoder = decoder
        self._hidden = hidden
        self._threads = threads or physical_cores()
        self._session, self._provider = _open_session(path / "model.onnx", self._threads, decoder, providers)
        self._caches = [self._cache(self.context) for _ in self._pool] + [self._cache(WINDOW)]
        self._chunk = _CHUNK if decoder.last_only else max(1, min(_CHUNK, _LOGITS // (4 * decoder.vocab)))
        self._allocate(sequences + 1)

    def _cache(self, cells: int) -> Cache:
        if not self._decoder.shared:
            return GrownCache(self._decoder, cells, self._session)
        return SharedCache(self._decoder, cells, self._session, "cpu" if self._provider == "cpu" else "cuda")

    def _allocate(self, rows: int) -> None:
        """What every pass reads and writes beside the cells: one row of results for each feed of a `forward`."""
        vocab, width = self.info.vocab, self.info.width
        self._ids = np.zeros(self._chunk, np.int64)
        self._positions = np.arange(max(self.context, WINDOW), dtype=np.int64)
        self._mask = np.ones(max(self.context, WINDOW), np.int64)
        self._logits = np.zeros((rows, vocab), np.float32)
        self._states = np.zeros((rows, width), np.float32)
        # A pass of several tokens writes here, and its last token's part is copied to the row.
        self._many_logits = np.zeros((1 if self._decoder.last_only else self._chunk, vocab), np.float32)
        self._many_states = np.zeros((self._chunk, width), np.float32)

    @property
    def threads(self) -> int:
        return self._threads

    @property
    def provider(self) -> str:
        """The execution provider that the model runs on: cpu, cuda or tensorrt."""
        return self._provider

    def forward(self, feeds: Seq[tuple[Sequence, Seq[int]]]) -> list[Step]:
        for sequence, tokens in feeds:
            self._check_room(sequence, len(tokens))
        return [self._feed(row, sequence, tokens) for row, (sequence, tokens) in enumerate(feeds)]

    def _feed(self, row: int, sequence: Sequence, tokens: Seq[int]) -> Step:
        for at in range(0, len(tokens), self._chunk):
            part = tokens[at : at + self._chunk]
            try:
                self._pass(row, self._caches[sequence.id], len(sequence.tokens), part)
            except Exception as error:  # onnxruntime has a class of its own for each of its states
                sequence.tokens.extend(part)
                sequence.rewind(0)
                raise RuntimeError(f"onnxruntime failed on {len(part)} tokens: {error}") from None
            sequence.tokens.extend(part)
        return Step(self._logits[row], self._states[row] if self._hidden else None)

    def _pass(self, row: int, cache: Cache, past: int, tokens: Seq[int]) -> None:
        """Reads the tokens; what the model says after the last of them is in the row."""
        new = len(tokens)
        logits, states = (self._logits[row], self._states[row]) if new == 1 else (self._many_logits, self._many_states)
        self._ids[:new] = tokens
        cache.bind(past, new)
        self._bind_in(cache, "input_ids", self._ids, new)
        self._bind_in(cache, "attention_mask", self._mask, past + new)
        if self._decoder.position_ids:
            self._bind_in(cache, "position_ids", self._positions[past:], new)
        self._bind_out(cache, "logits", logits, 1 if self._decoder.last_only else new)
        if self._decoder.hidden:
            self._bind_out(cache, "hidden_states", states, new)
        self._session.run_with_iobinding(cache.binding)
        if new > 1:
            self._logits[row] = logits[0 if self._decoder.last_only else new - 1]
            self._states[row] = states[new - 1]

    def _bind_in(self, cache: Cache, name: str, values: NDArray[np.int64], count: int) -> None:
        cache.binding.bind_input(name, "cpu", 0, np.int64, (1, count), values.ctypes.data)

    def _bind_out(self, cache: Cache, name: str, values: Floats, count: int) -> None:
        cache.binding.bind_output(name, "cpu", 0, np.float32, (1, count, values.shape[-1]), values.ctypes.data)

    def _trim(self, id: int, position: int) -> None:
        sequence = self._reader if id == self._reader.id else self._pool[id]
        self._caches[id].trim(len(sequence.tokens), position)

    def close(self) -> None:
        del self._caches, self._session


def _open_session(path: Path, threads: int, decoder: Decoder, wanted: Seq[str]) -> tuple[Any, str]:
    """On the first provider that takes the model. Raises ConfigError, BadModelFile."""
    unknown = set(wanted) - PROVIDERS.keys()
    if unknown:
        raise ConfigError(
            f"model.providers: {', '.join(sorted(unknown))} is unknown; there are: {', '.join(PROVIDERS)}"
        )
    there = set(onnxruntime.get_available_providers())
    names = [name for name in (*(wanted or PROVIDERS), "cpu") if PROVIDERS[name] in there]
    if not decoder.shared and names[0] != "cpu":
        log.warning("%s: a cache that grows by copying is kept in the CPU's memory, so the model runs there", path)
        names = ["cpu"]
    for name in wanted:
        if name not in names:
            log.warning("model.providers: this onnxruntime has no %s; it has: %s", name, ", ".join(sorted(there)))
    for name in names[: names.index("cpu")]:
        try:
            return _session(path, threads, names[names.index(name) :]), name
        except BadModelFile as error:
            log.warning("%s does not run on %s, so the next one is tried: %s", path, name, error)
    return _session(path, threads, ["cpu"]), "cpu"


def _session(path: Path, threads: int, providers: Seq[str]) -> Any:
    names = [PROVIDERS[name] for name in providers]
    try:
        return onnxruntime.InferenceSession(path, session_options(threads), providers=names)
    except Exception as error:  # it has a class of its own for each of its states
        raise BadModelFile(f"{path}: onnxruntime cannot load it: {str(error).strip().splitlines()[0][:300]}") from None


def session_options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions
    # Waiting threads that spin hold up whatever else the device runs, and win an eighth of speed where nothing does.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
