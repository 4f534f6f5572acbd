"""What leaves the device of an adapter where not all of it may: A alone, or with noise.

**A alone** (FedSA-LoRA, Guo et al. 2025, arXiv 2410.01463): A learns what all tasks share, B what is one's own. B and
the prompts' centroid stay here. A file has both factors of each matrix, so B's place is taken by zeros; it has ROWS of
them instead of d_out, so that they cost little and nobody can attach the file to the model by mistake.

**Noise** (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313): A is frozen, public, and the same on all devices, so what was
learned is linear in B, and noise on B stays noise on the mean; noise on both factors would multiply. What a device says
is the difference of all B from the agreed ones, as one vector: clipped to an L2 norm of `clip`, it differs between any
two states of the device by at most 2 * clip, and each number has Gaussian noise of standard deviation noise * clip
added. So it is the mechanism of agent/learn/noise.py, which says what that protects, and its epsilon ledger holds:
in many dimensions as in one. The number of lessons and the centroid are not told. What it costs: the noise's norm is
noise * clip * sqrt(values), so a mean is useful only over very many devices, or for small adapters.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from models.adapter import Adapter, Factors, Floats
from protocol.errors import TrainingError

ROWS = 64  # of zeros in B's place: as many as a device's rank may be
_BITS = 1 << 16


def a_alone(adapter: Adapter) -> Adapter:
    """As it may leave a device that keeps its B."""
    factors = {name: Factors(each.a, np.zeros((ROWS, each.rank), np.float32)) for name, each in adapter.factors.items()}
    return replace(adapter, factors=factors, centroid=None)


def with_a(own: Adapter, agreed: Adapter) -> Adapter:
    """The device's own adapter with the agreed A. Raises TrainingError if they do not go together."""
    factors = {}
    for name, each in own.factors.items():
        of_all = agreed.factors.get(name)
        if of_all is None or of_all.a.shape != each.a.shape:
            raise TrainingError(f"the agreed adapter has no A for {name} of this device's rank: its own stays")
        factors[name] = Factors(of_all.a, each.b)
    return replace(own, factors=factors)


def frozen_a(model: str, name: str, rank: int, width: int) -> Floats:
    """(rank, width): the A of a matrix that all devices with this model share, uniform on +-1 / sqrt(width), as float16
    holds it. Those of lower rank are its first rows."""
    drawn = hashlib.shake_256(f"skerry/1/frozen-a\0{model}\0{name}".encode()).digest(2 * rank * width)
    whole = np.frombuffer(drawn, "<u2").reshape(rank, width).astype(np.float64)
    return ((2.0 * (whole + 0.5) / _BITS - 1.0) / math.sqrt(width)).astype(np.float16).astype(np.float32)


def frozen_start(
    model: str, architecture: str, shapes: Mapping[str, tuple[int, int]], rank: int, alpha: float
) -> Adapter:
    """Where training with a frozen A begins: it changes nothing yet. `shapes`: (d_out, d_in) of the matrices."""
    factors = {
        name: Factors(frozen_a(model, name, rank, wide), np.zeros((tall, rank), np.float32))
        for name, (tall, wide) in shapes.items()
    }
    return Adapter(model, architecture, alpha, factors)


def is_frozen(adapter: Adapter) -> bool:
    """Whether it has the A that all devices share."""
    return all(
        np.array_equal(each.a, frozen_a(adapter.model, name, *each.a.shape)) for name, each in adapter.factors.items()
    )


def released(
    own: Adapter, agreed: Adapter | None, clip: float, noise: float, gauss: Callable[[int], Floats]
) -> Adapter:
    """`own` as it may be sent. `agreed`: what all know, None: nothing yet; `gauss`: so many standard normal numbers.
    Raises TrainingError if its A is not the frozen one, or `clip` or `noise` protect nothing."""
    if not (0.0 < clip < math.inf and 0.0 < noise < math.inf):
        raise TrainingError(f"clip {clip} and noise {noise} protect nothing: choose positive ones (adapt.clip, .noise)")
    if not is_frozen(own):
        raise TrainingError("the adapter was trained without a frozen A, so noise cannot protect it: train it anew")
    differences = {name: each.b - _reference(own, agreed, name, each) for name, each in own.factors.items()}
    length = math.sqrt(sum(float(np.square(each, dtype=np.float64).sum()) for each in differences.values()))
    kept = min(1.0, clip / length) if length else 1.0
    factors = {}
    for name, each in own.factors.items():
        drawn = gauss(each.b.size).reshape(each.b.shape)
        moved = kept * differences[name] + np.float32(noise * clip) * drawn
        factors[name] = Factors(each.a, (_reference(own, agreed, name, each) + moved).astype(np.float32))
    return replace(own, factors=factors, centroid=None)


def _reference(own: Adapter, agreed: Adapter | None, name: str, each: Factors) -> Floats:
    """(d_out, r): the agreed B at the scale of the device's own; zeros where nothing was agreed."""
    reference = np.zeros_like(each.b)
    known = agreed.factors.get(name) if agreed else None
    if agreed is not None and known is not None and known.b.shape[0] == each.b.shape[0]:
        both = min(known.rank, each.rank)
        scale = (agreed.alpha / known.rank) / (own.alpha / each.rank)
        reference[:, :both] = np.float32(scale) * known.b[:, :both]
    return reference


def secret_gauss(count: int, random: Callable[[int], bytes] = os.urandom) -> Floats:
    """Standard normal numbers that nobody can guess (Box and Muller 1958). `random`: bytes fit for keys."""
    pairs = (count + 1) // 2
    uniform = (np.frombuffer(random(16 * pairs), "<u8").reshape(2, pairs) >> 11) + 0.5
    radius = np.sqrt(-2.0 * np.log(uniform[0] / (1 << 53)))
    angle = uniform[1] * (2.0 * np.pi / (1 << 53))
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].astype(np.float32)
