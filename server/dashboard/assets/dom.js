// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// Elements. Everything that comes from a server becomes text, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** Make an HTML element. `given`: attributes; `null` and `false` leave one out. Children: elements or text. */
export function el(tag, given = {}, ...children) {
  return fill(document.createElement(tag), given, children);
}

/** Make an SVG element. */
export function svg(tag, given = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), given, children);
}

/** Look up an element of the page, which must be there. */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no element #${id}`);
  return found;
}

/** Set the text, but only if it is another one: a screen reader then stays where it is. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Width in per cent. Through the object model: the content security policy forbids style attributes. */
export function setWidth(element, share) {
  element.style.width = `${(100 * Math.min(1, Math.max(0, share))).toFixed(2)}%`;
}

function fill(element, given, children) {
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
