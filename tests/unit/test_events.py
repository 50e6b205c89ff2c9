# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What is remembered of the last events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deltamem_vllm.memory.events import KINDS, PER_KIND, SHOWN, EventRing, Kind, RefusalLog, merged


@given(st.lists(st.sampled_from(KINDS), max_size=200))
def test_the_newest_of_each_kind_are_kept_in_order(kinds: list[Kind]) -> None:
    ring = EventRing()
    for number, kind in enumerate(kinds):
        ring.add(kind, "reason", "r", "{}", number)
    found = [(event["kind"], int(event["detail"])) for event in ring.newest_first()]
    expected = {
        (kind, number) for kind in KINDS for number in [n for n, one in enumerate(kinds) if one == kind][-PER_KIND:]
    }
    assert set(found) == expected
    assert len(found) == len(expected) <= SHOWN
    for kind in KINDS:
        numbers = [number for one, number in found if one == kind]
        assert numbers == sorted(numbers, reverse=True)


def test_rings_of_several_engines_are_cut_as_one() -> None:
    rings = [[{"at": float(at), "kind": "skipped"} for at in range(start, 100, 2)] for start in (0, 1)]
    assert [event["at"] for event in merged(rings)] == [float(at) for at in range(99, 99 - PER_KIND, -1)]


def test_braces_in_a_value_are_text() -> None:
    """A message is a value, never a template: it may hold any character."""
    log = RefusalLog(["bad_option"])
    log.add("bad_option", "{0.__class__} {}")
    assert log.newest_first()[0]["detail"] == "{0.__class__} {}"


def test_refusals_are_counted_beyond_those_remembered() -> None:
    log = RefusalLog(["bad_option", "does_not_fit"])
    for _ in range(3 * PER_KIND):
        log.add("does_not_fit", "words")
    assert log.counts == {"bad_option": 0, "does_not_fit": 3 * PER_KIND}
    assert len(log.newest_first()) == PER_KIND
