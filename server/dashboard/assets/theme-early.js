// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// Runs before the first paint. Theme: what the reader chose, or nothing, which follows the system.
"use strict";

try {
  const chosen = localStorage.getItem("deltamem-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is closed to this page: the system's theme is as good.
}
