// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// Puts the page together: one connection, what it tells, and who shows it.

import { askJson, Refused } from "./ask.js";
import { Connection } from "./connection.js";
import { byId, setText } from "./dom.js";
import { bytes, compact, duration } from "./format.js";
import { Events } from "./events.js";
import { HeatMap } from "./heatmap.js";
import { installKey } from "./key.js";
import { Past } from "./past.js";
import { Policy } from "./policy.js";
import { Requests } from "./requests.js";
import { Servers } from "./servers.js";
import { StateLine } from "./state-line.js";
import { installTheme } from "./theme.js";
import { Tiles } from "./tiles.js";
import { stepOfBytes, stepOfCounts, Timeline } from "./timeline.js";
import { countersOf, enginesOf, pointOf, sumOf } from "./totals.js";

const WATCHING = document.documentElement.dataset.watching === "yes";
const HEAT_S = 4;
const axisBytes = (value, axis) => (axis && value === 0 ? "0" : bytes(value));

const view = { ...fromAddress(), last: null, request: null, servers: [] };
const past = new Past(WATCHING ? "watched" : "own");
const tiles = new Tiles(byId("tiles"));
const poolLine = new Timeline(byId("pool-chart"), {
  label: "KV pool by tier",
  format: axisBytes,
  step: stepOfBytes,
  parts: [
    { name: "hot", kind: "hot", value: (p) => p.hot, base: () => 0 },
    { name: "cold", kind: "cold", value: (p) => p.tiers, base: (p) => p.hot, shown: (p) => p.cold },
    { name: "other", kind: "other", value: (p) => (p.other > 0 ? p.tiers + p.other : p.tiers), base: (p) => p.tiers, shown: (p) => p.other },
    { name: "pool", kind: "pool", value: (p) => p.pool },
  ],
});
const tokenLine = new Timeline(byId("tokens-chart"), {
  label: "Tokens seen and slots held",
  format: compact,
  step: stepOfCounts,
  parts: [
    { name: "slots held", kind: "held", value: (p) => p.held, base: () => 0 },
    { name: "slots saved", kind: "saved", value: (p) => p.seen, base: (p) => p.held, shown: (p) => p.seen - p.held },
    { name: "tokens seen", kind: "seen", value: (p) => p.seen },
  ],
});
const requests = new Requests(byId("requests"), byId("requests-count"), openRequest);
const heat = new HeatMap(byId("heat-body"), closeRequest);
const events = new Events(byId("events"));
const policy = new Policy(byId("policy"), byId("policy-hint"));
const servers = new Servers(byId("servers"), chooseServer);
const askForKey = installKey(connect);
const stateLine = new StateLine(() => view, () => Number(byId("interval").value));
const connection = new Connection(onEvent, onState);

/** Path of a route of the server in view. */
function route(path) {
  return WATCHING ? `servers/${view.server}/${path}` : path;
}

function connect() {
  connection.start(`${route("stream")}?interval=${byId("interval").value}`);
}

function onState(state) {
  const before = stateLine.kind;
  stateLine.set(state);
  if (state.kind === "locked") askForKey(state.reason);
  if (state.kind === "live" && before !== "live") loadPolicy();
}

function onEvent(kind, data) {
  if (kind === "servers") {
    view.servers = data;
    servers.show(data, view.server);
  } else if (kind === "history") {
    past.addEarlier(view.server, data);
    if (view.last === null) drawLines(data[data.length - 1].at);
  } else if (kind === "state") {
    past.add(view.server, data.at, data.stats);
    // Age is counted from the arrival: the clocks of two machines differ.
    view.last = { ...data, heard: Date.now() / 1000 };
    draw();
  }
}

function draw() {
  const { at, stats, requests: live } = view.last;
  setText(byId("model"), stats.model);
  document.title = `${stats.model} · deltamem`;
  fillEngines(stats.engines.map((one) => one.engine));
  const now = sumOf(enginesOf(stats, view.engine).map(pointOf));
  const counters = countersOf(stats, view.engine);
  tiles.show(stats, view.engine, now, counters, past.rates(view.server, view.engine, at, counters));
  requests.show(live, view.engine);
  events.show(stats, view.engine, counters);
  stateLine.tick();
  drawLines(at);
}

function drawLines(at) {
  if (document.hidden) return;
  const points = past.of(view.server, view.engine);
  poolLine.show(points, at);
  tokenLine.show(points, at);
}

function fillEngines(numbers) {
  const select = byId("engine");
  byId("engine-choice").hidden = numbers.length < 2;
  if (!numbers.includes(view.engine)) view.engine = null;
  const wanted = ["all", ...numbers.map(String)];
  if ([...select.options].map((one) => one.value).join() !== wanted.join()) {
    select.replaceChildren(...wanted.map((value) => new Option(value, value)));
  }
  select.value = view.engine === null ? "all" : String(view.engine);
}

async function loadPolicy() {
  const asked = view.server;
  try {
    await policy.load(route("config"));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (asked === view.server) policy.say(`The settings are not known: ${error.message}`);
  }
}

function openRequest(chosen) {
  view.request = chosen;
  view.heatAt = null;
  requests.choose(chosen);
  heat.open(chosen.id);
  askLayers();
  // On a narrow page the map is far below the table; on a wide one it stands beside it.
  if (matchMedia("(min-width: 1020px)").matches) return;
  const smooth = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  byId("heat").scrollIntoView({ block: "nearest", behavior: smooth ? "smooth" : "auto" });
}

function closeRequest() {
  view.request = null;
  requests.choose(null);
  heat.close();
  setText(byId("heat-age"), "");
}

async function askLayers() {
  const chosen = view.request;
  if (chosen === null || view.asking || document.hidden) return;
  const row = requests.find(chosen);
  if (row === undefined) {
    heat.say("This request is not among the live ones any more.");
    return;
  }
  if (row.status !== "running") {
    heat.say(`This request is ${row.status}: it holds nothing to look at now.`);
    return;
  }
  view.asking = true;
  try {
    const path = `requests/${encodeURIComponent(chosen.id)}/layers?engine=${chosen.engine}`;
    const told = await askJson(route(path));
    if (view.request !== chosen) return;
    heat.show(told);
    view.heatAt = Date.now() / 1000;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (view.request === chosen) heat.say(error.message);
  } finally {
    view.asking = false;
  }
  // Another one was chosen meanwhile.
  if (view.request !== null && view.request !== chosen) askLayers();
}

function chooseServer(number) {
  if (number === view.server) return;
  closeRequest();
  Object.assign(view, { server: number, engine: null, last: null });
  toAddress();
  policy.say("asking the server …");
  servers.show(view.servers, number);
  unpause();
  connect();
}

function unpause() {
  byId("pause").setAttribute("aria-pressed", "false");
  setText(byId("pause"), "Pause");
}

function togglePause() {
  if (byId("pause").getAttribute("aria-pressed") === "true") {
    unpause();
    connect();
    return;
  }
  byId("pause").setAttribute("aria-pressed", "true");
  setText(byId("pause"), "Go on");
  connection.stop();
  stateLine.set({ kind: "paused" });
}

// Which server and engine is in view is part of the address, so that it can be kept and shared.
function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const number = (name) => (/^\d+$/.test(given.get(name) ?? "") ? Number(given.get(name)) : null);
  return { server: number("server") ?? 0, engine: number("engine") };
}

function toAddress() {
  const parts = new URLSearchParams();
  if (WATCHING) parts.set("server", view.server);
  if (view.engine !== null) parts.set("engine", view.engine);
  history.replaceState(null, "", `#${parts}`);
}

installTheme(byId("theme"));
byId("pause").addEventListener("click", togglePause);
byId("interval").addEventListener("change", () => {
  unpause();
  connect();
});
byId("engine").addEventListener("change", (event) => {
  view.engine = event.target.value === "all" ? null : Number(event.target.value);
  toAddress();
  if (view.last !== null) draw();
});
byId("key-open").addEventListener("click", () => askForKey("The server's API key."));
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && view.last !== null) drawLines(view.last.at);
});
addEventListener("pagehide", () => past.save());
setInterval(() => {
  stateLine.tick();
  if (view.request !== null && view.heatAt) {
    setText(byId("heat-age"), `${duration(Date.now() / 1000 - view.heatAt)} old`);
  }
}, 1000);
setInterval(() => {
  if (stateLine.kind === "live") askLayers();
}, 1000 * HEAT_S);
connect();
