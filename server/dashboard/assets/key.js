// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// Asking for the key. It is kept in sessionStorage: in this tab, until it is closed.

import { key } from "./ask.js";
import { byId, setText } from "./dom.js";

/** Wire the dialog; returns the function that opens it with a reason. `onKey` is called when the key changed. */
export function installKey(onKey) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  const forget = byId("key-forget");
  forget.hidden = key.get() === null;
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set(input.value);
    input.value = "";
    forget.hidden = false;
    dialog.close();
    onKey();
  });
  byId("key-cancel").addEventListener("click", () => {
    input.value = "";
    dialog.close();
  });
  forget.addEventListener("click", () => {
    key.forget();
    forget.hidden = true;
    onKey();
  });
  return (reason) => {
    const wrong = key.get() !== null;
    setText(byId("key-reason"), wrong ? "The key that this tab has is not the right one." : reason);
    if (!dialog.open) dialog.showModal();
    input.focus();
  };
}
