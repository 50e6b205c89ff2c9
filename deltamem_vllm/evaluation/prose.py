# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Endless small-town prose from a seed: the haystack of `needle`.

Made here instead of taken from a book, so that nothing has to be downloaded or licensed and no model has
read it before. It contains no digit, so a number hidden in it is there exactly once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

_PEOPLE = (
    "the baker", "the old teacher", "a young painter", "the ferryman", "the doctor", "my aunt", "the miller",
    "the two sisters", "a traveller", "the librarian", "the gardener", "his brother", "the clockmaker",
    "a fisherman", "the tailor", "our neighbour", "the postman", "the cook", "a retired sailor", "the nurse",
)  # fmt: skip
_DEEDS = (
    "carried", "repaired", "painted", "forgot", "found", "bought", "described", "hid", "cleaned", "sold",
    "borrowed", "returned", "admired", "measured", "sketched", "wrapped", "counted", "dropped", "lifted",
)  # fmt: skip
_THINGS = (
    "a wooden chair", "the blue lantern", "a basket of pears", "the broken window", "an old letter",
    "the copper kettle", "a sack of flour", "the silver bell", "a bundle of reeds", "the long ladder",
    "a map of the coast", "the garden gate", "a jar of honey", "the heavy curtain", "a pair of boots",
    "the kitchen table", "a bowl of soup", "the church clock", "a roll of cloth", "the small boat",
)  # fmt: skip
_PLACES = (
    "near the river", "behind the mill", "on the market square", "in the upper room", "under the bridge",
    "beside the orchard", "at the edge of the forest", "along the harbour wall", "in front of the school",
    "on the way to the station", "by the stone well", "at the top of the hill", "in the empty hall",
)  # fmt: skip
_TIMES = (
    "In the morning", "Before the rain came", "Late in autumn", "After supper", "On the following day",
    "When the bells rang", "During the long winter", "As soon as the fog lifted", "Towards evening",
    "While the others slept", "Once the guests had left", "At the first light", "Some weeks later",
)  # fmt: skip
_REASONS = (
    "because nobody else wanted to", "although the road was wet", "and nobody said a word about it",
    "so that the children could see it", "without asking anyone", "as it had been promised",
    "while a dog barked in the distance", "and then walked home slowly", "to the surprise of everyone",
    "since the days were getting shorter", "and the wind grew stronger", "as was the custom there",
)  # fmt: skip
_ASIDES = (
    "The smell of bread drifted through the street.", "Nobody remembered who had built the tower.",
    "The water was calm and very clear.", "It was warmer than anyone had expected.",
    "A cart rolled past and disappeared around the corner.", "The leaves had begun to turn yellow.",
    "Somewhere a door closed softly.", "The stories they told were older than the village.",
    "For a while there was only the sound of the rain.", "People spoke quietly and laughed often.",
)  # fmt: skip


def sentences(rng: random.Random) -> Iterator[str]:
    """Yield sentences for ever; the same generator state gives the same sentences."""
    while True:
        if rng.random() < 0.2:
            yield rng.choice(_ASIDES)
            continue
        who, deed, what, where = (rng.choice(pool) for pool in (_PEOPLE, _DEEDS, _THINGS, _PLACES))
        sentence = f"{who} {deed} {what} {where}"
        if rng.random() < 0.6:
            sentence = f"{rng.choice(_TIMES)}, {sentence}"
        if rng.random() < 0.6:
            sentence += f", {rng.choice(_REASONS)}"
        yield f"{sentence[0].upper()}{sentence[1:]}."
