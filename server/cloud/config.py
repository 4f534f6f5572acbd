"""The configuration of `skerry serve`: one struct per section, read by `protocol.config.load`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from protocol.resolve import MAX_FRAME


class Listen(msgspec.Struct, frozen=True):
    host: Annotated[
        str, Meta(description="Address to listen on. Any but this machine's own needs keys: `skerry serve keys add`.")
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="TCP port; 0 takes a free one and prints it.")] = 8431
    keys_file: Annotated[
        str, Meta(description="File of the API keys' hashes; empty: serve-keys.json in the configuration folder.")
    ] = ""


class UpstreamSection(msgspec.Struct, frozen=True):
    kind: Annotated[
        Literal["embedded", "openai"],
        Meta(description="embedded: this process runs the LLM. openai: an OpenAI-compatible server does."),
    ] = "embedded"
    model: Annotated[
        str, Meta(description="embedded: the LLM: catalog id, path of a GGUF file, or of a folder with an ONNX model.")
    ] = "qwen2.5-coder-0.5b"
    context: Annotated[
        int, Meta(ge=256, le=1 << 20, description="embedded: tokens of context that all sessions share.")
    ] = 16384
    threads: Annotated[int, Meta(ge=0, le=512, description="embedded: threads; 0: one per physical core.")] = 0
    url: Annotated[
        str, Meta(description="openai: base address of the server's API, such as http://127.0.0.1:8080/v1.")
    ] = ""
    key: Annotated[str, Meta(description="openai: API key, sent as a bearer token; empty: none.")] = ""
    model_name: Annotated[str, Meta(description="openai: the model's name at that server.")] = "default"
    endpoint: Annotated[
        Literal["completions", "chat"],
        Meta(description="openai: completions, or chat for a server that completes a trailing assistant message."),
    ] = "completions"
    tokenizer: Annotated[
        str,
        Meta(
            description="openai, completions: catalog id or path of a model (GGUF, ONNX) with the server's tokenizer "
            "and chat template; prompts then travel as token ids. Empty: as text, in ChatML."
        ),
    ] = ""
    top: Annotated[
        int, Meta(ge=1, le=1024, description="openai: the most log-probabilities per token that the server gives.")
    ] = 20
    timeout_s: Annotated[float, Meta(gt=0, le=600, description="openai: seconds to wait for the server.")] = 30.0


class Limits(msgspec.Struct, frozen=True):
    connections: Annotated[int, Meta(ge=1, description="Connections open at once.")] = 256
    sessions: Annotated[
        int, Meta(ge=1, le=4096, description="Answers being written at once; embedded: at most 256.")
    ] = 8
    sessions_per_key: Annotated[int, Meta(ge=1, description="The same per API key.")] = 8
    asks_per_second: Annotated[
        float, Meta(ge=0, description="Opens and Asks per second and API key, with a burst of one second; 0: no limit.")
    ] = 100.0
    frame_bytes: Annotated[int, Meta(ge=1024, le=MAX_FRAME, description="Bytes of one message from a device.")] = (
        MAX_FRAME
    )
    prompt_tokens: Annotated[int, Meta(ge=1, description="Tokens of a prompt.")] = 4096
    answer_tokens: Annotated[int, Meta(ge=1, description="Tokens of room kept for an answer.")] = 1024
    idle_s: Annotated[float, Meta(gt=0, description="Seconds until a silent session is closed.")] = 120.0


class Drain(msgspec.Struct, frozen=True):
    seconds: Annotated[float, Meta(ge=0, description="Seconds that running sessions get to finish after SIGTERM.")] = (
        30.0
    )


class Log(msgspec.Struct, frozen=True):
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="Least severe messages logged. Prompts, tokens and keys never are."),
    ] = "info"


class ServeConfig(msgspec.Struct, frozen=True):
    listen: Listen = Listen()
    upstream: UpstreamSection = UpstreamSection()
    limits: Limits = Limits()
    drain: Drain = Drain()
    log: Log = Log()
