"""The Engine for GGUF files, on llama.cpp's C API (the low-level half of llama-cpp-python).

The high-level half copies the logits and runs Python per token of history: it decodes at 0.55 to 0.8 of this rate.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import struct
import time
from collections.abc import Sequence as Seq
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np

from models.adapter import Adapter, check_fits, shapes_of
from models.engine.base import WINDOW, Engine, Floats, Mix, ModelInfo, Sequence, Step, Tokenizer
from models.engine.threads import ThreadGovernor, physical_cores
from models.fingerprint import fingerprint
from models.gguf_header import check_tensors
from protocol.errors import BadAdapter, BadModelFile

log = logging.getLogger(__name__)

_KV_TYPES = {"f16": llama.GGML_TYPE_F16, "q8_0": llama.GGML_TYPE_Q8_0}
_PROMPT = 8  # tokens from which a pass is long enough to ask which cores are free
_BATCH = 256  # tokens per prefill pass: larger is hardly faster on a CPU and takes more memory


class GgufTokenizer(Tokenizer):
    """The tokenizer inside a GGUF file. `open` reads it without the weights."""

    def __init__(self, model: Any) -> None:
        self._model = model  # keeps the vocabulary's memory alive
        self._vocab = llama.llama_model_get_vocab(model)
        self.vocab = llama.llama_vocab_n_tokens(self._vocab)
        self.eog = frozenset(t for t in range(self.vocab) if llama.llama_vocab_is_eog(self._vocab, t))
        self.end_id = llama.llama_vocab_eos(self._vocab)
        self.template = _metadata(model, "tokenizer.chat_template")
        self.piece = lru_cache(maxsize=65_536)(self._piece)  # type: ignore[method-assign]

    @classmethod
    def open(cls, path: Path) -> GgufTokenizer:
        """Raises BadModelFile."""
        params = llama.llama_model_default_params()
        params.vocab_only = True
        return cls(_load(path, params))

    def _encode(self, text: str, start: bool, special: bool) -> list[int]:
        raw = text.encode()
        room = len(raw) + 8
        buffer = (llama.llama_token * room)()
        count = llama.llama_tokenize(self._vocab, raw, len(raw), buffer, room, start, special)
        return list(buffer[:count])  # never negative: a token stands for at least one byte

    def piece(self, token: int) -> bytes:  # replaced by its cached self in __init__
        return self._piece(token)

    def _piece(self, token: int, special: bool = False) -> bytes:
        buffer = (ctypes.c_char * 512)()
        count = llama.llama_token_to_piece(self._vocab, token, buffer, 512, 0, special)
        return buffer.raw[: max(0, count)]

    @cached_property
    def controls(self) -> frozenset[str]:
        attributes = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNKNOWN
        found = (t for t in range(self.vocab) if llama.llama_vocab_get_attr(self._vocab, t) & attributes)
        return frozenset(filter(None, map(self.control, found)))

    def control(self, token: int) -> str:
        return self._piece(token, special=True).decode("utf-8", "replace")

    @property
    def begin(self) -> str:
        return self._written(llama.llama_vocab_bos(self._vocab))

    @property
    def end(self) -> str:
        return self._written(self.end_id)

    def _written(self, token: int) -> str:
        return self.control(token) if token >= 0 else ""

    @cached_property
    def fingerprint(self) -> str:
        """Raises BadModelFile if the file has no vocabulary."""
        if llama.llama_vocab_type(self._vocab) == llama.LLAMA_VOCAB_TYPE_NONE:
            raise BadModelFile("the model has no vocabulary: take another file of it")
        digest = hashlib.sha256()
        for token in range(self.vocab):
            piece = self._piece(token, special=True)
            digest.update(struct.pack("<H", len(piece)) + piece)
        return digest.hexdigest()


class GgufEngine(Engine):
    """`context` cells are shared by up to `sequences` requests; `threads` 0 means every physical core.

    `hidden` makes each step also give the last hidden state; `repack` lets llama.cpp rearrange the weights for the
    CPU's matrix instructions, which speeds up long prompts on Arm and takes the model's size in memory once more.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str | None = None,
        context: int = 4096,
        sequences: int = 4,
        threads: int = 0,
        kv: str = "q8_0",
        hidden: bool = True,
        repack: bool = False,
    ) -> None:
        super().__init__(sequences, context)
        params = llama.llama_model_default_params()
        params.use_extra_bufts = repack
        self._model = _load(path, params)
        if llama.llama_model_is_recurrent(self._model) or llama.llama_model_is_hybrid(self._model):
            raise BadModelFile(f"{path}: a recurrent model, which cannot rewind: take one with attention alone")
        self.tokenizer = GgufTokenizer(self._model)
        self.info = ModelInfo(
            name=name or path.stem,
            fingerprint=fingerprint(path),
            architecture=_metadata(self._model, "general.architecture") or "unknown",
            vocab=self.tokenizer.vocab,
            width=llama.llama_model_n_embd(self._model),
            context=min(context, llama.llama_model_n_ctx_train(self._model)),
        )
        self.context = self.info.context
        self._path = path
        self._hidden = hidden
        self._governor = ThreadGovernor(threads or physical_cores())
        self._ctx = self._open_context(sequences, kv)
        self._memory = llama.llama_get_memory(self._ctx)
        self._batch = llama.llama_batch_init(_BATCH, 0, 1)
        self._views: dict[tuple[int, int], Floats] = {}
        self._loaded: dict[str, Any] = {}  # llama.cpp's handles of the attached adapters
        self._worn: Mix = ()  # what the next pass computes with

    @property
    def threads(self) -> int:
        return self._governor.count

    def _open_context(self, sequences: int, kv: str) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx = self.context + WINDOW
        params.n_batch = params.n_ubatch = _BATCH
        params.n_seq_max = params.n_outputs_max = sequences + 1
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = self._governor.limit
        params.type_k = params.type_v = _KV_TYPES[kv]
        params.no_perf = True
        context = llama.llama_init_from_model(self._model, params)
        if not context and kv != "f16":  # some architectures have no flash attention, which a quantised cache needs
            return self._open_context(sequences, "f16")
        if not context:
            raise BadModelFile(f"{self.info.name}: llama.cpp cannot make a context of {self.context} tokens for it")
        return context

    def forward(self, feeds: Seq[tuple[Sequence, Seq[int]]]) -> list[Step]:
        for sequence, tokens in feeds:
            self._check_room(sequence, len(tokens))
        # The mix that is worn already goes first: changing it costs about a third of a step.
        mixes = sorted({sequence.mix for sequence, _ in feeds}, key=lambda mix: mix != self._worn)
        if len(mixes) == 1:
            return self._forward(mixes[0], feeds)
        steps: dict[int, Step] = {}
        for mix in mixes:
            same = [feed for feed in feeds if feed[0].mix == mix]
            for (sequence, _), step in zip(same, self._forward(mix, same), strict=True):
                steps[sequence.id] = step if mix is mixes[-1] else _copy(step)
        return [steps[sequence.id] for sequence, _ in feeds]

    def _forward(self, mix: Mix, feeds: Seq[tuple[Sequence, Seq[int]]]) -> list[Step]:
        # The heads of longer feeds go first, the last tokens of all feeds together at the end. With hidden states on,
        # llama.cpp computes outputs for every token of a batch, so the last tokens then get a batch of their own.
        heads = [(sequence, token) for sequence, tokens in feeds for token in tokens[:-1]]
        lasts = [(sequence, tokens[-1]) for sequence, tokens in feeds]
        beside = 0 if self._hidden else min(len(heads), _BATCH - len(lasts))
        if len(heads) >= _PROMPT:
            self._set_threads(prompt=self._governor.for_prompt())
        usual = mix == self._worn and len(lasts) == 1 and not beside
        self._wear(mix)
        for at in range(0, len(heads) - beside, _BATCH):
            self._decode(heads[at : min(at + _BATCH, len(heads) - beside)], outputs=0)
        started = time.perf_counter()
        self._decode(heads[len(heads) - beside :] + lasts, outputs=len(lasts))
        steps = [self._step(beside + index) for index in range(len(lasts))]
        if usual:
            self._govern(time.perf_counter() - started)
        return steps

    def _wear(self, mix: Mix) -> None:
        """Makes the next passes compute with these adapters: it holds for the whole context."""
        if mix == self._worn:
            return
        handles = (llama.llama_adapter_lora_p_ctypes * len(mix))(*(self._loaded[id] for id, _ in mix))
        scales = (ctypes.c_float * len(mix))(*(scale for _, scale in mix))
        status = llama.llama_set_adapters_lora(self._ctx, handles, len(mix), scales)
        if status != 0:
            raise RuntimeError(f"llama_set_adapters_lora returned {status} for {len(mix)} adapters")
        self._worn = mix

    def _load_adapter(self, id: str, path: Path, adapter: Adapter) -> None:
        check_fits(adapter, self._shapes)
        handle = llama.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not handle:
            raise BadAdapter(f"adapter {id[:12]}: llama.cpp cannot attach it to {self.info.name}")
        self._loaded[id] = handle

    def _free_adapter(self, id: str) -> None:
        if any(id == worn for worn, _ in self._worn):
            self._wear(())
        llama.llama_adapter_lora_free(self._loaded.pop(id))
        super()._free_adapter(id)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        return shapes_of(self._path)

    def _decode(self, pairs: Seq[tuple[Sequence, int]], *, outputs: int) -> None:
        """One pass; the last `outputs` tokens give logits."""
        batch = self._batch
        batch.n_tokens = len(pairs)
        for index, (sequence, token) in enumerate(pairs):
            batch.token[index] = token
            batch.pos[index] = len(sequence.tokens)
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence.id
            batch.logits[index] = index >= len(pairs) - outputs
            sequence.tokens.append(token)
        llama.llama_set_embeddings(self._ctx, self._hidden and outputs > 0)
        status = llama.llama_decode(self._ctx, batch)
        if status != 0:
            for sequence in {sequence for sequence, _ in pairs}:
                sequence.rewind(0)
            raise RuntimeError(f"llama_decode returned {status} for {len(pairs)} tokens")

    def _step(self, index: int) -> Step:
        logits = self._view(llama.llama_get_logits_ith(self._ctx, index), self.info.vocab)
        if not self._hidden:
            return Step(logits, None)
        return Step(logits, self._view(llama.llama_get_embeddings_ith(self._ctx, index), self.info.width))

    def _view(self, pointer: Any, length: int) -> Floats:
        """The memory behind `pointer` as an array; llama.cpp reuses its output buffer, so views are kept."""
        key = (ctypes.addressof(pointer.contents), length)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = np.ctypeslib.as_array(pointer, (length,))
        return view

    def _govern(self, seconds: float) -> None:
        before = self._governor.count
        if self._governor.observe(seconds) != before:
            self._set_threads(prompt=self._governor.count)

    def _set_threads(self, prompt: int) -> None:
        """`prompt`: for passes of several tokens; steps use what the governor says."""
        llama.llama_set_n_threads(self._ctx, self._governor.count, prompt)

    def _trim(self, id: int, position: int) -> None:
        if not llama.llama_memory_seq_rm(self._memory, id, position, -1):
            raise RuntimeError(f"llama.cpp could not rewind a sequence to position {position}")

    def close(self) -> None:
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._ctx)
        for handle in self._loaded.values():  # after the context that wears them, before the model that knows them
            llama.llama_adapter_lora_free(handle)
        llama.llama_model_free(self._model)


def _copy(step: Step) -> Step:
    """The next pass overwrites what the step shows."""
    return Step(step.logits.copy(), None if step.hidden is None else step.hidden.copy())


def _load(path: Path, params: Any) -> Any:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}; `skerry models pull` fetches a model") from None
    if magic != b"GGUF":
        raise BadModelFile(f"{path}: not a GGUF file; `skerry models verify` checks what was pulled")
    check_tensors(path)
    llama.llama_log_set(_log_callback, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise BadModelFile(f"{path}: llama.cpp cannot load it: damaged, truncated or of an unknown architecture")
    return model


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _log_callback(level: int, text: bytes, _data: Any) -> None:
    if level >= 3 and log.isEnabledFor(logging.DEBUG):  # 3: warning, 4: error; the rest is chatter
        log.debug("llama.cpp: %s", text.decode("utf-8", "replace").rstrip())


def _metadata(model: Any, key: str) -> str | None:
    size = llama.llama_model_meta_val_str(model, key.encode(), None, 0)
    if size < 0:
        return None
    buffer = ctypes.create_string_buffer(size + 1)
    llama.llama_model_meta_val_str(model, key.encode(), buffer, size + 1)
    return buffer.value.decode("utf-8", "replace")
