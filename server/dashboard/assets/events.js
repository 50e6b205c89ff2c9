// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// Recent refusals, skips, preemptions and compactions, with what was counted since the start.

import { el } from "./dom.js";
import { clock, count, known } from "./format.js";

const NOT_TOLD = "This server does not tell its recent events.";

export class Events {
  #shown = null;

  constructor(host) {
    this.counts = el("dl", { class: "counts" });
    this.body = el("tbody");
    const heads = [["Time", "at left"], ["What", "kind left"], ["Why", "left"], ["Request", "request left"]];
    const row = el("tr", {}, ...heads.map(([name, kind]) => el("th", { scope: "col", class: kind, text: name })));
    host.append(this.counts, el("table", { class: "list events" }, el("thead", {}, row), this.body));
  }

  /** Show what one answer of /deltamem/stats tells. */
  show(stats, engine, counters) {
    const events = (stats.recent ?? []).filter((one) => engine === null || one.engine === null || one.engine === engine);
    // Drawn anew only if there is something new, so that a reader can select text in it.
    const state = JSON.stringify([events, stats.refused, counters.compactions_skipped]);
    if (state === this.#shown) return;
    this.#shown = state;
    this.#drawCounts(stats.refused ?? {}, counters.compactions_skipped ?? {});
    if (events.length > 0) this.body.replaceChildren(...events.map(rowOf));
    else {
      const words = stats.recent === undefined ? NOT_TOLD : "Nothing happened yet.";
      this.body.replaceChildren(el("tr", {}, el("td", { class: "nothing", colspan: 4, text: words })));
    }
  }

  #drawCounts(refused, skipped) {
    const entries = [...Object.entries(refused).map((one) => ["refused", ...one]),
      ...Object.entries(skipped).map((one) => ["skipped", ...one])];
    this.counts.replaceChildren(...entries.map(([what, reason, times]) => el(
      "div", { class: known(times) && times > 0 ? "some" : null },
      el("dt", { text: `${what}: ${reason.replaceAll("_", " ")}` }), el("dd", { text: count(times) }),
    )));
  }
}

function rowOf(event) {
  const why = el("td", { class: "left" }, String(event.reason).replaceAll("_", " "));
  if (event.detail) why.append(el("span", { class: "hint", text: ` ${event.detail}` }));
  return el("tr", { "data-kind": event.kind },
    el("td", { class: "at left", text: clock(event.at) }),
    el("td", { class: "kind left", text: event.kind }),
    why,
    el("td", { class: "request left", text: event.request ?? "" }));
}
