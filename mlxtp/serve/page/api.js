// The server: its key, its errors in words, and its stream of events.

const KEY = "mlxtp.key";

/** What went wrong, in words that are shown as they are. */
export class Failure extends Error {
  constructor(words, status = 0) {
    super(words);
    this.status = status;
  }
}

let asking = null;
let isRefused = false; // the person has closed the dialog: ask again when they act

/** Ask for the key once, however many requests want it. Gives whether there is one. */
function askForKey(wasWrong) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key");
    const form = document.getElementById("key-form");
    const words = document.getElementById("key-words");
    words.textContent = wasWrong
      ? "The server did not take that key."
      : "It is kept until this tab is closed.";
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, form.elements.key.value.trim());
      dialog.close("key");
    };
    dialog.onclose = () => {
      isRefused = dialog.returnValue !== "key";
      form.reset();
      asking = null;
      resolve(!isRefused);
    };
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

async function failure(response) {
  let words = "";
  try {
    words = (await response.json()).error.message;
  } catch {
    // not the server's own form: a proxy's page
  }
  if (response.status === 429) {
    const seconds = response.headers.get("retry-after");
    const when = seconds ? `: try again in ${seconds} s` : "";
    words = `Too many requests wait already${when}.`;
  }
  return new Failure(words || `The server answered ${response.status}.`, response.status);
}

/**
 * Ask the server. `mayAsk` lets a 401 open the dialog for the key again after it was
 * closed without one.
 */
export async function request(path, options = {}, mayAsk = true) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers };
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The server does not answer.");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      if (key !== sessionStorage.getItem(KEY)) continue; // another request has asked
      if ((mayAsk || !isRefused) && (await askForKey(Boolean(key)))) continue;
      throw new Failure("The server wants a key.", 401);
    }
    throw await failure(response);
  }
}

/** Yield the JSON objects of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
  throw new Failure("The connection ended before the answer did.");
}

/** Stream an answer: yields chunks in OpenAI's form. */
export async function* chat(messages, settings, signal) {
  const models = await (await request("v1/models", { signal })).json();
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      model: models.data[0].id,
      messages,
      stream: true,
      stream_options: { include_usage: true },
      ...settings,
    }),
    signal,
  });
  try {
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Failure(chunk.error.message);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Failure) throw error;
    throw new Failure("The connection to the server was lost.");
  }
}
