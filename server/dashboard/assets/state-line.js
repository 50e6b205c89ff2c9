// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// How the connection is, in words, and whether the numbers on the page are old.

import { byId, setText } from "./dom.js";
import { duration } from "./format.js";

const WORDS = {
  connecting: "Connecting",
  live: "Live",
  failing: "No numbers",
  waiting: "Reconnecting",
  locked: "Key needed",
  paused: "Paused",
};
const STALE_S = 5;

export class StateLine {
  #state = { kind: "connecting" };

  /** `view()` has the last state heard; `interval()` says how often one is due. */
  constructor(view, interval) {
    this.view = view;
    this.interval = interval;
  }

  get kind() {
    return this.#state.kind;
  }

  /** Show another state. */
  set(state) {
    // Trying again is still the same trouble: the words stay until it ends.
    this.#state = state;
    const shown = state.kind === "connecting" && state.reason ? "waiting" : state.kind;
    byId("state").dataset.kind = shown;
    setText(byId("state-words"), WORDS[shown]);
    byId("key-open").hidden = state.kind !== "locked";
    const problem = byId("problem");
    problem.hidden = !state.reason;
    setText(problem, state.reason ?? "");
    this.tick();
  }

  /** Show how old the numbers are; once a second. */
  tick() {
    const { last } = this.view();
    const now = Date.now() / 1000;
    const age = last === null ? null : now - last.heard;
    const stale = age !== null && age > Math.max(STALE_S, 3 * this.interval());
    document.body.dataset.stale = stale ? "yes" : "no";
    setText(byId("state-detail"), this.#detail(age, stale, now));
  }

  #detail(age, stale, now) {
    const { kind, retryAt, attempt } = this.#state;
    const parts = [];
    if (kind === "waiting") parts.push(`next try in ${duration(retryAt - now)}`);
    if (kind === "connecting" && attempt > 1) parts.push(`try ${attempt}`);
    if (stale) parts.push(`numbers are ${duration(age)} old`);
    else if (age === null && kind !== "connecting") parts.push("no numbers yet");
    return parts.join(" · ");
  }
}
