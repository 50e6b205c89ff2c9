# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The product scores and deals natively where it can, and chooses what it chooses without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.dealing.cold_tier import ColdTier
from deltamem_vllm.dealing.dealer import Dealer
from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.dealing.prior import HeadPrior
from deltamem_vllm.dealing.rater import Rater, Ratings
from deltamem_vllm.dealing.tables import PageTables
from deltamem_vllm.memory.plans import CompactionPlan, Probe
from deltamem_vllm.ops import deal_pages, native
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.inputs import make_layout
from deltamem_vllm.scoring import paged
from deltamem_vllm.scoring.base import Scorer, ScoreView
from deltamem_vllm.scoring.delta import DeltaScorer
from deltamem_vllm.scoring.features import feature_widths
from deltamem_vllm.scoring.registry import load_scorer
from deltamem_vllm.scoring.window import ObservationWindow

LAYERS, HEADS, GROUP, SIZE, DIM, WINDOW = 3, 2, 2, 16, 8, 5
SINK, RECENT = 2, 5
SCORERS = ("delta", "tova", "snapkv", "predictor", "predictor-tova", "distinct", "keydiff")


class Request:
    """A request of 200 tokens, its dealer and its window."""

    def __init__(self, name: str, bits: int = 0, layout: str = "keys_transposed", redundancy: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(2)
        level = torch.rand(LAYERS, 1, HEADS, 1, 1, generator=generator)
        memory = torch.randn(LAYERS, 60, HEADS, SIZE, 2 * DIM, generator=generator) * (level + 0.1)
        self.pool = PagePool(list(memory))
        self.tables = PageTables(self.pool, max_rows=1, max_width=60, fixed=False, cold=bits > 0)
        self.layout = make_layout(layout, SIZE, DIM)
        self.mover = DealtPages(self.layout)
        self.window = ObservationWindow(
            WINDOW, 1, WINDOW, [(HEADS * GROUP, DIM)] * LAYERS, torch.float32, torch.device("cpu")
        )
        self.window.begin_step(["r"], [193], [7], 7)
        for ring in self.window.rings:
            ring.copy_(torch.randn(ring.shape, generator=generator) * 3)
        self.scorer = load_scorer(name)
        if self.scorer.learned is not None:
            features = sum(feature_widths(DIM, DIM))
            self.scorer.bind(torch.randn(LAYERS, HEADS, features, generator=generator) * 0.2)
        cold = ColdFormat(bits, DIM, SIZE * 2 * DIM * 4) if bits else None
        scales = [0.3, 0.5, 0.5]
        self.rater = Rater(self.tables, self.mover, scales, self.window, redundancy, 0, cold)
        tier = None if cold is None else ColdTier(cold, 0.1, self.pool, self.layout)
        prior = HeadPrior(torch.rand(LAYERS, HEADS, 16, generator=generator).sort(2, descending=True).values)
        self.dealer = Dealer(self.tables, self.mover, self.rater, prior, tier)
        self.cold = bits > 0

    def plan(self, source: range, target: range, resident: int, serial: int) -> CompactionPlan:
        return CompactionPlan(
            "r", tuple(source), tuple(target), tuple(target), resident, len(target) * SIZE, 300, 0, 0, SINK, RECENT,
            self.scorer.name, "global", serial, in_place=False, cold=self.cold,
        )  # fmt: skip

    def ratings(self, resident: int, source: range) -> Ratings:
        pages, lengths = self.tables.source("r", source, resident)
        return self.rater.rate("r", pages, lengths, self.scorer)


def torch_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(paged, "_RATES", {})
    patch.setattr(deal_pages, "_library_for", lambda tensor: None)


def twice(name: str, bits: int = 0, **options: Any) -> list[list[Tensor]]:
    """What both versions rate and keep of a prompt, and then of more tokens, with pairs of different lengths."""
    found = []
    for version in ("native", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            if version == "torch":
                torch_only(patch)
            request = Request(name, bits, **options)
            steps = [(range(13), range(20, 25), 200), ((range(20, 29)), range(40, 44), 5 * SIZE + 60)]
            results: list[Tensor] = []
            for serial, (source, target, resident) in enumerate(steps, 1):
                ratings = request.ratings(resident, source)
                results += [ratings.hot, *([] if ratings.cold is None else [ratings.cold])]
                if ratings.seen is not None:
                    results += [ratings.seen.directions, ratings.seen.values, torch.tensor(ratings.seen.count)]
                results.append(request.dealer.run(request.plan(source, target, resident, serial), request.scorer).hot)
                results.append(request.tables.requests["r"].counts)
                if not bits and request.scorer.comparable:
                    assert len(results[-1].unique()) > 1, "pairs of different lengths are what this is about"
            found.append(results)
    return found


@pytest.mark.parametrize("layout", ["keys_transposed", "slot_major"])
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", SCORERS)
def test_both_versions_rate_and_keep_the_same(name, bits, layout):
    """Scores that differ by rounding only, and for these numbers the same tokens, twice over."""
    ours, torchs = twice(name, bits, layout=layout)
    for step, (a, b) in enumerate(zip(ours, torchs, strict=True)):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5, msg=f"result {step}")
        else:
            assert torch.equal(a, b), f"result {step}"


class Recording:
    """The library; remembers which of its functions were asked for."""

    def __init__(self, library: Any) -> None:
        self.library, self.called = library, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.called.add(name)
        return getattr(self.library, name)


@pytest.mark.parametrize("name", SCORERS)
def test_compactions_and_probes_use_the_library(monkeypatch, name):
    recording = Recording(native.library())
    monkeypatch.setattr(native, "library", lambda: recording)
    request = Request(name)
    monkeypatch.setattr(request.mover, "read", None)  # nothing is copied together to be scored
    request.dealer.run(request.plan(range(13), range(20, 25), 200, 1), request.scorer)
    by_window = request.scorer.needs_queries
    assert recording.called >= {
        "deltamem_page_utility" if by_window else "deltamem_feature_scores",
        "deltamem_rank_pages",
        "deltamem_deal_pages",
        "deltamem_survivors",
    }
    recording.called.clear()
    request.dealer.probe(Probe("r", tuple(range(20, 25)), 5 * SIZE, 200, SINK, RECENT, name, "global"), request.scorer)
    assert "deltamem_page_mass" in recording.called


@pytest.mark.parametrize("name", SCORERS)
def test_tiers_use_the_library(monkeypatch, name):
    """Also where some tokens are in cold pages already: these are decoded, the others rated where they are."""
    recording = Recording(native.library())
    monkeypatch.setattr(native, "library", lambda: recording)
    request = Request(name, 4)
    monkeypatch.setattr(request.mover, "read", None)
    request.dealer.run(request.plan(range(13), range(20, 25), 200, 1), request.scorer)
    cold = request.tables.requests["r"].cold
    assert cold is not None and cold.total > 0
    request.dealer.run(request.plan(range(20, 29), range(40, 44), 5 * SIZE + 60, 2), request.scorer)
    by_window = request.scorer.needs_queries
    assert recording.called >= {
        "deltamem_page_utility" if by_window else "deltamem_feature_scores",
        "deltamem_rank_pages",
        "deltamem_tier_path",
    }


def test_what_the_library_does_not_rate_is_left_to_the_scorer(monkeypatch):
    """A scorer that rates differently from the one it inherits from; repeats; a layout that is not affine."""

    class Doubled(DeltaScorer):
        def score(self, view: ScoreView) -> Tensor:
            return super().score(view) * 2

    request = Request("delta")
    plain = request.ratings(200, range(13)).hot
    request.scorer = Doubled()
    torch.testing.assert_close(request.ratings(200, range(13)).hot, plain * 2, rtol=1e-4, atol=1e-5)
    for other in (Request("delta", layout="tiled"), Request("delta", redundancy=0.9)):
        asked: list[int] = []
        score = DeltaScorer.score

        def counted(self: Scorer, view: ScoreView, asked: list[int] = asked, score: Any = score) -> Tensor:
            asked.append(view.layer)
            return score(self, view)

        assert other.ratings(200, range(13)).hot.isfinite().all()
        monkeypatch.setattr(DeltaScorer, "score", counted)
        other.ratings(200, range(13))
        assert set(asked) == set(range(LAYERS))
        monkeypatch.undo()


def test_queries_of_another_kind_than_the_pages_are_left_to_torch():
    request = Request("delta")
    plain = request.ratings(200, range(13)).hot
    request.window.rings = [ring.double() for ring in request.window.rings]
    torch.testing.assert_close(request.ratings(200, range(13)).hot, plain, rtol=1e-3, atol=1e-4)


def test_without_weights_the_predictor_says_so():
    request = Request("predictor")
    request.scorer = load_scorer("predictor")
    with pytest.raises(ValueError, match="has no weights"):
        request.ratings(200, range(13))
    request.scorer.bind(torch.zeros(LAYERS, HEADS, 5))
    with pytest.raises(ValueError, match="but heads 0 to 1 with 25 features"):
        request.ratings(200, range(13))
