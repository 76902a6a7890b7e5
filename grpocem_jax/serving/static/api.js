// The HTTP interface of the server. The key is a header, never a part of an address.

const KEPT = "grpocem-key";

export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let key = sessionStorage.getItem(KEPT);
let refused = () => {};

// Calls back whenever the server wants a key, or another one.
export function onRefused(callback) {
  refused = callback;
}

export const hasKey = () => key !== null;

export function useKey(given, keep) {
  key = given;
  sessionStorage.removeItem(KEPT);
  if (keep) sessionStorage.setItem(KEPT, given);
}

export function forgetKey() {
  key = null;
  sessionStorage.removeItem(KEPT);
}

async function request(method, path, { json, body, type, signal } = {}) {
  const headers = new Headers();
  // A header has bytes alone: what has other characters is no key, and the server says so.
  if (key) headers.set("Authorization", `Bearer ${key.replace(/[^\x21-\x7e]/g, "?")}`);
  if (json !== undefined) headers.set("Content-Type", "application/json");
  if (type) headers.set("Content-Type", type);
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method,
      headers,
      body: json === undefined ? body : JSON.stringify(json),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached; see whether it runs, and try again.");
  }
  if (!response.ok) {
    const error = await failure(response);
    if (error.status === 401) refused(error);
    throw error;
  }
  return response;
}

async function failure(response) {
  try {
    const { error } = await response.json();
    return new ApiError(response.status, error.message, error.code);
  } catch {
    return new ApiError(response.status, `The server answered with status ${response.status}.`);
  }
}

export async function call(method, path, given) {
  return (await request(method, path, given)).json();
}

export async function file(path) {
  return (await request("GET", path)).blob();
}

// Yields the objects of server-sent events, until they end.
export async function* events(method, path, given) {
  const response = await request(method, path, given);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(0, "The connection to the server was cut off; try again.");
      }
      if (part.done) throw new ApiError(0, "The connection to the server was cut off; try again.");
      const blocks = (rest + part.value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        if (!block.startsWith("data: ")) continue;
        const data = block.slice(6);
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error?.message) {
          throw new ApiError(0, event.error.message, event.error.code);
        }
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
