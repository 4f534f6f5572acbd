"""The agent's configuration: sections and keys, with what they mean (docs/configuration.md is made from this)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import platformdirs
from msgspec import Meta

from agent.learn.goals import Bound, Fixed, Goal, Price, Share
from agent.uncertainty import Measure
from protocol.resolve import Mode

URL = r"^$|^(https?|wss?)://(\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+)(:[0-9]{1,5})?(/\S*)?$"
NAME = r"^[A-Za-z0-9_.-]{1,64}\Z"
BROKER = r"^$|^mqtts?://(\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+)(:[0-9]{1,5})?/?$"


class Model(msgspec.Struct, frozen=True):
    name: Annotated[
        str, Meta(description="the SLM: catalog id, path of a GGUF file, or of a folder with an ONNX model")
    ] = "smollm2-135m"
    engine: Annotated[
        Literal["auto", "gguf", "onnx"],
        Meta(description="gguf: llama.cpp runs it; onnx: onnxruntime; auto: by what `model.name` is"),
    ] = "auto"
    providers: Annotated[
        list[Literal["tensorrt", "cuda", "cpu"]],
        Meta(description="onnx: execution providers by preference; empty: the best that there is, in this order"),
    ] = msgspec.field(default_factory=list)
    context: Annotated[int, Meta(ge=128, le=1_048_576, description="tokens that all running requests share")] = 4096
    sequences: Annotated[int, Meta(ge=1, le=64, description="requests that are served at once")] = 4
    threads: Annotated[int, Meta(ge=0, le=256, description="most threads to use; 0: one per physical core")] = 0
    kv: Annotated[
        Literal["q8_0", "f16"], Meta(description="gguf: type of the context's cells; q8_0 takes half the memory")
    ] = "q8_0"
    repack: Annotated[
        bool, Meta(description="gguf: rearrange the weights for the CPU: faster prompts on Arm, twice the memory")
    ] = False


class Policy(msgspec.Struct, frozen=True):
    measure: Annotated[Measure, Meta(description="how uncertainty is measured")] = "entropy"
    threshold: Annotated[
        float, Meta(ge=0.0, le=1.0, description="ask for help when u is above it; learning starts from here")
    ] = 0.25
    goal: Annotated[
        Literal["price", "share", "bound", "fixed"],
        Meta(description="what the threshold is learned for; fixed: it stays as it is"),
    ] = "price"
    price: Annotated[
        float,
        Meta(gt=0.0, lt=1.0, description="goal price: ask when the LLM would reject the draft at least so probably"),
    ] = 0.3
    share: Annotated[float, Meta(gt=0.0, lt=1.0, description="goal share: of the tokens that the cloud is asked")] = 0.1
    bound: Annotated[
        float,
        Meta(gt=0.0, lt=1.0, description="goal bound: most of the tokens that are kept and that the LLM would change"),
    ] = 0.05
    confidence: Annotated[
        float, Meta(ge=0.5, lt=1.0, description="goal bound: the probability with which it holds")
    ] = 0.95
    audit: Annotated[
        float,
        Meta(
            ge=0.0,
            le=1.0,
            description="share of the other tokens that is asked all the same, to learn from; none without `learn`",
        ),
    ] = 0.01
    learn: Annotated[bool, Meta(description="keep a ledger of what was asked (no text) and learn from it")] = True


class Rounds(msgspec.Struct, frozen=True):
    enabled: Annotated[bool, Meta(description="send the learned threshold to the edge when it calls a round")] = True
    secure: Annotated[bool, Meta(description="take part only in rounds whose edge learns the sum alone")] = False
    clip: Annotated[
        float, Meta(gt=0.0, le=1.0, description="with noise: most by which the sent threshold differs from the agreed")
    ] = 0.1
    noise: Annotated[
        float, Meta(ge=0.0, le=1000.0, description="standard deviation of the noise that is added, times clip; 0: none")
    ] = 0.0
    epsilon: Annotated[
        float, Meta(ge=0.0, description="with noise: stop taking part when so much privacy is spent; 0: never")
    ] = 0.0
    delta: Annotated[float, Meta(gt=0.0, lt=0.1, description="the delta that epsilon is counted at")] = 1e-5


class Cloud(msgspec.Struct, frozen=True):
    url: Annotated[
        str, Meta(pattern=URL, description="of `skerry serve`, e.g. http://cloud.example:8431; empty: no cloud")
    ] = ""
    key: Annotated[str, Meta(description="API key for it")] = ""
    mode: Annotated[Mode, Meta(description="what a reply does: the LLM's token, verified draft, or both fused")] = (
        "take"
    )
    weight: Annotated[
        Annotated[float, Meta(ge=0.0, le=1.0)] | Literal["adaptive"],
        Meta(description="weight of the SLM in mode fuse; adaptive: by how sure both sides are"),
    ] = 0.5
    deadline_ms: Annotated[int, Meta(ge=1, le=600_000, description="how long a step may wait for a reply")] = 500
    ahead: Annotated[
        int, Meta(ge=0, le=256, description="tokens drafted behind an open question; 0: wait for each reply")
    ] = 32
    in_flight: Annotated[int, Meta(ge=1, le=64, description="questions of one answer under way at once")] = 8
    burst: Annotated[int, Meta(ge=0, le=64, description="tokens that the LLM may write on after an answer")] = 0
    top: Annotated[int, Meta(ge=1, le=1000, description="log-probabilities of the LLM that come with an answer")] = 16


class Device(msgspec.Struct, frozen=True):
    fleet: Annotated[str, Meta(pattern=NAME, description="the fleet that this device belongs to")] = "home"
    cluster: Annotated[str, Meta(pattern=NAME, description="the devices around one edge broker")] = "main"
    name: Annotated[
        str, Meta(pattern=rf"^\Z|{NAME}", description="unique in the fleet; empty: made from the device's key")
    ] = ""
    folder: Annotated[
        str, Meta(description="where its key, memory and outbox are kept; empty: the user's data folder")
    ] = ""


class Memory(msgspec.Struct, frozen=True):
    enabled: Annotated[bool, Meta(description="keep what was resolved, and look there first")] = True
    megabytes: Annotated[int, Meta(ge=1, le=1 << 20, description="most that it takes on disk, index included")] = 128
    days: Annotated[int, Meta(ge=1, le=36_500, description="running time after which an entry goes")] = 180
    wrong_bound: Annotated[
        float,
        Meta(gt=0.0, lt=1.0, description="share of reused tokens that may differ from what the LLM would say"),
    ] = 0.1
    audit: Annotated[
        float, Meta(ge=0.0, le=1.0, description="share of hits that the cloud is asked about all the same")
    ] = 0.05


class Peers(msgspec.Struct, frozen=True):
    broker: Annotated[
        str, Meta(pattern=BROKER, description="MQTT broker, mqtt://host:1883 or mqtts://host:8883; empty: no peers")
    ] = ""
    username: Annotated[str, Meta(description="for the broker; empty: the device's name, if there is a password")] = ""
    password: Annotated[str, Meta(description="for the broker")] = ""
    ca: Annotated[str, Meta(description="file of the authority that signed the broker's certificate")] = ""
    certificate: Annotated[str, Meta(description="file of this device's certificate for the broker")] = ""
    key: Annotated[str, Meta(description="file of that certificate's private key")] = ""
    share: Annotated[bool, Meta(description="give to peers what was learned, and answer their questions")] = True
    unshared: Annotated[list[str], Meta(description="spaces that are never shared, by id (`skerry memory stats`)")] = (
        msgspec.field(default_factory=list)
    )
    ask: Annotated[bool, Meta(description="ask peers when the own memory has no answer")] = True
    deadline_ms: Annotated[int, Meta(ge=1, le=10_000, description="longest wait for peers; learned below it")] = 50
    hops: Annotated[int, Meta(ge=0, le=4, description="neighbouring clusters that a question may cross")] = 1


class Adapt(msgspec.Struct, frozen=True):
    enabled: Annotated[
        bool, Meta(description="keep lessons, and use the adapters that are learned from them (GGUF)")
    ] = True
    megabytes: Annotated[int, Meta(ge=1, le=1 << 20, description="most that lessons take on disk")] = 64
    days: Annotated[int, Meta(ge=1, le=36_500, description="running time after which a lesson goes")] = 90
    train: Annotated[bool, Meta(description="train by itself when the device is idle (needs the extra `train`)")] = True
    lessons: Annotated[int, Meta(ge=8, le=1_000_000, description="new lessons after which it trains again")] = 64
    idle_s: Annotated[float, Meta(ge=0.0, le=86_400.0, description="seconds without a request before it trains")] = 60.0
    celsius: Annotated[float, Meta(ge=30.0, le=120.0, description="no training at this temperature or above")] = 75.0
    busy: Annotated[
        float, Meta(gt=0.0, le=1.0, description="no training while others use more than this share of the processors")
    ] = 0.5
    memory_mb: Annotated[
        int, Meta(ge=0, le=1 << 24, description="most that training may take; 0: half of what is free")
    ] = 0
    rank: Annotated[int, Meta(ge=0, le=64, description="of the adapters; 0: the largest that fits memory and time")] = 0
    step_s: Annotated[
        float, Meta(gt=0.0, le=600.0, description="rank 0: most seconds that a training step may take")
    ] = 10.0
    threads: Annotated[int, Meta(ge=0, le=256, description="of training; 0: one per physical core")] = 0
    mix: Annotated[int, Meta(ge=1, le=8, description="adapters that one request may mix; 1: the nearest alone")] = 1
    near: Annotated[
        float, Meta(ge=-1.0, le=1.0, description="cosine to an adapter's prompts below which it is not used")
    ] = 0.65
    share: Annotated[
        Literal["all", "a", "none"],
        Meta(description="what the edge's rounds get of the own adapter: all, only the A matrices, nothing"),
    ] = "all"
    clip: Annotated[float, Meta(gt=0.0, le=1e6, description="with noise: most by which what is sent has moved")] = 1.0
    noise: Annotated[
        float, Meta(ge=0.0, le=1000.0, description="standard deviation of the noise that is added, times clip; 0: none")
    ] = 0.0
    epsilon: Annotated[
        float,
        Meta(ge=0.0, le=1e6, description="with noise: privacy that may be spent, then nothing is sent; 0: no limit"),
    ] = 0.0
    delta: Annotated[float, Meta(gt=0.0, lt=1.0, description="with which epsilon is meant")] = 1e-5


class Privacy(msgspec.Struct, frozen=True):
    detect: Annotated[
        Literal["off", "redact", "local"],
        Meta(description="personal data in a request: not looked for, hidden from cloud and peers, or all stays here"),
    ] = "redact"
    regions: Annotated[
        list[str], Meta(description="countries whose phone numbers are known without +, such as GB, DE")
    ] = msgspec.field(default_factory=lambda: ["GB", "US"])


class Api(msgspec.Struct, frozen=True):
    host: Annotated[str, Meta(description="address to listen on; other than loopback needs api.key")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535, description="port to listen on; 0: any free one")] = 8430
    key: Annotated[str, Meta(description="clients must send it as `Authorization: Bearer`; empty: none")] = ""
    queue: Annotated[int, Meta(ge=0, le=1024, description="requests that may wait for a place")] = 16
    max_tokens: Annotated[int, Meta(ge=1, le=1_048_576, description="length of an answer if not asked for")] = 256
    body_bytes: Annotated[int, Meta(ge=1024, le=1 << 30, description="largest request body")] = 1 << 20


class Log(msgspec.Struct, frozen=True):
    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="what is logged; never prompts or tokens")
    ] = "info"


class AgentConfig(msgspec.Struct, frozen=True):
    model: Model = Model()
    policy: Policy = Policy()
    cloud: Cloud = Cloud()
    device: Device = Device()
    memory: Memory = Memory()
    peers: Peers = Peers()
    rounds: Rounds = Rounds()
    adapt: Adapt = Adapt()
    privacy: Privacy = Privacy()
    api: Api = Api()
    log: Log = Log()


def goal(policy: Policy) -> Goal:
    """What is configured, as learning takes it."""
    match policy.goal:
        case "price":
            return Price(policy.price)
        case "share":
            return Share(policy.share)
        case "bound":
            return Bound(policy.bound, policy.confidence)
        case "fixed":
            return Fixed(policy.threshold)


def device_folder(config: AgentConfig) -> Path:
    """Where the device's key, memory and outbox are kept."""
    named = config.device.folder
    return Path(named).expanduser() if named else platformdirs.user_data_path("skerry") / "device"
