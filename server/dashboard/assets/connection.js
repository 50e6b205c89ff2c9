// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// One stream that is kept open: connects again with growing pauses, and says honestly how it is.

import { ask, Refused } from "./ask.js";
import { readEvents } from "./events-stream.js";

const FIRST_WAIT_S = 1;
const LONGEST_WAIT_S = 30;
// The server sends at least a comment every 15 s.
const SILENCE_S = 40;

/**
 * States, as told to `onState({kind, reason, retryAt})`:
 * connecting, live, failing (the stream lives, the engines do not answer), waiting (for the next attempt),
 * locked (a key is needed), stopped.
 */
export class Connection {
  #stop = null;

  constructor(onEvent, onState) {
    this.onEvent = onEvent;
    this.onState = onState;
  }

  /** Follow `path`, instead of whatever was followed before. */
  start(path) {
    this.stop();
    const stopped = new AbortController();
    this.#stop = stopped;
    this.#run(path, stopped.signal).catch((error) => {
      if (stopped.signal.aborted) return;
      // A mistake in this page: it must not go on looking alive.
      this.onState({ kind: "failing", reason: `the page failed: ${error.message}` });
      throw error;
    });
  }

  /** Follow nothing. */
  stop() {
    this.#stop?.abort();
    this.#stop = null;
  }

  async #run(path, signal) {
    let wait = FIRST_WAIT_S;
    let attempt = 0;
    let reason = null;
    while (!signal.aborted) {
      attempt += 1;
      this.onState({ kind: "connecting", reason, attempt });
      try {
        await this.#follow(path, signal, () => {
          wait = FIRST_WAIT_S;
          attempt = 0;
        });
        reason = "the server ended the stream";
      } catch (error) {
        if (signal.aborted) return;
        if (error instanceof Refused && error.status === 401) {
          this.onState({ kind: "locked", reason: error.message });
          return;
        }
        if (!(error instanceof Refused)) throw error;
        reason = error.status > 0 ? `HTTP ${error.status}: ${error.message}` : error.message;
      }
      if (signal.aborted) return;
      // Spread out, so that a restarted server is not met by all open pages at once.
      const pause = wait * (0.8 + 0.4 * Math.random());
      this.onState({ kind: "waiting", reason, attempt, retryAt: Date.now() / 1000 + pause });
      await sleep(pause, signal);
      wait = Math.min(LONGEST_WAIT_S, 2 * wait);
    }
  }

  async #follow(path, signal, onWorking) {
    const silence = new AbortController();
    const either = AbortSignal.any([signal, silence.signal]);
    let timer = setTimeout(() => silence.abort(), 1000 * SILENCE_S);
    try {
      const answer = await ask(path, either);
      for await (const { kind, data } of readEvents(answer.body)) {
        if (signal.aborted) return;
        clearTimeout(timer);
        timer = setTimeout(() => silence.abort(), 1000 * SILENCE_S);
        if (kind === null) continue;
        if (kind === "state") {
          onWorking();
          this.onState({ kind: "live" });
        } else if (kind === "error") {
          this.onState({ kind: "failing", reason: String(data.reason) });
        }
        this.onEvent(kind, data);
      }
    } catch (error) {
      if (signal.aborted || error instanceof Refused) throw error;
      if (silence.signal.aborted) throw new Refused(`nothing was heard for ${SILENCE_S} s`, 0);
      // What a broken connection looks like, and an event cut in two by it.
      if (error instanceof TypeError || error instanceof SyntaxError) throw new Refused("the connection broke", 0);
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }
}

function sleep(seconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    }, { once: true });
  });
}
