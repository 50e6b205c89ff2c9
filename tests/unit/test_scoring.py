# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Scorers against their slow definitions, selection under Hypothesis, the registry with foreign packages."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.metadata import EntryPoint

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_vllm.scoring import reference, registry
from deltamem_vllm.scoring.base import Scorer, ScoreView, select_survivors
from deltamem_vllm.scoring.features import feature_parts, feature_widths
from deltamem_vllm.scoring.predictor_tova import with_order_of
from deltamem_vllm.scoring.seen import Seen


def make_view(
    kv_heads: int = 2,
    group: int = 3,
    n: int = 19,
    window: int = 5,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
    peak: float = 3.0,
    seed: int = 0,
) -> ScoreView:
    gen = torch.Generator().manual_seed(seed)
    keys = torch.randn(kv_heads, n, dim, generator=gen).mul(peak).to(dtype)
    values = torch.randn(kv_heads, n, dim, generator=gen).to(dtype)
    queries = torch.randn(kv_heads * group, window, dim, generator=gen).to(dtype)
    return ScoreView(keys, values, queries, dim**-0.5, layer=1, seed=7)


SHAPES = [
    pytest.param({}, id="default"),
    pytest.param({"group": 1, "kv_heads": 1}, id="one head"),
    pytest.param({"window": 1}, id="one query"),
    pytest.param({"n": 6, "window": 6}, id="window = resident"),
    pytest.param({"n": 1, "window": 1}, id="one entry"),
    pytest.param({"dtype": torch.bfloat16}, id="bfloat16"),
    pytest.param({"peak": 20.0}, id="peaked"),
]


def weights_for(dim: int = 8, heads: int = 2, layers: int = 3) -> torch.Tensor:
    """Of a predictor that nobody fitted."""
    gen = torch.Generator().manual_seed(3)
    return torch.randn(layers, heads, sum(feature_widths(dim, dim)), generator=gen) * 0.05


def load(name: str, heads: int = 2) -> Scorer:
    """A scorer that can rate views of the tests."""
    scorer = registry.load_scorer(name)
    if scorer.learned is not None:
        scorer.bind(weights_for(heads=heads))
    return scorer


class TestScores:
    @pytest.mark.parametrize("name", ["delta", "snapkv", "tova", "distinct", "keydiff"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_matches_definition(self, name: str, shape: dict) -> None:
        view = make_view(**shape)
        got = registry.load_scorer(name).score(view)
        expected = getattr(reference, name)(view)
        assert got.dtype == torch.float32
        # float32 against float64; the delta-score squares and cancels, so it is the least exact of them.
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("name", ["predictor", "predictor-tova"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_learned_scores_match_their_definition(self, name: str, shape: dict) -> None:
        view = make_view(**shape)
        expected = getattr(reference, name.replace("-", "_"))(view, weights_for(heads=view.num_kv_heads))
        got = load(name, view.num_kv_heads).score(view)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_features_match_their_definition(self, shape: dict) -> None:
        view = make_view(**shape)
        phi = torch.cat(feature_parts(view.keys, view.values), -1)
        assert phi.shape[2] == sum(feature_widths(8, 8))
        for head in range(view.num_kv_heads):
            rows = [reference.features(view, head, j) for j in range(view.num_resident)]
            # float32 against float64; a cosine near 0 is a sum of products that cancel.
            torch.testing.assert_close(
                phi[head].double(), torch.tensor(rows, dtype=torch.float64), rtol=1e-5, atol=1e-6
            )

    def test_predictor_tova_keeps_what_either_would_keep_of_half_as_many(self) -> None:
        view = make_view(n=40, window=3, kv_heads=2, group=2, peak=8.0)
        by_name = {name: load(name).score(view) for name in ("predictor", "tova", "predictor-tova")}
        keep = 12
        for head in range(2):
            kept = set(by_name["predictor-tova"][head].topk(keep).indices.tolist())
            for name in ("predictor", "tova"):
                assert set(by_name[name][head].topk(keep // 2).indices.tolist()) <= kept, name
            # Neither alone does so.
            assert not set(by_name["tova"][head].topk(keep // 2).indices.tolist()) <= set(
                by_name["predictor"][head].topk(keep).indices.tolist()
            )

    @pytest.mark.parametrize("name", registry.BUILTIN)
    def test_scorers_read_no_more_queries_than_they_say(self, name: str) -> None:
        scorer, view = load(name), make_view(n=30, window=6)
        observed = scorer.observed(6)
        assert (observed > 0) == scorer.needs_queries
        if observed:
            assert view.queries is not None
            fewer = ScoreView(
                view.keys, view.values, view.queries[:, 6 - observed :], view.scale, view.layer, view.seed
            )
            assert torch.equal(scorer.score(fewer), scorer.score(view))
            assert scorer.observed(1) == 1

    def test_of_equals_in_the_other_order_the_newer_ranks_first(self) -> None:
        own = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
        assert with_order_of(own, torch.zeros(1, 4)).tolist() == [[5.0, 4.0, 4.0, 5.0]]
        assert with_order_of(own, torch.tensor([[0.0, 9.0, 0.0, 0.0]])).tolist() == [[5.0, 5.0, 3.0, 4.0]]

    def test_predictor_rates_heads_one_by_one_as_together(self) -> None:
        """After a first compaction heads hold different numbers of entries."""
        scorer = load("predictor", 3)
        view = make_view(kv_heads=3, group=1)
        together = scorer.score(view)
        for head in range(3):
            part = slice(head, head + 1)
            alone = ScoreView(view.keys[part], view.values[part], None, view.scale, view.layer, view.seed, head)
            torch.testing.assert_close(scorer.score(alone)[0], together[head])
        # It is the head and the layer that count, not the place in the view.
        other = ScoreView(view.keys[1:2], view.values[1:2], None, view.scale, view.layer, view.seed, 0)
        assert not torch.allclose(scorer.score(other)[0], together[1])
        above = ScoreView(view.keys, view.values, None, view.scale, 2, view.seed)
        assert not torch.allclose(scorer.score(above), together)

    def test_predictor_goes_by_all_that_was_seen(self) -> None:
        """An entry is rated the same alone as among those before it, if these are counted among what was seen."""
        scorer, view = load("predictor", 3), make_view(kv_heads=3, group=1)
        whole, size = Seen.of(view.keys, view.values), view.num_resident
        last = (view.keys[:, size // 2 :], view.values[:, size // 2 :])
        rest = ScoreView(*last, None, view.scale, view.layer, view.seed, seen=whole)
        torch.testing.assert_close(scorer.score(rest), scorer.score(view)[:, size // 2 :])
        expected = reference.predictor(rest, weights_for(heads=3))
        torch.testing.assert_close(scorer.score(rest).double(), expected, rtol=1e-4, atol=0)
        forgetful = ScoreView(*last, None, view.scale, view.layer, view.seed)
        assert not torch.allclose(scorer.score(forgetful), scorer.score(rest))
        first = Seen.of(view.keys[:, : size // 2], view.values[:, : size // 2])
        torch.testing.assert_close((first + Seen.of(*last)).directions, whole.directions)

    def test_predictor_says_what_it_lacks(self) -> None:
        with pytest.raises(ValueError, match="'predictor' has no weights.*deltamem calibrate"):
            registry.load_scorer("predictor").score(make_view())
        with pytest.raises(ValueError, match="are for 2 kv heads and 25 features, but heads 0 to 2 with 25"):
            load("predictor", 2).score(make_view(kv_heads=3))
        with pytest.raises(ValueError, match="are for 2 kv heads and 25 features, but heads 0 to 1 with 15"):
            load("predictor", 2).score(make_view(dim=4))
        with pytest.raises(ValueError, match="'tova' learns nothing from a calibration"):
            registry.load_scorer("tova").bind(torch.ones(1))

    def test_attention_hides_later_entries(self) -> None:
        view = make_view()
        weights = view.attention()
        assert weights.shape == (2, 3, 5, 19)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
        for i in range(5):
            assert (weights[:, :, i, 15 + i :] == 0).all()
            assert (weights[:, :, i, : 15 + i] > 0).all()
        torch.testing.assert_close(view.attention(last=2), weights[:, :, 3:])

    @pytest.mark.parametrize("gap", [10.0, 30.0, 200.0, 600.0])
    def test_delta_is_exact_where_one_weight_is_nearly_all(self, gap: float) -> None:
        """a is 1 - exp(-gap): the naive form divides rounding noise by rounding noise."""
        view = make_view(n=12, window=3, peak=0.01)
        keys = view.keys.clone()
        query = view.queries[0, 0]
        keys[0, 4] = gap * query / query.square().sum()
        view = ScoreView(keys, view.values, view.queries, 1.0)
        scores = registry.load_scorer("delta").score(view)
        torch.testing.assert_close(scores.double(), reference.delta(view), rtol=1e-3, atol=1e-4)

    def test_delta_ranks_a_single_answer_first(self) -> None:
        """An entry that only one query of one group head needs must still come first."""
        view = make_view(n=32, window=4, peak=0.1)
        keys = view.keys.clone()
        keys[1, 9] = 12.0 * view.queries[4, 2]
        scores = registry.load_scorer("delta").score(ScoreView(keys, view.values, view.queries, 1.0))
        assert scores[1].argmax() == 9

    def test_tova_is_one_choice_per_layer(self) -> None:
        scores = registry.load_scorer("tova").score(make_view())
        assert torch.equal(scores[0], scores[1])

    def test_streaming_is_the_order(self) -> None:
        scores = registry.load_scorer("streaming").score(make_view(n=5, window=1))
        assert scores.tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 2

    def test_random_is_a_function_of_its_arguments(self) -> None:
        scorer = registry.load_scorer("random")
        view = make_view(n=4000, window=1)

        def draw(**changes: int) -> torch.Tensor:
            return scorer.score(ScoreView(view.keys, view.values, None, 1.0, **changes))

        state = torch.get_rng_state()
        first = draw(layer=1, seed=7)
        assert torch.equal(first, draw(layer=1, seed=7))
        assert torch.equal(state, torch.get_rng_state())
        different = [
            draw(layer=2, seed=7)[0],
            draw(layer=1, seed=8)[0],
            draw(layer=1, seed=7 + 2**32)[0],
            first[1],
        ]
        for other in different:
            assert abs(torch.corrcoef(torch.stack([first[0], other]))[0, 1]) < 0.06
        assert ((first >= 0) & (first < 1)).all()
        # Uniform: 16 bins of 8000 draws, chi-square with 15 degrees of freedom, p = 1e-4 at 44.3.
        counts = torch.histc(first, bins=16, min=0, max=1)
        assert (counts - 500).square().sum() / 500 < 44.3

    @pytest.mark.parametrize("name", registry.BUILTIN)
    def test_inputs_are_left_alone(self, name: str) -> None:
        view = make_view()
        before = [view.keys.clone(), view.values.clone(), view.queries.clone()]
        scores = load(name).score(view)
        assert scores.shape == (2, 19)
        assert scores.is_contiguous()
        for old, new in zip(before, [view.keys, view.values, view.queries], strict=True):
            assert torch.equal(old, new)

    @pytest.mark.parametrize("name", registry.BUILTIN)
    def test_query_need_is_declared(self, name: str) -> None:
        view = make_view()
        blind = ScoreView(view.keys, view.values, None, view.scale)
        scorer = load(name)
        if scorer.needs_queries:
            with pytest.raises(ValueError, match="needs_queries"):
                scorer.score(blind)
        else:
            assert torch.equal(scorer.score(blind), scorer.score(ScoreView(view.keys, view.values, None, 9.0)))

    @pytest.mark.parametrize(
        ("keys", "queries", "message"),
        [
            ((2, 5, 8), (3, 2, 8), "multiple of 2 kv heads"),
            ((2, 5, 8), (4, 6, 8), "1 to 5 queries"),
            ((2, 5, 8), (4, 2, 4), r"\[H_q, w, 8\]"),
            ((2, 0, 8), (4, 1, 8), "n >= 1"),
        ],
    )
    def test_wrong_shapes_are_refused(self, keys: tuple, queries: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ScoreView(torch.zeros(keys), torch.zeros(keys), torch.zeros(queries), 1.0)


@st.composite
def selections(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int]:
    n = draw(st.integers(1, 40))
    sink = draw(st.integers(0, n))
    recent = draw(st.integers(0, n - sink))
    keep = draw(st.integers(max(1, sink + recent), n))
    value = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf")]),
        st.floats(width=32, allow_nan=False),
    )
    rows = draw(st.lists(st.lists(value, min_size=n, max_size=n), min_size=1, max_size=3))
    return torch.tensor(rows, dtype=torch.float32), keep, sink, recent


class TestSelection:
    @given(selections())
    @settings(max_examples=300, deadline=None)
    def test_properties(self, case: tuple[torch.Tensor, int, int, int]) -> None:
        scores, keep, sink, recent = case
        heads, n = scores.shape
        before = scores.clone()
        kept = select_survivors(scores, keep, sink, recent)
        assert torch.equal(scores, before)
        assert kept.shape == (heads, keep)
        assert kept.dtype == torch.int64
        assert (kept[:, 1:] > kept[:, :-1]).all()
        assert kept.min() >= 0
        assert kept.max() < n
        for row, score in zip(kept.tolist(), scores.tolist(), strict=True):
            protected = {*range(sink), *range(n - recent, n)}
            assert protected <= set(row)
            lost = set(range(n)) - set(row)
            free = set(row) - protected
            if lost and free:
                worst = min(free, key=lambda j: (score[j], j))
                best = max(lost, key=lambda j: (score[j], j))
                assert (score[worst], worst) > (score[best], best)
        assert torch.equal(kept, reference.select(scores, keep, sink, recent))

    def test_ties_keep_the_newer(self) -> None:
        assert select_survivors(torch.zeros(1, 6), 3, 1, 0).tolist() == [[0, 4, 5]]

    def test_nan_ranks_below_everything(self) -> None:
        scores = torch.tensor([[float("nan"), -1e30, 0.0, float("nan")]])
        assert select_survivors(scores, 2, 0, 0).tolist() == [[1, 2]]

    def test_half_precision_scores(self) -> None:
        assert select_survivors(torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.bfloat16), 2, 0, 0).tolist() == [[0, 2]]

    @pytest.mark.parametrize(
        ("keep", "sink", "recent", "message"),
        [
            (6, 0, 0, "at most 5"),
            (2, 2, 1, "at least 3"),
            (0, 0, 0, "keep must be >= 1"),
            (3, -1, 0, "sink and recent >= 0"),
        ],
    )
    def test_impossible_requests_are_refused(self, keep: int, sink: int, recent: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            select_survivors(torch.zeros(2, 5), keep, sink, recent)


class ForeignScorer(Scorer):
    """Keeps even entries: stands for a scorer of another package."""

    name = "foreign"
    summary = "even entries"
    source = "test"

    def score(self, view: ScoreView) -> torch.Tensor:
        return (1.0 - torch.arange(view.num_resident) % 2).expand(view.num_kv_heads, -1)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch):
    """Install fake entry points: ``foreign(name, value)`` adds one."""
    module = types.ModuleType("deltamem_test_foreign")
    module.ForeignScorer = ForeignScorer
    module.NotAScorer = dict
    module.Renamed = type("Renamed", (ForeignScorer,), {"name": "other"})
    module.Nameless = type("Nameless", (Scorer,), {"score": ForeignScorer.score})
    module.Unfinished = type("Unfinished", (Scorer,), {"name": "unfinished", "summary": "-", "source": "-"})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    points: list[EntryPoint] = []
    monkeypatch.setattr(registry, "_entry_points", lambda: tuple(points))

    def add(name: str, value: str) -> None:
        points.append(EntryPoint(name, value, registry.GROUP))

    return add


class TestRegistry:
    def test_builtins_without_metadata(self, foreign) -> None:
        names = ("delta", "snapkv", "tova", "predictor", "predictor-tova", "distinct", "keydiff", "streaming", "random")
        assert registry.scorer_names() == names
        assert set(registry.available_scorers()) == set(registry.scorer_names())

    def test_metadata_that_repeats_the_builtins_is_no_duplicate(self, foreign) -> None:
        for name, path in registry.BUILTIN.items():
            foreign(name, path)
        assert set(registry.available_scorers()) == set(registry.BUILTIN)

    def test_names_need_no_torch(self) -> None:
        code = (
            "import sys; from deltamem_vllm.scoring.registry import scorer_names; names = scorer_names(); "
            "assert 'delta' in names; assert 'torch' not in sys.modules, 'torch was imported'"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    def test_foreign_scorer(self, foreign) -> None:
        foreign("foreign", "deltamem_test_foreign:ForeignScorer")
        assert registry.scorer_names()[-1] == "foreign"
        scorer = registry.load_scorer("foreign")
        assert isinstance(scorer, ForeignScorer)
        kept = select_survivors(scorer.score(make_view(n=8, window=1)), 4, 0, 0)
        assert kept.tolist() == [[0, 2, 4, 6]] * 2

    def test_same_class_twice_is_fine(self, foreign) -> None:
        foreign("foreign", "deltamem_test_foreign:ForeignScorer")
        foreign("foreign", "deltamem_test_foreign :ForeignScorer")
        assert registry.available_scorers()["foreign"] is ForeignScorer

    def test_taken_name_raises(self, foreign) -> None:
        foreign("delta", "deltamem_test_foreign:ForeignScorer")
        with pytest.raises(ValueError, match="'delta' is claimed by different entry points"):
            registry.available_scorers()
        with pytest.raises(ValueError, match="claimed by different"):
            registry.load_scorer("delta")

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("broken", "deltamem_no_such_module:Scorer", "cannot be imported"),
            ("broken", "deltamem_test_foreign:Missing", "cannot be imported"),
            ("broken", "deltamem_test_foreign:NotAScorer", "not a subclass"),
            ("broken", "deltamem_test_foreign:Renamed", "calls itself 'other'"),
            ("broken", "deltamem_test_foreign:Nameless", "does not set name, summary, source"),
            ("unfinished", "deltamem_test_foreign:Unfinished", "does not implement score"),
        ],
    )
    def test_broken_foreign_scorer_is_listed_and_harms_nobody(
        self, foreign, name: str, value: str, reason: str
    ) -> None:
        foreign(name, value)
        assert name in registry.scorer_names()
        assert set(registry.available_scorers()) == set(registry.BUILTIN)
        info = {i.name: i for i in registry.describe_scorers()}
        assert reason in info[name].error
        assert info["delta"].error is None
        assert registry.load_scorer("delta").name == "delta"
        with pytest.raises(ValueError, match=reason):
            registry.load_scorer(name)

    def test_unknown_name_lists_the_known(self) -> None:
        with pytest.raises(ValueError, match=r"unknown scorer 'h2o'; available: delta, snapkv, tova"):
            registry.load_scorer("h2o")

    @pytest.mark.parametrize("name", registry.BUILTIN)
    def test_every_scorer_explains_itself(self, name: str) -> None:
        cls = registry.available_scorers()[name]
        assert cls.name == name
        assert cls.__doc__
        assert cls.__doc__ != Scorer.__doc__
        assert 10 < len(cls.summary) < 110
        assert "\n" not in cls.summary
        assert "arXiv" in cls.source or name == "random"
