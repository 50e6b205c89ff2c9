// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// The row of numbers at the top.

import { el, setText, setWidth } from "./dom.js";
import { bytes, compact, count, known, rate, share, UNKNOWN } from "./format.js";
import { enginesOf, requestsOf, totalOf } from "./totals.js";

const TIERS = ["hot", "cold", "other"];

export class Tiles {
  #tiles = {};

  constructor(host) {
    const tile = (key, name, help, ...extra) => {
      const value = el("div", { class: "value", text: UNKNOWN, "data-number": key });
      const more = el("div", { class: "more" });
      host.append(el("div", { class: "tile", title: help }, el("div", { class: "name", text: name }), value, ...extra, more));
      this.#tiles[key] = { value, more };
    };
    this.meter = Object.fromEntries(TIERS.map((tier) => [tier, el("i", { class: tier })]));
    tile("pool", "Pool in use", "Blocks of vLLM's KV pool that live requests hold",
      el("div", { class: "meter", "aria-hidden": "true" }, ...Object.values(this.meter)));
    tile("tokens", "Tokens seen → slots held",
      "Tokens the live requests have computed, and the KV slots they hold; a slot of a cold page holds several tokens");
    tile("saved", "Saved", "KV bytes the live requests would hold more if nothing were evicted or coded");
    tile("requests", "Requests", "Running, and waiting in the queue");
    tile("compactions", "Compactions", "Over the last ten seconds");
    tile("trouble", "Refused · skipped", "Requests answered with 400, and compactions that could not be done, since the start");
  }

  /** Show one answer of /deltamem/stats: `now` is the sum of its points, `grown` the counters' rates or null. */
  show(stats, engine, now, counters, grown) {
    this.#pool(now);
    this.#set("tokens", [compact(now.seen), ` → ${compact(now.held)}`], `${share(now.held, now.seen)} of their slots are held`);
    const times = known(now.logicalBytes) && now.tiers > 0 ? now.logicalBytes / now.tiers : null;
    this.#set("saved", [bytes(now.saved)], known(times) ? `${times.toFixed(1)}× the context in the same bytes` : "nothing is live");
    const of = (name) => requestsOf(stats, engine, name);
    this.#set("requests", [count(of("running")), ` running · ${count(of("waiting"))} waiting`], `${count(of("compacted"))} compacted`);
    this.#compactions(grown, enginesOf(stats, engine).length);
    this.#trouble(stats, counters);
  }

  #pool(now) {
    this.#set("pool", [share(now.used, now.pool), ` of ${bytes(now.pool)}`],
      `hot ${bytes(now.hot)} · cold ${bytes(now.cold)} · free ${bytes(now.free)}`);
    const whole = known(now.pool) && known(now.tiers) ? Math.max(now.pool, now.tiers + now.other) : null;
    for (const tier of TIERS) setWidth(this.meter[tier], whole ? now[tier] / whole : 0);
  }

  #compactions(grown, engines) {
    const busy = grown?.compaction_seconds;
    const deciding = grown?.policy_seconds ?? 0;
    const overhead = known(busy) ? `${((100 * (busy + deciding)) / engines).toFixed(1)}% of the time` : "no rate yet";
    this.#set("compactions", [rate(grown?.compactions), " /s"],
      known(grown?.evicted_tokens) ? `${compact(grown.evicted_tokens)} tokens evicted /s · ${overhead}` : overhead);
  }

  #trouble(stats, counters) {
    const refused = totalOf(stats.refused);
    const skipped = totalOf(counters.compactions_skipped);
    const avoided = counters.preemptions_avoided;
    const preempted = counters.preempted_compacted_requests;
    const parts = [
      known(avoided) ? `preemptions avoided: ${count(avoided)}` : null,
      known(preempted) ? `compacted ones preempted: ${count(preempted)}` : null,
    ];
    this.#set("trouble", [`${count(refused)} · ${count(skipped)}`], parts.filter(Boolean).join(" · "));
  }

  #set(key, [large, small = ""], more) {
    const { value, more: line } = this.#tiles[key];
    if (value.textContent !== large + small) value.replaceChildren(large, el("small", { text: small }));
    setText(line, more);
  }
}
