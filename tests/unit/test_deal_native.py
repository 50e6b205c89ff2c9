# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Dealing by the native library: what torch chooses, to the bit, and what the definitions say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltamem_vllm.dealing import deal, reference, tiers
from deltamem_vllm.ops import deal_pages as ops
from deltamem_vllm.ops import native
from deltamem_vllm.ops.inputs_utility import SCORES, make_scores
from tests.support.examples import examples

INF, NAN = math.inf, math.nan
QUICK = settings(max_examples=examples(100), deadline=None)


def in_torch(call, *arguments):
    """The same without the library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_library_for", lambda tensor: None)
        return call(*arguments)


@st.composite
def requests(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int, int]:
    """Scores, ragged lengths (0 among them), block size, sink and recent, which may be more than a pair has."""
    layers, heads, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    most = draw(st.sampled_from([20, 70, 400]))
    lengths = torch.tensor([[draw(st.integers(0, most)) for _ in range(heads)] for _ in range(layers)])
    tokens = max(int(lengths.max()), size) + draw(st.integers(0, 2))
    scores = make_scores(draw(st.sampled_from(SCORES)), lengths, tokens, draw(st.integers(0, 2**16)))
    return scores, lengths, size, draw(st.integers(0, 12)), draw(st.integers(0, 12))


@QUICK
@given(requests())
def test_tokens_are_ranked_as_torch_ranks_them(request_):
    scores, lengths, size, sink, recent = request_
    ours, torchs = deal.page_utilities(*request_), in_torch(deal.page_utilities, *request_)
    assert torch.equal(ours.order, torchs.order)
    assert torch.equal(ours.utility.isinf(), torchs.utility.isinf())
    # Sums of float64 against float32, of numbers that may cancel.
    clean = scores.nan_to_num(nan=0.0).clamp(-1e30, 1e30)
    largest = clean.masked_fill(torch.arange(scores.shape[2]) >= lengths.unsqueeze(2), 0.0).abs().sum(2, keepdim=True)
    there = ~ours.utility.isinf()
    apart = (ours.utility.double() - torchs.utility.double()).abs().where(there, 0.0)
    assert (apart <= 1e-6 * largest.double()).all()
    mass = [call(deal.page_mass, scores, lengths, ours.order, size, sink, recent) for call in (_here, in_torch)]
    torch.testing.assert_close(*mass, rtol=1e-6, atol=1e-7)
    for layer, row in enumerate(lengths.tolist()):
        for head, count in enumerate(row):
            expected = reference.ranked(scores[layer, head, :count].tolist(), sink, recent)
            assert ours.order[layer, head, :count].tolist() == expected


def _here(call, *arguments):
    return call(*arguments)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("tokens", [1, 255, 256, 3000])
def test_long_pairs_are_ranked_alike(kind, tokens):
    lengths = torch.tensor([[tokens, max(tokens - 7, 0)], [tokens // 2, 0]])
    scores = make_scores(kind, lengths, tokens, seed=tokens)
    arguments = (scores, lengths, min(32, tokens), 4, 8)
    assert torch.equal(deal.page_utilities(*arguments).order, in_torch(deal.page_utilities, *arguments).order)


@QUICK
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40)),
    few=st.booleans(),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_pages_are_dealt_as_torch_deals_them(shape, few, share, seed):
    """NaN, infinities of either sign, zeros of either sign, ties; from no page to all."""
    generator = torch.Generator().manual_seed(seed)
    worth = torch.randn(shape, generator=generator)
    if few:
        values = torch.tensor([0.0, -0.0, 1.0, 1.0, 2.0, -1.0, NAN, INF, -INF, 1e-40, 3e38])
        worth = values[torch.randint(len(values), shape, generator=generator)]
    wanted = round(share * worth.numel())
    pages = deal.deal_pages(worth, wanted)
    assert torch.equal(pages, in_torch(deal.deal_pages, worth, wanted))
    assert int(pages.sum()) == wanted
    supply = (worth > -INF).all(2)
    if not few and bool(supply.all()) and wanted <= 30:
        assert torch.equal(pages, reference.deal_pages(worth, wanted))


@QUICK
@given(requests(), st.data())
def test_survivors_are_those_of_torch(request_, data):
    order = deal.page_utilities(*request_).order
    size, most = request_[2], order.shape[2] // request_[2]
    pages = torch.randint(
        most + 1, order.shape[:2], generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    keep = deal.survivors(order, pages, size)
    assert keep.dtype == torch.bool and torch.equal(keep, in_torch(deal.survivors, order, pages, size))
    assert torch.equal(keep.sum(2), pages * size)


@QUICK
@given(
    st.data(),
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 3),
    st.integers(0, 2**16),
)
def test_tiers_are_split_as_torch_splits_them(data, size, more, loss, floor, seed):
    """To the bit: the same sums in the same order."""
    least = max(floor * size, 1)
    lengths = torch.tensor([[data.draw(st.integers(least, least + 90)) for _ in range(2)] for _ in range(2)])
    tokens = int(lengths.max()) + data.draw(st.integers(0, 3))
    kind = data.draw(st.sampled_from(["normal", "peaked", "ties", "equal"]))
    worth = make_scores(kind, lengths, tokens, seed)
    there = torch.arange(tokens) < lengths.unsqueeze(2)
    worth = worth.where(there, 0.0).abs().sort(dim=2, descending=True).values
    arguments = (worth, lengths, size, size + more, loss, floor)
    ours, torchs = tiers.tier_path(*arguments), in_torch(tiers.tier_path, *arguments)
    assert torch.equal(ours.gains, torchs.gains)
    fits = torchs.gains > -INF
    assert torch.equal(ours.hot[..., 1:][fits], torchs.hot[..., 1:][fits])


def test_more_pages_than_there_are_cannot_be_dealt():
    with pytest.raises(ValueError, match="0 to 6 pages can be dealt, got 7"):
        deal.deal_pages(torch.zeros(1, 2, 3), 7)


@pytest.mark.parametrize("token", [-1, 8, 2**40])
def test_an_order_of_tokens_that_do_not_exist_is_refused(token):
    order = torch.arange(8).view(1, 1, 8).clone()
    order[0, 0, 2] = token
    with pytest.raises(ValueError, match="order must name tokens 0 to 7"):
        deal.survivors(order, torch.tensor([[2]]), 2)
    with pytest.raises(ValueError, match="order must name tokens 0 to 7"):
        deal.page_mass(torch.rand(1, 1, 8), torch.tensor([[8]]), order, 2, 0, 0)


def test_without_the_library_torch_does_it(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    scores, lengths = torch.rand(1, 1, 8), torch.tensor([[8]])
    assert ops.rank_pages(scores, lengths, 2, 0, 0) is None
    ranked = deal.page_utilities(scores, lengths, 2, 0, 0)
    pages = deal.deal(ranked.utility, 2, 2, 1)
    assert deal.survivors(ranked.order, pages, 2).sum() == 4


def test_strides_and_other_floats_are_read_right():
    scores = torch.randn(6, 2, 3).permute(2, 1, 0)
    lengths = torch.tensor([[6, 4, 5], [3, 6, 6]]).t()
    for given_ in (scores, scores.to(torch.bfloat16), scores.double()):
        ours, torchs = (call(deal.page_utilities, given_, lengths, 2, 1, 1) for call in (_here, in_torch))
        assert torch.equal(ours.order, torchs.order)
        torch.testing.assert_close(ours.utility, torchs.utility)
