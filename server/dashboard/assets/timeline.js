// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// A time-line of ten minutes: stacked areas and lines in SVG, with a legend that shows the values.

import { el, setText, svg } from "./dom.js";
import { clock, known, shortClock, UNKNOWN } from "./format.js";
import { SPAN_S } from "./past.js";

const LEFT = 58;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 20;
const TICK_S = 120;

/**
 * `parts`: what is drawn, in this order, as `{name, kind, value(point), base(point)}`. `kind` names the colours.
 * `base` makes it an area from there up to `value`; without it, it is a line. `shown(point)` is the legend's value.
 */
export class Timeline {
  #points = [];
  #now = 0;
  #chosen = null;
  #width = 0;
  #height = 0;

  constructor(host, { label, parts, format, step, gap = 15 }) {
    Object.assign(this, { label, parts, format, step, gap });
    this.svg = svg("svg", { role: "img", tabindex: "0", "aria-label": label });
    this.when = el("li", { class: "when" });
    this.values = parts.map(() => el("span"));
    const items = parts.map((part, index) => el(
      "li", {},
      el("span", { class: `swatch ${part.kind}`, "aria-hidden": "true" }),
      el("span", { class: "name", text: `${part.name} ` }),
      this.values[index],
    ));
    host.append(this.svg, el("ul", { class: "legend" }, ...items, this.when));
    new ResizeObserver(() => this.#resize()).observe(this.svg);
    this.svg.addEventListener("pointermove", (event) => this.#choose(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.#unchoose());
    this.svg.addEventListener("blur", () => this.#unchoose());
    this.svg.addEventListener("keydown", (event) => this.#walk(event));
  }

  /** Show these points; `now` is the right edge, in Unix seconds. */
  show(points, now) {
    this.#points = points.filter((point) => point.at >= now - SPAN_S);
    this.#now = now;
    this.#draw();
  }

  #resize() {
    this.#width = this.svg.clientWidth;
    this.#height = this.svg.clientHeight;
    this.#draw();
  }

  #x(at) {
    return LEFT + (this.#width - LEFT - RIGHT) * (1 - (this.#now - at) / SPAN_S);
  }

  #draw() {
    if (this.#width < LEFT + 60) return; // hidden, or not laid out yet
    const top = this.#top();
    const y = (value) => TOP + (this.#height - TOP - BOTTOM) * (1 - value / top);
    const parts = [...this.#grid(top, y)];
    if (this.#points.length === 0) {
      parts.push(svg("text", { class: "empty", x: this.#width / 2, y: this.#height / 2, text: "nothing was heard yet" }));
    }
    for (const part of this.parts) {
      const path = this.#runs(part).map((run) => this.#path(run, part, y)).join("");
      if (path) parts.push(svg("path", { class: `${part.base ? "area" : "line"} ${part.kind}`, d: path }));
    }
    const point = this.#chosen ?? this.#points[this.#points.length - 1];
    if (this.#chosen) {
      const x = this.#x(this.#chosen.at);
      parts.push(svg("line", { class: "cross", x1: x, x2: x, y1: TOP, y2: this.#height - BOTTOM }));
    }
    this.svg.replaceChildren(...parts);
    this.#tell(point);
  }

  #tell(point) {
    const words = this.parts.map((part, index) => {
      const value = point ? (part.shown ?? part.value)(point) : null;
      const text = known(value) ? this.format(value) : UNKNOWN;
      setText(this.values[index], text);
      return `${part.name} ${text}`;
    });
    const moment = this.#chosen ? `at ${clock(point.at)}` : "latest";
    setText(this.when, moment);
    this.svg.setAttribute("aria-label", `${this.label}, ${moment}: ${words.join(", ")}. Arrow keys go back in time.`);
  }

  /** Upper end of the axis: a whole number of steps above everything that is drawn. */
  #top() {
    let most = 0;
    for (const point of this.#points) {
      for (const part of this.parts) most = Math.max(most, part.value(point) ?? 0);
    }
    this.tick = this.step(most * 1.04);
    return this.tick * Math.max(1, Math.ceil((most * 1.04) / this.tick));
  }

  * #grid(top, y) {
    for (let value = 0; value <= top * 1.001; value += this.tick) {
      const line = Math.round(y(value));
      yield svg("line", { class: "grid", x1: LEFT, x2: this.#width - RIGHT, y1: line, y2: line });
      yield svg("text", { x: LEFT - 7, y: line + 4, "text-anchor": "end", text: this.format(value, true) });
    }
    const every = this.#width < 420 ? 2 * TICK_S : TICK_S;
    const first = Math.ceil((this.#now - SPAN_S) / every) * every;
    for (let at = first; at <= this.#now; at += every) {
      const x = Math.round(this.#x(at));
      if (x < LEFT + 4 || x > this.#width - RIGHT - 4) continue;
      const anchor = x > this.#width - 26 ? "end" : x < LEFT + 16 ? "start" : "middle";
      yield svg("line", { class: "grid", x1: x, x2: x, y1: this.#height - BOTTOM, y2: this.#height - BOTTOM + 4 });
      yield svg("text", { x, y: this.#height - 5, "text-anchor": anchor, text: shortClock(at) });
    }
  }

  /** Points in a row: what was not watched is left empty, not drawn as a slope. */
  #runs(part) {
    const runs = [];
    let last = null;
    for (const point of this.#points) {
      if (!known(part.value(point))) {
        last = null;
        continue;
      }
      if (last === null || point.at - last > this.gap) runs.push([]);
      runs[runs.length - 1].push(point);
      last = point.at;
    }
    return runs;
  }

  #path(run, part, y) {
    const edge = run.map((point) => `${this.#x(point.at).toFixed(1)},${y(part.value(point)).toFixed(1)}`);
    // A single point is drawn as wide as the time it stands for.
    if (run.length === 1) edge.push(`${(this.#x(run[0].at) + 1.5).toFixed(1)},${y(part.value(run[0])).toFixed(1)}`);
    if (!part.base) return `M${edge.join("L")}`;
    const back = [...run].reverse().map((p) => `${this.#x(p.at).toFixed(1)},${y(part.base(p) ?? 0).toFixed(1)}`);
    if (run.length === 1) back.unshift(`${(this.#x(run[0].at) + 1.5).toFixed(1)},${y(part.base(run[0]) ?? 0).toFixed(1)}`);
    return `M${edge.join("L")}L${back.join("L")}Z`;
  }

  #choose(offset) {
    const at = this.#now - SPAN_S * (1 - (offset - LEFT) / (this.#width - LEFT - RIGHT));
    let nearest = null;
    for (const point of this.#points) {
      if (nearest === null || Math.abs(point.at - at) < Math.abs(nearest.at - at)) nearest = point;
    }
    this.#chosen = nearest;
    this.#draw();
  }

  #unchoose() {
    this.#chosen = null;
    this.#draw();
  }

  #walk(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -30, PageDown: 30 }[event.key];
    if (event.key === "Escape") return this.#unchoose();
    if (steps === undefined || this.#points.length === 0) return undefined;
    event.preventDefault();
    const last = this.#points.length - 1;
    const index = this.#chosen ? this.#points.findIndex((point) => point.at >= this.#chosen.at) : last;
    this.#chosen = this.#points[Math.min(last, Math.max(0, (index < 0 ? last : index) + steps))];
    return this.#draw();
  }
}

/** Steps of an axis of bytes: powers of two, about four of them. */
export function stepOfBytes(most) {
  return 2 ** Math.max(10, Math.ceil(Math.log2(Math.max(1, most) / 5)));
}

/** Steps of an axis of counts: 1, 2 or 5 times a power of ten. */
export function stepOfCounts(most) {
  const rough = Math.max(1, most / 4);
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
}
