# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What people say to each other: conversations, minutes of meetings, letters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from deltamem_vllm.calibration.corpus.parts import Parts
from deltamem_vllm.calibration.corpus.unit import Ask, Unit

_SMALL_TALK = (
    "Sounds good to me.",
    "Could you say that again? The line is bad today.",
    "I am not sure about that, but let us go on.",
    "Thanks, I will write that down.",
    "Did anybody read the draft I sent around last week?",
    "Yes, and I liked most of it, apart from the second half.",
    "We talked about the {noun} last time and did not come to an end.",
    "Honestly, the {noun} worries me more than the {noun}.",
    "Fine. What is next?",
    "Let me share my screen for a moment.",
    "Sorry, I was muted. I said that the {noun} has to wait.",
    "That is what {first} told me, too.",
    "How was the trip to {place}, by the way?",
)
_Said = tuple[str, tuple[Ask, ...]]


def dialogue(parts: Parts) -> Iterator[Unit]:
    """Conversations and minutes in turns, with agreements on who, when and how much."""
    while True:
        people = list(dict.fromkeys(parts.person() for _ in range(parts.rng.randrange(2, 6))))
        minutes = parts.rng.random() < 0.5
        title = parts.new(lambda: f"{parts.coined().title()} {parts.noun()}")
        if minutes:
            place, day = parts.place(), parts.spoken_date()
            text = f"Minutes: {title}\nHeld in {place}, {day}\nPresent: {', '.join(people)}\n\n"
            yield Unit(
                text,
                (
                    parts.one(
                        (
                            Ask(f"On which day was the meeting about {title} held?", day),
                            Ask(f"Where was the meeting about {title} held?", place),
                        )
                    ),
                ),
            )
        else:
            yield Unit(f"Chat: {title}\n\n")
        for _ in range(parts.rng.randrange(10, 30)):
            speaker = parts.one(people)
            said, asks = (_small_talk(parts), ()) if parts.rng.random() < 0.55 else parts.one(_SAYINGS)(parts)
            mark = f"- {speaker}: " if minutes else f"[{parts.clock()}] {speaker.split()[0]}: "
            yield Unit(f"{mark}{said}\n", asks)
        yield Unit("\n")


def _small_talk(parts: Parts) -> str:
    return parts.one(_SMALL_TALK).format(noun=parts.noun(), first=parts.first_name(), place=parts.place())


def _budget(parts: Parts) -> _Said:
    what, amount = parts.new(lambda: f"{parts.coined().title()} contract"), parts.amount()
    return f"For the {what} we can spend {amount}, not more.", (Ask(f"How much can be spent on the {what}?", amount),)


def _task(parts: Parts) -> _Said:
    who, what = parts.person(), parts.new(lambda: f"{parts.noun()} of {parts.coined().title()}")
    day = parts.spoken_date()
    asks = (Ask(f"Who will take care of the {what}?", who), Ask(f"By when is the {what} due?", day))
    return f"{who} will take care of the {what} by {day}.", (parts.one(asks),)


def _contact(parts: Parts) -> _Said:
    who, mail = parts.new(parts.person), parts.email()
    return f"Write to {who}, the address is {mail}.", (
        Ask(f"To which e-mail address should one write for {who}?", mail),
    )


def _number(parts: Parts) -> _Said:
    ticket, host = parts.new(parts.code), parts.host()
    return f"Ticket {ticket} is about {host} again.", (Ask(f"Which machine is ticket {ticket} about?", host),)


def _appointment(parts: Parts) -> _Said:
    firm, place, time = parts.new(parts.firm), parts.place(), parts.clock()
    asks = (Ask(f"In which town do we meet {firm}?", place), Ask(f"What time is the meeting with {firm}?", time))
    return f"We meet {firm} in {place} at {time}.", (parts.one(asks),)


def _share(parts: Parts) -> _Said:
    firm, share = parts.new(parts.firm), parts.percent()
    return f"Last quarter {firm} grew by {share}, they say.", (
        Ask(f"By how much did {firm} grow last quarter?", share),
    )


_SAYINGS: tuple[Callable[[Parts], _Said], ...] = (_budget, _task, _contact, _number, _appointment, _share)


def remark(parts: Parts) -> Unit:
    """One agreement as a sentence."""
    said, asks = parts.one(_SAYINGS)(parts)
    return Unit(f"{said} ", asks)
