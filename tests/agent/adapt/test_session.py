"""What a training begins with."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from agent.adapt.noise import frozen_start
from agent.adapt.session import Session, recipe_of
from agent.adapt.store import FLEET, OWN, AdapterStore
from agent.config import Adapt
from models.adapter import Factors, write
from tests.agent.adapt.adapters import MODEL, small_file
from tests.agent.adapt.test_service import LIMITS, Canned
from tests.agent.adapt.toy import toy_lessons


def test_with_a_frozen_a_training_begins_with_what_was_agreed_or_anew(tmp_path: Path) -> None:
    store, supervisor = AdapterStore(tmp_path / "adapters", MODEL), Canned()

    def frozen(scale: float) -> Path:
        start = frozen_start(MODEL, "llama", {"blk.0.attn_q": (16, 16)}, 2, 4.0)
        factors = {name: Factors(f.a, f.b + np.float32(scale)) for name, f in start.factors.items()}
        write(replace(start, factors=factors), tmp_path / f"{scale}.gguf")
        return tmp_path / f"{scale}.gguf"

    def start() -> str:
        with closing(Session(tmp_path / "adapters", Path("m"), store, supervisor, LIMITS)) as training:
            training.learn(toy_lessons(80), recipe_of(Adapt(noise=1.0)))
        (_, given, _) = supervisor.jobs[-1]
        assert given.recipe is not None
        assert given.recipe.freeze_a
        return given.start

    assert not recipe_of(Adapt()).freeze_a
    store.commit(OWN, store.add(small_file(tmp_path, 1), "own").id, "with another A")
    assert start() == "", "what noise cannot protect is no beginning"
    own = store.add(frozen(0.1), "own")
    store.commit(OWN, own.id, "as if trained")
    assert start() == str(store.path(own.id))
    agreed = store.add(frozen(0.2), "fleet")
    store.commit(FLEET, agreed.id, "agreed")
    assert start() == str(store.path(agreed.id))
