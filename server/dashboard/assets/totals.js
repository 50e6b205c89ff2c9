// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// Numbers of a server, added up over its engines, or those of one engine. What a server does not tell is null.

import { known } from "./format.js";

/** Engines of an answer of /deltamem/stats; `engine` null takes all. */
export function enginesOf(stats, engine) {
  return stats.engines.filter((one) => engine === null || one.engine === engine);
}

/** What the time-lines show of one engine. Bytes are those of one tensor-parallel rank, as in the answer. */
export function pointOf(one) {
  const { blocks, free_blocks: free, block_bytes: size } = one.pool ?? {};
  const levels = one.totals?.levels ?? {};
  const hot = number(levels.tier_bytes?.hot);
  const cold = number(levels.tier_bytes?.cold);
  return {
    pool: product(blocks, size),
    used: known(free) ? product(blocks - free, size) : null,
    hot,
    cold,
    logicalBytes: number(levels.logical_bytes),
    seen: number(levels.logical_tokens),
    held: number(levels.resident_tokens),
  };
}

/** Sum of several points, with what follows from it. */
export function sumOf(points) {
  const total = {};
  for (const name of ["pool", "used", "hot", "cold", "logicalBytes", "seen", "held"]) {
    total[name] = sum(points.map((point) => point[name]));
  }
  const { used, hot, cold, logicalBytes, pool } = total;
  const all = sum([hot, cold]);
  // Blocks that requests share count once in the pool and once for each request: `all` may exceed what is used.
  total.other = known(used) && known(all) ? Math.max(0, used - all) : null;
  total.free = known(pool) && known(used) && known(all) ? Math.max(0, pool - Math.max(used, all)) : null;
  total.tiers = all;
  total.saved = known(logicalBytes) && known(all) ? logicalBytes - all : null;
  return total;
}

/** Counters of the chosen engines by name; a counter with labels is an object of sums. */
export function countersOf(stats, engine) {
  const found = {};
  for (const one of enginesOf(stats, engine)) {
    for (const [name, value] of Object.entries(one.totals?.counters ?? {})) {
      if (known(value)) found[name] = (found[name] ?? 0) + value;
      else for (const [label, part] of Object.entries(value ?? {})) {
        found[name] ??= {};
        found[name][label] = (found[name][label] ?? 0) + part;
      }
    }
  }
  return found;
}

/** Sum of a field of `requests` over the chosen engines. */
export function requestsOf(stats, engine, name) {
  return sum(enginesOf(stats, engine).map((one) => number(one.requests?.[name])));
}

/** All of a counter with labels, or null where there is none. */
export function totalOf(byLabel) {
  return byLabel === undefined || byLabel === null ? null : sum(Object.values(byLabel));
}

function number(value) {
  return known(value) ? value : null;
}

function product(one, other) {
  return known(one) && known(other) ? one * other : null;
}

function sum(values) {
  return values.every(known) ? values.reduce((one, other) => one + other, 0) : null;
}
