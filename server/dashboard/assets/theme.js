// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// The button that goes through auto, light and dark.

const THEMES = ["auto", "light", "dark"];

/** Make `button` change the theme. */
export function installTheme(button) {
  const root = document.documentElement;
  const show = () => {
    button.textContent = `Theme: ${root.dataset.theme ?? "auto"}`;
  };
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "auto") + 1) % THEMES.length];
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    remember(next);
    show();
  });
  show();
}

function remember(theme) {
  try {
    localStorage.setItem("deltamem-theme", theme);
  } catch {
    // Storage is closed to this page: the choice holds until it is left.
  }
}
