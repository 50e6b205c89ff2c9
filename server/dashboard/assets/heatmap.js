// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// What one request keeps in each layer and kv head, as a table whose cells are coloured.

import { el, setText } from "./dom.js";
import { count, known, share } from "./format.js";

const MEASURES = [["all", "All kept"], ["hot", "Hot"], ["cold", "Cold"]];
// Up to so many rows are drawn high; more than so many low.
const FEW_ROWS = 6;
const MANY_ROWS = 12;
// Narrower than this, layers go down instead of across.
const NARROW = 460;

export class HeatMap {
  #told = null;
  #measure = "all";
  #at = { row: 0, column: 0 };

  constructor(host, onClose) {
    this.host = host;
    this.nothing = el("p", { class: "nothing", text: "Choose a request in the table to see what it keeps, layer by layer." });
    this.id = el("div", { class: "heat-id" });
    this.note = el("p", { class: "hint", role: "status" });
    this.map = el("div", { class: "heat-map" });
    this.readout = el("div", { class: "heat-readout", role: "status" });
    this.low = el("span", { text: "0" });
    this.high = el("span");
    this.legend = el("div", { class: "heat-legend" }, this.low, el("span", { class: "ramp", "aria-hidden": "true" }), this.high);
    this.whole = el("div", { hidden: true },
      this.id,
      el("div", { class: "heat-tools" }, this.#choice(), el("button", { type: "button", text: "Close", onclick: onClose })),
      this.map,
      this.legend,
      this.readout,
    );
    host.append(this.nothing, this.whole, this.note);
    new ResizeObserver(() => this.#turn()).observe(host);
  }

  /** Wait for the numbers of a request that was chosen. */
  open(id) {
    this.#told = null;
    this.#at = { row: 0, column: 0 };
    this.nothing.hidden = true;
    this.whole.hidden = false;
    setText(this.id, id);
    this.id.title = id;
    this.map.replaceChildren();
    this.legend.hidden = true;
    setText(this.readout, "");
    setText(this.note, "asking the server …");
  }

  /** Show an answer of /deltamem/requests/{id}/layers. */
  show(told) {
    const focused = this.map.contains(document.activeElement);
    this.#told = told;
    this.legend.hidden = false;
    setText(this.note, "");
    this.#draw();
    if (focused) this.#cell()?.focus({ preventScroll: true });
  }

  /** Say why there are no newer numbers; those shown stay. */
  say(note) {
    setText(this.note, note);
  }

  close() {
    this.#told = null;
    this.whole.hidden = true;
    this.nothing.hidden = false;
    setText(this.note, "");
  }

  #choice() {
    const radios = MEASURES.map(([value, name]) => el("label", {},
      el("input", { type: "radio", name: "measure", value, checked: value === this.#measure, onchange: () => {
        this.#measure = value;
        this.#draw();
      } }), name));
    return el("fieldset", { class: "choice" }, el("legend", { class: "out-of-sight", text: "Tokens to show" }), ...radios);
  }

  #value(layer, head) {
    const { hot_tokens: hot, cold_tokens: cold } = this.#told;
    if (this.#measure === "hot") return hot[layer][head];
    return this.#measure === "cold" ? cold[layer][head] : hot[layer][head] + cold[layer][head];
  }

  /** Lay the map out anew if the page became narrow or wide. */
  #turn() {
    if (this.#told !== null && this.#isNarrow() !== this.narrow) this.#draw();
  }

  #isNarrow() {
    return this.host.clientWidth < NARROW;
  }

  #draw() {
    if (this.#told === null) return;
    const { layers, kv_heads: heads, logical_tokens: seen } = this.#told;
    this.narrow = this.#isNarrow();
    const [rows, columns] = this.narrow ? [layers, heads] : [heads, layers];
    let most = 0;
    for (let layer = 0; layer < layers; layer += 1) {
      for (let head = 0; head < heads; head += 1) most = Math.max(most, this.#value(layer, head));
    }
    this.whole.dataset.measure = this.#measure;
    this.map.dataset.rows = rows <= FEW_ROWS ? "few" : rows > MANY_ROWS ? "many" : "some";
    this.map.replaceChildren(this.#table(rows, columns, most));
    setText(this.high, `${count(most)} tokens${seen > 0 ? ` (${share(most, seen)} of ${count(seen)} seen)` : ""}`);
    setText(this.readout, `Mean ${count(this.#mean())} tokens a head. Point at a cell, or use the arrow keys.`);
  }

  #mean() {
    const { layers, kv_heads: heads } = this.#told;
    let sum = 0;
    for (let layer = 0; layer < layers; layer += 1) for (let head = 0; head < heads; head += 1) sum += this.#value(layer, head);
    return sum / (layers * heads);
  }

  #table(rows, columns, most) {
    const [down, across] = this.narrow ? ["layer", "head"] : ["head", "layer"];
    const every = columns > 48 ? 10 : columns > 10 ? 5 : 1;
    const heads = Array.from({ length: columns }, (_, column) => el("th", { scope: "col" },
      column % every === 0 ? `${column}` : el("span", { class: "out-of-sight", text: `${across} ${column}` })));
    const bodies = Array.from({ length: rows }, (_, row) => el("tr", {},
      el("th", { scope: "row", text: `${down} ${row}` }),
      ...Array.from({ length: columns }, (__, column) => this.#make(row, column, most))));
    return el("table", { role: "grid", "aria-label": `Tokens kept by ${across} and ${down}`,
      onkeydown: (event) => this.#walk(event, rows, columns) },
    el("thead", {}, el("tr", {}, el("th", { class: "corner", text: across }), ...heads)), el("tbody", {}, ...bodies));
  }

  #make(row, column, most) {
    const [layer, head] = this.narrow ? [row, column] : [column, row];
    const value = this.#value(layer, head);
    const here = row === this.#at.row && column === this.#at.column;
    const point = () => this.#tell(layer, head);
    const cell = el("td", { role: "gridcell", tabindex: here ? "0" : "-1", "data-row": row, "data-column": column,
      "data-value": value, onpointerenter: point, onfocus: point },
    el("span", { class: "out-of-sight", text: count(value) }));
    cell.style.setProperty("--v", most > 0 ? (value / most).toFixed(4) : "0");
    return cell;
  }

  #tell(layer, head) {
    const { hot_tokens: hot, cold_tokens: cold, logical_tokens: seen } = this.#told;
    const [exact, coded] = [hot[layer][head], cold[layer][head]];
    const kept = known(seen) && seen > 0 ? ` · ${share(exact + coded, seen)} of what was seen` : "";
    setText(this.readout, `Layer ${layer}, head ${head}: ${count(exact)} hot + ${count(coded)} cold = ${count(exact + coded)} tokens${kept}`);
  }

  #cell() {
    return this.map.querySelector(`td[data-row="${this.#at.row}"][data-column="${this.#at.column}"]`);
  }

  #walk(event, rows, columns) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const inside = (value, end) => Math.min(end - 1, Math.max(0, value));
    this.#cell()?.setAttribute("tabindex", "-1");
    this.#at = { row: inside(this.#at.row + step[0], rows), column: inside(this.#at.column + step[1], columns) };
    const cell = this.#cell();
    cell.setAttribute("tabindex", "0");
    cell.focus();
  }
}
