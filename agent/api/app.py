"""The application: routes, who may call them, and how answers and errors go out."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from aiohttp import web

from agent.adapt.collect import Collector
from agent.agent import Account, random_seed
from agent.api import schema
from agent.api.answer import Portion, portions
from agent.api.errors import describe, log_unexpected, respond
from agent.api.feedback import Feedback, Taken
from agent.api.listen import host_of, is_loopback
from agent.api.metrics import Metrics
from agent.api.render import ChatRendering, Head, Json, Rendering, TextRendering
from agent.api.sse import EventStream, stream
from agent.config import Api as ApiConfig
from agent.device import Device
from protocol.errors import AuthError, ContextFull, RequestError, UnknownModel

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_BODY_SECONDS = 30.0  # within which a request's body has to arrive
_OPEN = ("/health", "/ready")  # for probes, which carry no key


@dataclass(frozen=True, slots=True)
class ModelName:
    """`id` is what clients are told; `aliases` are accepted as well."""

    id: str
    aliases: frozenset[str]

    @classmethod
    def of(cls, configured: str, file: Path) -> ModelName:
        """`configured`: catalog id or path, as in the configuration."""
        return cls(Path(configured).name.removesuffix(".gguf"), frozenset((configured, file.stem)))

    def check(self, asked: str | None) -> None:
        """Raises UnknownModel."""
        if asked is not None and asked != self.id and asked not in self.aliases:
            raise UnknownModel(f"no model of that name here: this agent serves {self.id}")


class Api:
    """`app` is the aiohttp application. `collector` None: the device keeps no lessons."""

    def __init__(
        self,
        device: Device,
        config: ApiConfig,
        model: ModelName,
        clock: Callable[[], float] = time.time,
        collector: Collector | None = None,
    ) -> None:
        self._agent = device.agent
        self._cloud = device.cloud
        self._network = device.network
        self._key = config.key.encode()
        self._defaults = schema.Defaults(config.max_tokens, random_seed)
        self._model = model
        self._clock = clock
        self._started = int(clock())
        self._feedback = None if collector is None else Feedback(self._agent, collector)
        self.metrics = Metrics(device)
        self.app = web.Application(client_max_size=config.body_bytes, middlewares=[self._account, self._guard])
        self.app.add_routes(
            [
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/completions", self.completion),
                web.post("/v1/feedback", self.feedback),
                web.get("/v1/models", self.list_models),
                web.get("/v1/models/{id:.+}", self.show_model),
                web.get("/health", self.health),
                web.get("/ready", self.ready),
                web.get("/metrics", self.show_metrics),
            ]
        )

    @web.middleware
    async def _account(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turns errors into responses and counts how requests end."""
        resource = request.match_info.route.resource
        endpoint = resource.canonical if resource else "other"
        outcome = "cancelled"
        try:
            response = await handler(request)
            outcome = response.outcome if isinstance(response, EventStream) else "ok"
            return response
        except ConnectionError:  # the client has gone
            raise
        except Exception as error:
            failure = describe(error)
            outcome = failure.outcome
            log_unexpected(error, failure)
            return respond(failure)
        finally:
            self.metrics.request(endpoint, outcome)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in _OPEN:
            return await handler(request)
        if self._key:
            scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
            raw = sent.strip().encode("utf-8", "surrogateescape")
            if scheme.lower() != "bearer" or not hmac.compare_digest(raw, self._key):
                raise AuthError("wrong or missing API key: send `Authorization: Bearer` with the agent's api.key")
        elif not is_loopback(host_of(request.host)):
            # A web page can point a name of its own at this address and then call it as its own (DNS rebinding).
            raise web.HTTPForbidden(reason="without api.key this agent answers to localhost and 127.0.0.1 only")
        return await handler(request)

    async def chat(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, schema.chat(await _body(http), self._defaults), ChatRendering)

    async def completion(self, http: web.Request) -> web.StreamResponse:
        try:
            return await self._answer(http, schema.completion(await _body(http), self._defaults), TextRendering)
        except ContextFull as error:
            error.param = "prompt"
            raise

    async def feedback(self, http: web.Request) -> web.StreamResponse:
        raw = await _body(http)
        if self._feedback is None:
            raise RequestError("this agent keeps no lessons: that takes adapt.enabled and a model in GGUF")
        return _json(await asyncio.to_thread(self._feedback.take, raw))

    async def list_models(self, http: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [self._describe_model()]})

    async def show_model(self, http: web.Request) -> web.StreamResponse:
        self._model.check(http.match_info["id"])
        return web.json_response(self._describe_model())

    async def health(self, http: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok"})

    async def ready(self, http: web.Request) -> web.StreamResponse:
        """The model is loaded before anybody can ask. The cloud's state goes without details: no key is needed."""
        scheduler, cloud = self._agent.scheduler, self._cloud
        state = {"state": cloud.state.partition(":")[0], "breaker": cloud.breaker.state} if cloud else None
        broker = {"state": self._network.transport.state.partition(":")[0]} if self._network else None
        return web.json_response(
            status=200 if scheduler.alive else 503,
            data={
                "status": "ready" if scheduler.alive else "the engine has stopped",
                "model": self._model.id,
                "cloud": state,
                "broker": broker,
                "active": scheduler.active,
                "queued": scheduler.queued,
            },
        )

    async def show_metrics(self, http: web.Request) -> web.StreamResponse:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    def _describe_model(self) -> Json:
        info = self._agent.engine.info
        return {
            "id": self._model.id,
            "object": "model",
            "created": self._started,
            "owned_by": "skerry",
            "skerry": {
                "fingerprint": info.fingerprint,
                "architecture": info.architecture,
                "context": info.context,
            },
        }

    async def _answer(self, http: web.Request, asked: schema.Asked, style: type[Rendering]) -> web.StreamResponse:
        self._model.check(asked.model)
        fingerprint = self._agent.engine.info.fingerprint
        head = Head(secrets.token_hex(12), int(self._clock()), self._model.id, f"fp_{fingerprint[:16]}")
        rendering = style(head, self._agent.engine.tokenizer, logprobs=asked.logprobs, tokens=asked.tokens)
        events = portions(self._agent, replace(asked.request, id=head.id), self.metrics.note)
        if asked.stream:
            return await stream(http, rendering.chunks(events, include_usage=asked.include_usage))
        return await _whole(events, rendering)


async def _whole(events: AsyncGenerator[Portion | Account, None], rendering: Rendering) -> web.Response:
    said: list[Portion] = []
    async with aclosing(events) as answer:
        async for event in answer:
            if isinstance(event, Account):
                return _json(rendering.whole(said, event))
            said.append(event)
    raise AssertionError("an answer ends with its account")


async def _body(http: web.Request) -> bytes:
    """Raises RequestError, TimeoutError, HTTPRequestEntityTooLarge."""
    if http.content_type != "application/json":  # which a web page cannot send here without being allowed to
        raise RequestError("the body must be JSON, sent with Content-Type: application/json")
    async with asyncio.timeout(_BODY_SECONDS):
        return await http.read()


def _json(value: Json | Taken) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
