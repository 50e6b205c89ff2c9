// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// The strip of servers of the stand-alone dashboard: how each of them is, and which one is shown.

import { el, setText, setWidth } from "./dom.js";
import { bytes, count, duration, known, share } from "./format.js";

export class Servers {
  #cards = [];

  constructor(host, onChoose) {
    this.host = host;
    this.onChoose = onChoose;
  }

  /** Show the entries of /deltamem/servers; `chosen` is the number of the one in view. */
  show(servers, chosen) {
    this.host.hidden = false;
    while (this.#cards.length < servers.length) this.#add(this.#cards.length);
    servers.forEach((server, index) => this.#fill(this.#cards[index], server, index === chosen));
  }

  #add(number) {
    const card = { name: el("span", { class: "name" }), use: el("span", { class: "use" }), more: el("span", { class: "more" }), fill: el("i") };
    card.button = el("button", { type: "button", onclick: () => this.onChoose(number) },
      el("span", { class: "dot", "aria-hidden": "true" }), card.name, card.use,
      el("span", { class: "meter", "aria-hidden": "true" }, card.fill), card.more);
    this.#cards.push(card);
    this.host.append(card.button);
  }

  #fill({ button, name, use, more, fill }, server, chosen) {
    button.dataset.status = server.status;
    if (chosen) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
    button.title = server.url;
    setText(name, server.name);
    const live = server.status === "live";
    setText(use, live ? share(server.used_bytes, server.pool_bytes) : server.status);
    setText(more, live ? `${server.model ?? "?"} · ${count(server.running)} running · ${count(server.waiting)} waiting · ${bytes(server.pool_bytes)}`
      : whyDown(server));
    setWidth(fill, live && known(server.used_bytes) && server.pool_bytes > 0 ? server.used_bytes / server.pool_bytes : 0);
  }
}

function whyDown(server) {
  const since = duration(Date.now() / 1000 - server.since);
  return server.status === "down" ? `for ${since}: ${server.reason ?? "no reason told"}` : "first answer awaited";
}
