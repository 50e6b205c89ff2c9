// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// The last ten minutes of every server that this tab has looked at. Survives a reload.

import { pointOf, sumOf } from "./totals.js";

export const SPAN_S = 600;
// Counters' rates are taken over this long: shorter, and a compaction every few seconds would flicker.
const RATE_S = 10;

export class Past {
  #points = new Map();
  #recent = new Map();
  #name;

  constructor(name) {
    this.#name = `deltamem-past-${name}`;
    this.#load();
  }

  /** Remember one answer of /deltamem/stats. */
  add(server, at, stats) {
    const points = this.#pointsOf(server);
    if (points.length > 0 && at <= points[points.length - 1].at) return;
    points.push({ at, engines: Object.fromEntries(stats.engines.map((one) => [one.engine, pointOf(one)])) });
    const first = points.findIndex((point) => point.at >= at - SPAN_S - 5);
    points.splice(0, first);
  }

  /** Remember what the dashboard's own process saw before this page was opened. */
  addEarlier(server, entries) {
    const newer = this.#pointsOf(server);
    this.#points.set(server, []);
    for (const { at, stats } of entries) this.add(server, at, stats);
    const points = this.#pointsOf(server);
    const last = points.length > 0 ? points[points.length - 1].at : 0;
    const first = points.length > 0 ? points[0].at : Infinity;
    points.unshift(...newer.filter((point) => point.at < first));
    points.push(...newer.filter((point) => point.at > last));
  }

  /** Points of the chosen engine, or of all (`null`), oldest first. */
  of(server, engine) {
    return this.#pointsOf(server).map((point) => {
      const all = Object.entries(point.engines);
      const chosen = all.filter(([number]) => engine === null || Number(number) === engine);
      return { at: point.at, ...sumOf(chosen.map(([, one]) => one)) };
    });
  }

  /** Growth of counters a second: `counters` now against those some seconds ago; null in the beginning. */
  rates(server, engine, at, counters) {
    const name = `${server}/${engine}`;
    const seen = this.#recent.get(name) ?? [];
    const usable = seen.filter((one) => at - one.at <= RATE_S + 5 && one.at < at);
    usable.push({ at, counters });
    this.#recent.set(name, usable);
    const before = usable.find((one) => at - one.at <= RATE_S) ?? usable[0];
    const seconds = at - before.at;
    if (seconds <= 0) return null;
    const grown = {};
    for (const [key, value] of Object.entries(counters)) {
      // A counter that shrank belongs to an engine that was started anew.
      if (typeof value === "number" && value >= (before.counters[key] ?? 0)) {
        grown[key] = (value - (before.counters[key] ?? 0)) / seconds;
      }
    }
    return grown;
  }

  /** Write it down for the next load of this tab. */
  save() {
    try {
      sessionStorage.setItem(this.#name, JSON.stringify([...this.#points]));
    } catch {
      // No room or no storage: the next load starts with an empty time-line, as the first one did.
    }
  }

  #load() {
    try {
      this.#points = new Map(JSON.parse(sessionStorage.getItem(this.#name) ?? "[]"));
    } catch {
      this.#points = new Map(); // written by another version of this page
    }
  }

  #pointsOf(server) {
    if (!this.#points.has(server)) this.#points.set(server, []);
    return this.#points.get(server);
  }
}
