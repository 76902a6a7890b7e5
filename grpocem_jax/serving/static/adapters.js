// The adapters of a user: listed, compared, watched, downloaded, deleted, uploaded.

import { call, file } from "./api.js";
import { byId, confirmed, fail, make, say } from "./dom.js";
import { ago, signed, titleOf } from "./words.js";

const PAGE = 50;
const EVERY_MS = 3000;
const STATES = {
  queued: "waiting", running: "searching", ready: "ready",
  failed: "failed", cancelled: "cancelled", interrupted: "interrupted",
};

let settings = {};
let tools = {};
let listed = [];
let usable = new Set();
let timer = null;
let wanted = PAGE;
const rows = new Map();

// `tools`: compare, watch, forget and offer, which other parts of the page do.
export function setUp(given) {
  tools = given;
  byId("refresh").addEventListener("click", async () => {
    await refresh();
    say("adapters-status", `${listed.length} adapters.`);
  });
  byId("older").addEventListener("click", () => {
    wanted += PAGE;
    refresh();
  });
  byId("upload").addEventListener("change", upload);
}

export function useSettings(found) {
  settings = found;
}

export function stop() {
  clearTimeout(timer);
}

// Reads the list again, and goes on while a search runs.
export async function refresh() {
  clearTimeout(timer);
  try {
    const [models, adapters] = await Promise.all([
      call("GET", "v1/models"),
      call("GET", `v1/adapters?limit=${wanted}`),
    ]);
    fail("adapters-error");
    listed = adapters.data;
    usable = new Set(models.data.map((x) => x.id));
    byId("older").hidden = !adapters.has_more;
    tools.offer([...usable], listed);
    display();
  } catch (error) {
    fail("adapters-error", error);
    if (error.status === 401) return listed;
  }
  const searching = listed.some((x) => x.ended_at === null);
  if (searching) timer = setTimeout(refresh, EVERY_MS);
  return listed;
}

function display() {
  byId("adapters-none").hidden = listed.length > 0;
  const place = byId("list");
  const there = new Set(listed.map((x) => x.id));
  for (const [id, row] of rows) {
    if (there.has(id)) continue;
    const focused = row.element.contains(document.activeElement);
    row.element.remove();
    rows.delete(id);
    if (focused) byId("adapters-title").focus();
  }
  listed.forEach((adapter, at) => {
    const row = rows.get(adapter.id) ?? { element: make("li"), state: "" };
    rows.set(adapter.id, row);
    const state = JSON.stringify([adapter.status, adapter.result, usable.has(adapter.id)]);
    if (state !== row.state) fill(row, adapter);
    row.state = state;
    row.about.textContent = about(adapter);
    if (place.children[at] !== row.element) place.insertBefore(row.element, place.children[at] ?? null);
  });
}

function about(adapter) {
  const { asked, result } = adapter;
  const parts = [];
  if (adapter.ended_at === null && adapter.generation) {
    parts.push(`generation ${adapter.generation} of ${adapter.generations}`);
  }
  if (result?.adapted === false) parts.push("not adapted");
  if (result?.adapted && result.held_back_gain !== null) parts.push(`${signed(result.held_back_gain)} held back`);
  parts.push(asked.method === "upload" ? "uploaded" : `${asked.method}, ${asked.examples} example${asked.examples > 1 ? "s" : ""}`);
  if (adapter.owned_by !== settings.tenant) parts.push("public");
  if (adapter.status === "ready" && !usable.has(adapter.id)) parts.push("of another base model");
  parts.push(ago(adapter.created_at));
  return parts.join(" · ");
}

function fill(row, adapter) {
  const title = titleOf(adapter);
  const button = (text, what, onclick) =>
    make("button", { type: "button", textContent: text, ariaLabel: `${text}: ${title}`, onclick, className: what });
  const buttons = [];
  if (usable.has(adapter.id)) buttons.push(button("Compare", "", () => tools.compare(adapter)));
  if (adapter.asked.method !== "upload") {
    buttons.push(button(adapter.ended_at === null ? "Watch" : "See", "quiet", () => tools.watch(adapter)));
  }
  if (adapter.status === "ready") buttons.push(button("Download", "quiet", () => download(adapter)));
  if (adapter.owned_by === settings.tenant) buttons.push(button("Delete", "quiet", () => remove(adapter)));
  const at = [...row.element.querySelectorAll("button")].indexOf(document.activeElement);
  row.about = make("p", { className: "hint" });
  row.element.replaceChildren(
    make(
      "div",
      {},
      make("p", { className: "name" }, make("b", { textContent: title }), " ", make("span", { className: `state ${adapter.status}`, textContent: STATES[adapter.status] ?? adapter.status })),
      row.about,
      make("p", { className: "id" }, make("code", { textContent: adapter.id })),
    ),
    make("div", { className: "line" }, ...buttons),
  );
  if (at >= 0) (buttons[at] ?? buttons[0]).focus();
}

export async function download(adapter, where = "adapters-error") {
  try {
    const blob = await file(`v1/adapters/${adapter.id}/download`);
    const link = make("a", { href: URL.createObjectURL(blob), download: `${adapter.id}.zip` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (error) {
    fail(where, error);
  }
}

export async function remove(adapter) {
  const searching = adapter.ended_at === null;
  const sure = await confirmed(
    searching ? "Cancel the search?" : "Delete the adapter?",
    `“${titleOf(adapter)}” is gone for good then.`,
    searching ? "Cancel it" : "Delete it",
  );
  if (!sure) return;
  try {
    await call("DELETE", `v1/adapters/${adapter.id}`);
    say("adapters-status", `“${titleOf(adapter)}” is deleted.`);
  } catch (error) {
    if (error.status !== 404) {
      fail("adapters-error", error);
      return;
    }
  }
  tools.forget(adapter.id);
  await refresh();
}

async function upload() {
  const field = byId("upload");
  const [chosen] = field.files;
  if (!chosen) return;
  fail("adapters-error");
  say("adapters-status", "Uploading …");
  // A name of printable characters, which the interface asks for.
  const printable = chosen.name.replace(/\.zip$/i, "").replace(/[\p{C}\p{Z}]+/gu, " ").trim();
  const name = Array.from(printable).slice(0, 64).join("");
  const query = name ? `?name=${encodeURIComponent(name)}` : "";
  try {
    const adapter = await call("POST", `v1/adapters/upload${query}`, { body: chosen, type: "application/zip" });
    await refresh();
    say("adapters-status", `“${titleOf(adapter)}” is there.`);
  } catch (error) {
    say("adapters-status", "");
    fail("adapters-error", error);
  } finally {
    field.value = "";
  }
}
