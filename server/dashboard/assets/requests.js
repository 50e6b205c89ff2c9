// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// The table of requests: sortable, one row chosen for the heat map.

import { el, setText, setWidth } from "./dom.js";
import { bytes, count, duration, share, UNKNOWN } from "./format.js";

const known = (text) => text ?? UNKNOWN;
const policyOf = (row) => [row.mode, row.scorer, row.dealing].filter(Boolean).join(" · ") || "left alone";

// Name, class, whether text, value to sort by, text to show, help.
const COLUMNS = [
  ["Request", "id", true, (row) => row.id, null, "The server's name for it"],
  ["Status", "status", true, (row) => row.status, (row) => known(row.status), "Running, waiting or preempted"],
  ["Kept", "kept", false, (row) => row.kept_share, null, "Bytes it holds, of those it would hold if nothing were evicted"],
  ["Seen", "seen", false, (row) => row.logical_tokens, (row) => count(row.logical_tokens), "Tokens it has computed"],
  ["Held", "resident", false, (row) => row.resident_tokens, (row) => count(row.resident_tokens), "KV slots it holds"],
  ["Hot", "hot", false, (row) => row.hot_bytes, (row) => bytes(row.hot_bytes), "Bytes of tokens in full"],
  ["Cold", "cold", false, (row) => row.cold_bytes, (row) => bytes(row.cold_bytes), "Bytes of tokens in fewer bits"],
  ["Blocks", "blocks", false, (row) => row.blocks, (row) => count(row.blocks), "Blocks of the pool it holds"],
  ["Cut", "compactions", false, (row) => row.compactions, (row) => count(row.compactions), "How often it was compacted"],
  ["Age", "age", false, (row) => row.age_s, (row) => duration(row.age_s), "Since it arrived"],
  ["Policy", "policy", true, policyOf, policyOf, "Mode, scorer and dealing of this request"],
];

export class Requests {
  #rows = new Map();
  #data = [];
  #sort = { column: null, down: true };
  #chosen = null;

  /** `onChoose({engine, id})` is called with the request that was clicked. */
  constructor(host, hint, onChoose) {
    this.hint = hint;
    this.onChoose = onChoose;
    this.heads = COLUMNS.map(([name, kind, isText, , , help], index) => el(
      "th", { scope: "col", class: isText ? `${kind} left` : kind, "aria-sort": "none", title: help },
      el("button", { type: "button", text: name, onclick: () => this.#sortBy(index) }),
    ));
    this.body = el("tbody");
    host.append(el("table", { class: "list requests" }, el("thead", {}, el("tr", {}, ...this.heads)), this.body));
    this.empty = el("tr", {}, el("td", { class: "nothing", colspan: COLUMNS.length }));
  }

  /** Show the requests of an answer of /deltamem/requests. */
  show(requests, engine) {
    const engines = requests.engines.filter((one) => engine === null || one.engine === engine);
    this.#data = engines.flatMap((one) => one.requests.map((row) => ({ ...row, engine: one.engine })));
    const total = engines.reduce((sum, one) => sum + one.total, 0);
    setText(this.hint, total === this.#data.length ? `${count(total)} live`
      : `the ${count(this.#data.length)} largest of ${count(total)}`);
    this.#draw();
  }

  /** Mark the chosen request; null marks none. */
  choose(chosen) {
    this.#chosen = chosen;
    this.#draw();
  }

  /** The row of a request as it was last told, or undefined. */
  find({ engine, id }) {
    return this.#data.find((row) => row.engine === engine && row.id === id);
  }

  #sortBy(index) {
    const isText = COLUMNS[index][2];
    const same = this.#sort.column === index;
    this.#sort = { column: index, down: same ? !this.#sort.down : !isText };
    this.heads.forEach((head, other) => head.setAttribute(
      "aria-sort", other !== index ? "none" : this.#sort.down ? "descending" : "ascending",
    ));
    this.#draw();
  }

  #sorted() {
    const { column, down } = this.#sort;
    if (column === null) return this.#data; // the server's order: largest first
    const value = COLUMNS[column][3];
    const sign = down ? -1 : 1;
    return [...this.#data].sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      return sign * (typeof a === "string" ? a.localeCompare(b) : (a ?? -1) - (b ?? -1));
    });
  }

  #draw() {
    const focused = document.activeElement;
    const live = new Set();
    const rows = this.#sorted().map((data) => {
      const name = `${data.engine} ${data.id}`;
      live.add(name);
      if (!this.#rows.has(name)) this.#rows.set(name, this.#make(data));
      return this.#fill(this.#rows.get(name), data);
    });
    for (const name of this.#rows.keys()) if (!live.has(name)) this.#rows.delete(name);
    if (rows.length === 0) {
      setText(this.empty.firstChild, "No live requests.");
      rows.push(this.empty);
    }
    // Rows that stand where they belong are not touched: a moved element loses the focus and a reader its place.
    if (rows.length !== this.body.children.length || rows.some((row, index) => row !== this.body.children[index])) {
      this.body.replaceChildren(...rows);
      if (focused !== document.activeElement && focused?.isConnected) focused.focus({ preventScroll: true });
    }
  }

  #make(data) {
    const cells = {};
    const row = el("tr");
    for (const [, kind, isText, , text] of COLUMNS) {
      const cell = el("td", { class: isText ? `${kind} left` : kind });
      if (kind === "id") {
        const choose = () => this.onChoose({ engine: data.engine, id: data.id });
        cell.append(el("button", { type: "button", title: data.id, text: data.id, onclick: choose }));
      } else if (kind === "kept") {
        cells.bar = el("i");
        cells.number = el("span", { class: "number" });
        cell.append(el("span", { class: "share", "aria-hidden": "true" }, cells.bar), cells.number);
      }
      if (text) cells[kind] = cell;
      row.append(cell);
    }
    return { row, cells };
  }

  #fill({ row, cells }, data) {
    row.dataset.status = data.status;
    const chosen = this.#chosen !== null && this.#chosen.id === data.id && this.#chosen.engine === data.engine;
    row.setAttribute("aria-current", String(chosen));
    // All of nothing is no share worth showing: it waits for its first step.
    const kept = data.logical_tokens > 0 ? data.kept_share : null;
    setWidth(cells.bar, kept ?? 0);
    setText(cells.number, share(kept));
    for (const [, kind, , , text] of COLUMNS) if (text) setText(cells[kind], text(data));
    return row;
  }
}
