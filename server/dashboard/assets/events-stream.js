// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
// Server-sent events over fetch: the browser's own EventSource can send no Authorization header.

/** Yield `{kind, data}` for every event and `{kind: null}` for every comment of a response's body. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let kind = "message";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length > 0) yield { kind, data: JSON.parse(data.join("\n")) };
          kind = "message";
          data = [];
        } else if (line.startsWith(":")) {
          yield { kind: null };
        } else {
          const colon = line.indexOf(":");
          const name = colon < 0 ? line : line.slice(0, colon);
          const text = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
          if (name === "event") kind = text;
          else if (name === "data") data.push(text);
        }
      }
    }
  } finally {
    await reader.cancel().catch(() => {}); // it may be broken already, which whoever reads has heard
  }
}
