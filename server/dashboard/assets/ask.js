// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// Questions to the server that this page came from, with the key that was entered in this tab.

const KEY = "deltamem-key";

/** An answer other than 200, or none. `status` is 0 without an answer. */
export class Refused extends Error {
  constructor(reason, status) {
    super(reason);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** Ask `path`, below /deltamem/. Returns the response; throws `Refused` with the server's reason. */
export async function ask(path, signal) {
  const given = key.get();
  const headers = given === null ? {} : { Authorization: `Bearer ${given}` };
  let answer;
  try {
    answer = await fetch(path, { headers, signal, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server cannot be reached", 0);
  }
  if (!answer.ok) throw new Refused(await reasonOf(answer), answer.status);
  return answer;
}

/** As `ask`, for an answer in JSON. */
export async function askJson(path, signal) {
  return (await ask(path, signal)).json();
}

async function reasonOf(answer) {
  const text = await answer.text().catch(() => "");
  try {
    const { reason } = JSON.parse(text);
    if (typeof reason === "string") return reason;
  } catch {
    // Not ours: some proxy's page. Its status is all that is of use.
  }
  return `HTTP ${answer.status} without a reason`;
}
