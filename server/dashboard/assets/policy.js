// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// The policy's settings as the server resolved them; those that differ from the defaults stand out.

import { askJson } from "./ask.js";
import { el, setText } from "./dom.js";

export class Policy {
  #meaning = null;

  constructor(host, hint) {
    this.host = host;
    this.hint = hint;
  }

  /** Ask for the settings at `path` and show them. Throws `Refused`. */
  async load(path, signal) {
    // Defaults and meanings come with the page. A server of another version may have further settings.
    this.#meaning ??= await askJson("dashboard/assets/settings.json", signal);
    const { config, version } = await askJson(path, signal);
    const rows = Object.entries(config).map(([name, value]) => this.#row(name, value));
    const changed = rows.filter((row) => row.classList.contains("changed")).length;
    setText(this.hint, `deltamem ${version} · ${changed} not at the default`);
    this.host.replaceChildren(el("table", { class: "list settings" }, el("tbody", {}, ...rows)));
  }

  /** Say why there are none. */
  say(reason) {
    setText(this.hint, "");
    this.host.replaceChildren(el("p", { class: "nothing", text: reason }));
  }

  #row(name, value) {
    const meaning = this.#meaning[name];
    const changed = meaning !== undefined && JSON.stringify(meaning.default) !== JSON.stringify(value);
    const title = meaning === undefined ? name
      : el("details", {}, el("summary", { text: name }), el("p", { text: meaning.help }));
    const cell = el("td", { title: words(value) }, brief(value));
    if (changed) cell.append(el("span", { class: "mark hint", text: `default ${words(meaning.default)}` }));
    return el("tr", { class: changed ? "changed" : null }, el("th", { scope: "row", class: "left" }, title), cell);
  }
}

/** Of a path, its end: the rest is in the title. */
function brief(value) {
  return typeof value === "string" && value.startsWith("/") ? `…/${value.split("/").pop()}` : words(value);
}

function words(value) {
  if (value === null) return "none";
  return Array.isArray(value) ? value.join(", ") || "none" : String(value);
}
