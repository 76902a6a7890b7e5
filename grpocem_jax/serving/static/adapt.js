// A search for an adapter: asked for, watched, judged.

import { ApiError, call, events } from "./api.js";
import { describeChart, drawChart, fillTable } from "./chart.js";
import { byId, fail, make, options, say, sentence, show } from "./dom.js";
import {
  METHODS, SAMPLE_EXAMPLES, SAMPLE_PROMPT, countExamples, countPrompts, facts, progress, promptOf, readExamples,
  rewardHint, titleOf, verdict,
} from "./words.js";

const PATIENCE = [500, 1000, 2000, 4000, 8000];

let settings = {};
let tools = {};
let watching = null;
let shown = null;
const prompts = new Map();
const nothing = byId("watch-status").textContent;

// `tools`: compare, download, remove and changed, which other parts of the page do.
export function setUp(given) {
  tools = given;
  byId("adapt-form").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  byId("examples").addEventListener("input", count);
  byId("reward").addEventListener("change", useReward);
  byId("sample-examples").addEventListener("click", () => {
    byId("examples").value = SAMPLE_EXAMPLES;
    byId("reward").value = "";
    useReward();
    if (!byId("prompt").value) byId("prompt").value = SAMPLE_PROMPT;
    count();
    byId("examples").focus();
  });
  new ResizeObserver(() => {
    if (shown && !byId("chart-figure").hidden) drawChart(byId("chart"), chartOf(shown));
  }).observe(byId("watch"));
}

export function useSettings(found) {
  settings = found;
  const rewards = Object.keys(found.rewards).map((name) => [name, `The reward of ${name}`]);
  options(byId("reward"), [["", "The examples become more probable"], ...rewards], byId("reward").value);
  useReward();
  const generations = byId("generations");
  generations.max = found.max_generations;
  generations.value = Math.min(found.generations, found.max_generations);
}

// A reward has no gradient, and its prompts have columns.
function useReward() {
  const reward = byId("reward").value;
  const methods = settings.methods.filter((name) => !reward || name !== "gradient");
  options(byId("method"), methods.map((name) => [name, METHODS[name] ?? name]), byId("method").value);
  byId("reward-hint").hidden = !reward;
  say("reward-hint", reward && rewardHint(settings.rewards[reward]));
  count();
}

function read() {
  return readExamples(byId("examples").value, settings.is_chat ? "" : " ");
}

function count() {
  say("examples-found", (byId("reward").value ? countPrompts : countExamples)(read()));
}

async function search() {
  const { examples } = read();
  const name = byId("name").value.trim();
  const reward = byId("reward").value;
  fail("adapt-error");
  byId("search").disabled = true;
  try {
    const adapter = await call("POST", "v1/adapters", {
      json: {
        ...(reward ? { prompts: examples, reward } : { examples }),
        method: byId("method").value,
        generations: Number(byId("generations").value),
        ...(name ? { name } : {}),
      },
    });
    prompts.set(adapter.id, examples.map(promptOf).find(Boolean) ?? "");
    watch(adapter);
    tools.changed();
    show(byId("watch"));
  } catch (error) {
    fail("adapt-error", error);
  } finally {
    byId("search").disabled = false;
  }
}

export const isWatched = (id) => shown?.id === id;

// Shows a search until it ends, or until another one is watched.
export async function watch(adapter) {
  watching?.abort();
  const abort = new AbortController();
  watching = abort;
  fail("watch-error");
  display({ curve: [], ...adapter });
  for (let failures = 0; ; ) {
    try {
      const path = `v1/adapters/${adapter.id}/events`;
      for await (const found of events("GET", path, { signal: abort.signal })) {
        failures = 0;
        fail("watch-error");
        display(found);
        if (found.ended_at !== null) {
          tools.changed();
          return;
        }
      }
      return;
    } catch (error) {
      if (abort.signal.aborted) return;
      if (error instanceof ApiError && (error.status >= 400 || failures >= PATIENCE.length)) {
        fail("watch-error", error);
        return;
      }
      if (!(error instanceof ApiError)) throw error;
      fail("watch-error", new Error("The connection was cut off; trying again."));
      await new Promise((resolve) => setTimeout(resolve, PATIENCE[failures]));
      if (abort.signal.aborted) return;
      failures += 1;
    }
  }
}

// Empties the place where a search is shown, once its adapter is gone.
export function forget(id) {
  if (shown?.id !== id) return;
  watching?.abort();
  shown = null;
  say("watch-title", "No search yet");
  say("watch-status", nothing);
  for (const part of ["watch-progress", "verdict", "chart-figure", "facts"]) byId(part).hidden = true;
  const place = byId("watch-actions");
  const focused = place.contains(document.activeElement);
  place.replaceChildren();
  if (focused) byId("watch-title").focus();
  fail("watch-error");
}

function chartOf({ curve, generations, ended_at }) {
  const last = curve.at(-1)?.generation ?? 0;
  return { curve, generations: ended_at === null ? generations : last };
}

function display(adapter) {
  const before = shown;
  shown = adapter;
  const ended = adapter.ended_at !== null;
  const same = before?.id === adapter.id;
  say("watch-title", titleOf(adapter));
  tellProgress(adapter, ended, same ? before : null);

  const bar = byId("watch-progress");
  bar.hidden = ended;
  if (adapter.generation) {
    bar.max = adapter.generations;
    bar.value = adapter.generation;
  } else {
    bar.removeAttribute("value");
  }

  const judged = ended ? verdict(adapter, settings.model) : null;
  byId("verdict").hidden = !ended;
  if (judged) {
    byId("verdict").className = judged.good ? "good" : "bad";
    say("verdict-title", judged.title);
    say("verdict-text", judged.text && sentence(judged.text));
  }

  const figure = byId("chart-figure");
  figure.hidden = !adapter.curve.length;
  if (!figure.hidden) {
    const reward = adapter.asked.reward;
    say("chart-title", reward ? "Mean reward of the prompts" : "How well the examples are predicted");
    drawChart(byId("chart"), chartOf(adapter));
    const unit = reward ? "" : " (log-likelihood per token, in nats; higher is better)";
    say("chart-text", describeChart(adapter.curve, unit));
    fillTable(byId("numbers"), adapter.curve);
  }

  const listed = ended ? facts(adapter) : [];
  byId("facts").hidden = !listed.length;
  byId("facts").replaceChildren(
    ...listed.map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))),
  );
  if (!same || (before.ended_at === null) === ended) actions(adapter, ended);
}

// What a screen reader hears: the start, each quarter, and the end.
function tellProgress(adapter, ended, before) {
  if (ended) {
    say("watch-status", adapter.asked.method === "upload" ? "" : "The search has ended.");
    return;
  }
  const quarter = ({ generation, generations }) => Math.floor((4 * generation) / generations);
  const news =
    !before || before.status !== adapter.status || !before.generation !== !adapter.generation || quarter(before) !== quarter(adapter);
  byId("watch-status").setAttribute("aria-live", news ? "polite" : "off");
  say("watch-status", progress(adapter));
}

function actions(adapter, ended) {
  const button = (textContent, className, onclick) => make("button", { type: "button", textContent, className, onclick });
  const found = [];
  if (adapter.status === "ready") {
    const prompt = prompts.get(adapter.id) ?? "";
    found.push(button("Compare with before", "main", () => tools.compare(adapter, prompt)));
    found.push(button("Download", "", () => tools.download(adapter, "watch-error")));
  }
  if (adapter.owned_by === settings.tenant) {
    found.push(button(ended ? "Delete" : "Cancel the search", "quiet", () => tools.remove(adapter)));
  }
  const place = byId("watch-actions");
  const focused = place.contains(document.activeElement);
  place.replaceChildren(...found);
  if (focused) (found[0] ?? byId("watch-title")).focus();
}
