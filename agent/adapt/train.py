"""Training an adapter: from lessons to the factors of a few matrices, the model itself untouched.

The order of the lessons is a function of seed and epoch, and nothing else is drawn after the start, so a run that was
killed and goes on from its checkpoint ends with the very bits of one that was not (one machine, equal threads).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice

import msgspec
import numpy as np
import torch

from agent.adapt.below import Below
from agent.adapt.checkpoint import Checkpoint
from agent.adapt.factors import Trained, beginning
from agent.adapt.hardware import ROWS
from agent.adapt.lesson import Lesson, encode
from agent.adapt.losses import sparse_kl
from agent.adapt.prepare import Example, prepare, with_kept
from agent.adapt.recipe import Progress, Recipe, Stage
from agent.adapt.torch_model import Base, distributions, grouped, states, states_all
from models.adapter import Adapter
from models.rss import rss
from protocol.errors import TrainingError

__all__ = ["Base", "Progress", "Recipe", "distributions", "states", "states_all", "train"]

_CLIP = 1.0  # norm of the gradient
_BAD = 8  # steps without a finite gradient after which training stops
_WINDOW = 8  # batches whose lessons are sorted by length together

Tell = Callable[[Progress], None]


def train(
    base: Base,
    lessons: Sequence[Lesson],
    recipe: Recipe,
    start: Adapter | None = None,
    checkpoint: Checkpoint | None = None,
    tell: Tell = lambda progress: None,
    clock: Callable[[], float] = time.monotonic,
) -> Adapter:
    """An adapter for `base`, starting from `start` or from no change at all.

    Goes on from `checkpoint` if that holds the state of a run with the same lessons, recipe, model and start; it is
    left in place, for whoever uses the adapter to clear. Raises TrainingError: no lesson can be learned from, no
    memory left, or the loss stays without a finite value (the checkpoint then holds the last good state).
    """
    with _enough_memory():
        made = prepare(base, lessons, recipe)
        run = _Run(base, recipe, len(lessons) - len(made), _steps(len(made), recipe), tell, clock)
        made = with_kept(base, made, recipe, lambda: run.told("reading"))
        trained = Trained(beginning(base, recipe, start), recipe)
        with base.changed(trained.lows):
            below = Below(base, trained.lows)
            run.go(made, trained, below, checkpoint, _digest(base, lessons, recipe, start))
    return Adapter(base.fingerprint, base.architecture, recipe.alpha, trained.factors())


class _Run:
    def __init__(
        self, base: Base, recipe: Recipe, left_out: int, steps: int, tell: Tell, clock: Callable[[], float]
    ) -> None:
        self._base = base
        self._recipe = recipe
        self._left_out = left_out
        self._steps = steps
        self._tell = tell
        self._clock = clock
        self._begun = clock()
        self._resumed = 0
        self._step = 0
        self._seen = 0
        self._loss = math.nan
        self._bad = 0

    def go(
        self, made: Sequence[Example], trained: Trained, below: Below, checkpoint: Checkpoint | None, digest: str
    ) -> None:
        if checkpoint and (stored := checkpoint.load(digest)):
            self._step = self._resumed = stored[0]
            self._bad = int(stored[1]["bad"])
            trained.restore(stored[1])
        self._begun = self._clock()
        order = batches([len(example.tokens) for example in made], self._recipe)
        for batch in islice(order, self._step, self._steps):
            good = self._learn([made[index] for index in batch], trained, below)
            self._step += 1
            self._seen += len(batch)
            self.told("training")
            if checkpoint and good and (self._step % checkpoint.every == 0 or self._step == self._steps):
                checkpoint.save(digest, self._step, trained.state() | {"bad": np.array(self._bad)})
        self.told("done")

    def _learn(self, batch: Sequence[Example], trained: Trained, below: Below) -> bool:
        """One step; without effect, and at half the rate from now on, if the gradient is not finite."""
        trained.forget_gradients()
        self._loss = gradients(self._base, batch, self._recipe, below)
        norm = trained.norm()
        if not (math.isfinite(self._loss) and math.isfinite(norm)):
            self._bad += 1
            if self._bad >= _BAD:
                raise TrainingError(
                    f"training stopped: {self._bad} steps had no finite loss or gradient; try a lower rate than "
                    f"{self._recipe.rate:g}, or other lessons"
                )
            return False
        rate = self._recipe.rate * (1 - self._step / self._steps) * 0.5**self._bad
        trained.update(rate, min(1.0, _CLIP / (norm + 1e-6)))
        return True

    def told(self, stage: Stage) -> None:
        took = max(1e-9, self._clock() - self._begun)
        left = took / max(1, self._step - self._resumed) * (self._steps - self._step)
        rate, held = self._seen / took, rss() / (1 << 20)
        self._tell(Progress(stage, self._step, self._steps, self._loss, rate, left, held, self._left_out))


def gradients(base: Base, batch: Sequence[Example], recipe: Recipe, below: Below) -> float:
    """Adds the gradient of the batch's mean loss to the leaves; the loss, in nats.

    Logits exist for ROWS positions at a time: their gradient by the hidden state is taken at once, and goes down
    through the model when all are done.
    """
    loss = 0.0
    for group in grouped([len(example.tokens) for example in batch], recipe.tokens):
        parts = [batch[index] for index in group]
        h = base.through(below.states(parts), below.first, len(base.layers))
        rows = torch.tensor([row for row, part in enumerate(parts) for _ in part.positions])
        states = base.final(h[rows, torch.from_numpy(np.concatenate([part.positions for part in parts]))])
        ids, p, weights = _targets(parts, len(batch))
        cut = states.detach().requires_grad_()
        for at in range(0, len(cut), ROWS):
            here = slice(at, at + ROWS)
            part = (weights[here] * sparse_kl(base.logits(cut[here]), ids[here], p[here])).sum()
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        states.backward(cut.grad)  # type: ignore[no-untyped-call]
    return loss


def _targets(parts: Sequence[Example], lessons: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k = max(part.ids.shape[1] for part in parts)
    more = [((0, 0), (0, k - part.ids.shape[1])) for part in parts]
    ids = np.concatenate([np.pad(part.ids, pad, constant_values=-1) for part, pad in zip(parts, more, strict=True)])
    p = np.concatenate([np.pad(part.p, pad) for part, pad in zip(parts, more, strict=True)])
    weights = np.concatenate([part.weights for part in parts]) / lessons
    return torch.from_numpy(ids), torch.from_numpy(p), torch.from_numpy(weights.astype(np.float32))


def batches(lengths: Sequence[int], recipe: Recipe) -> Iterator[list[int]]:
    """Indices of lessons, epoch after epoch without end. Within a window of a few batches lessons of like length come
    together, so that little is padded."""
    for epoch in count():
        random = np.random.default_rng([recipe.seed, epoch])
        order = random.permutation(len(lengths)).tolist()
        made = []
        for at in range(0, len(order), _WINDOW * recipe.batch):
            window = sorted(order[at : at + _WINDOW * recipe.batch], key=lambda index: lengths[index])
            made += [window[at : at + recipe.batch] for at in range(0, len(window), recipe.batch)]
        for index in random.permutation(len(made)).tolist():
            yield made[index]


def _steps(lessons: int, recipe: Recipe) -> int:
    return max(1, round(recipe.epochs * math.ceil(lessons / recipe.batch)))


def _digest(base: Base, lessons: Sequence[Lesson], recipe: Recipe, start: Adapter | None) -> str:
    digest = hashlib.sha256(msgspec.json.encode([base.fingerprint, str(base.dtype), torch.get_num_threads(), recipe]))
    digest.update(encode(lessons))
    if start:
        digest.update(np.float64(start.alpha).tobytes())
        for name, factors in sorted(start.factors.items()):
            digest.update(name.encode() + factors.a.tobytes() + factors.b.tobytes())
    return digest.hexdigest()


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise TrainingError(_NO_MEMORY) from None
    except RuntimeError as error:  # what torch makes of a failed allocation
        if "alloc" not in str(error) and "memory" not in str(error):
            raise
        raise TrainingError(_NO_MEMORY) from None


_NO_MEMORY = "there is not enough memory to train: lower adapt.rank, or raise adapt.memory_mb"
