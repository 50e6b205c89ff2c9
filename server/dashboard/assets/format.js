// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// Numbers as people read them. What is not known is a dash, never a zero.

export const UNKNOWN = "–";

const COUNT = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const SHORT_CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });

/** Whether it is a number to show. */
export const known = (value) => typeof value === "number" && Number.isFinite(value);

/** 1.5 GiB */
export function bytes(value) {
  if (!known(value)) return UNKNOWN;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = Math.abs(value);
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || size >= 100 ? 0 : 1;
  return `${value < 0 ? "-" : ""}${size.toFixed(digits)} ${units[unit]}`;
}

/** 12,345 */
export const count = (value) => (known(value) ? COUNT.format(value) : UNKNOWN);

/** 12.3K, for axes */
export const compact = (value) => (known(value) ? COMPACT.format(value) : UNKNOWN);

/** 26%; nothing of nothing is unknown */
export function share(part, whole = 1) {
  if (!known(part) || !known(whole) || whole === 0) return UNKNOWN;
  const percent = (100 * part) / whole;
  return `${percent > 0 && percent < 9.95 ? percent.toFixed(1) : percent.toFixed(0)}%`;
}

/** 3m 20s */
export function duration(seconds) {
  if (!known(seconds)) return UNKNOWN;
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m ${whole % 60}s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}h ${Math.floor((whole % 3600) / 60)}m`;
  return `${Math.floor(whole / 86400)}d ${Math.floor((whole % 86400) / 3600)}h`;
}

/** A rate without its unit: 12, 1.2, 0.12 */
export function rate(value) {
  if (!known(value)) return UNKNOWN;
  if (value >= 10 || value === 0) return count(value);
  return value >= 0.1 ? value.toFixed(1) : value.toFixed(2);
}

/** Unix seconds as 16:04:12 */
export const clock = (at) => (known(at) ? CLOCK.format(at * 1000) : UNKNOWN);

/** Unix seconds as 16:04 */
export const shortClock = (at) => SHORT_CLOCK.format(at * 1000);
