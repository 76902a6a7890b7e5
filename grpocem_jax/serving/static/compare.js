// One prompt, answered by two models side by side.

import { ApiError, events } from "./api.js";
import { byId, fail, make, options, say, show } from "./dom.js";
import { SAMPLE_PROMPT, differences, titleOf } from "./words.js";

const LARGEST_SEED = 2 ** 31 - 1;
const SIDES = [0, 1];

let settings = {};
let running = null;
let touched = false;

export function setUp() {
  byId("compare-form").addEventListener("submit", (event) => {
    event.preventDefault();
    answer();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      byId("compare-form").requestSubmit();
    }
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("sample-prompt").addEventListener("click", () => {
    byId("prompt").value = SAMPLE_PROMPT;
    byId("prompt").focus();
  });
  byId("model-1").addEventListener("change", () => {
    touched = true;
  });
}

export function useSettings(found) {
  settings = found;
  const tokens = byId("tokens");
  tokens.max = found.max_tokens;
  tokens.value = Math.min(48, found.max_tokens);
  byId("chat-line").hidden = !found.has_chat;
  byId("chat").checked = found.is_chat;
}

// Offers the models that there are, with the names of adapters.
export function offer(models, adapters) {
  const names = new Map(adapters.map((x) => [x.id, titleOf(x)]));
  const bases = models.filter((id) => !names.has(id) && !id.startsWith("adapter-"));
  const own = models.filter((id) => !bases.includes(id));
  const named = own.map((id) => [id, names.get(id) ?? id]);
  const listed = [...bases.map((id) => [id, `${id} (${id === settings.base ? "base model" : "trained"})`]), ...named];
  const [first, second] = SIDES.map((side) => byId(`model-${side}`));
  options(first, listed, first.value || settings.base);
  const newest = own[0] ?? bases.find((id) => id !== settings.base) ?? "";
  const nothing = ["", own.length ? "none" : "none yet: search for an adapter below"];
  options(second, [nothing, ...listed], touched ? second.value : newest);
}

// Sets an adapter beside the base, and answers where there is a prompt.
export function compareWith(adapter, prompt) {
  touched = true;
  byId("model-0").value = settings.model;
  byId("model-1").value = adapter.id;
  if (!byId("prompt").value && prompt) byId("prompt").value = prompt;
  show(byId("compare"));
  byId("prompt").focus({ preventScroll: true });
  if (byId("prompt").value) byId("compare-form").requestSubmit();
}

async function answer() {
  running?.abort();
  const abort = new AbortController();
  running = abort;
  const given = byId("seed").value;
  const seed = given === "" ? Math.floor(Math.random() * LARGEST_SEED) : Number(given);
  fail("compare-error");
  say("compare-status", "Answering …");
  byId("stop").hidden = false;
  byId("answer").disabled = true;
  const answers = SIDES.map((side) => ({ side, model: byId(`model-${side}`).value, text: "" }));
  try {
    await Promise.all(answers.map((each) => one(each, seed, abort.signal)));
    tell(answers.filter((each) => each.model));
  } catch (error) {
    if (abort.signal.aborted) {
      if (running === abort) say("compare-status", "Stopped.");
    } else {
      abort.abort();
      say("compare-status", "");
      fail("compare-error", error instanceof ApiError ? error : new Error("The page failed."));
      if (!(error instanceof ApiError)) throw error;
    }
  } finally {
    if (running === abort) {
      running = null;
      byId("stop").hidden = true;
      byId("answer").disabled = false;
      if (document.activeElement === document.body) byId("answer").focus();
    }
  }
}

async function one(each, seed, signal) {
  const place = byId(`answer-${each.side}`);
  const note = byId(`note-${each.side}`);
  place.replaceChildren();
  note.textContent = "";
  if (!each.model) return;
  const chat = settings.has_chat && byId("chat").checked;
  const prompt = byId("prompt").value;
  const asked = {
    model: each.model,
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: Number(byId("tokens").value),
    temperature: Number(byId("temperature").value),
    seed,
    stream: true,
    stream_options: { include_usage: true },
  };
  const began = performance.now();
  let reason = "";
  let usage = null;
  place.setAttribute("aria-busy", "true");
  try {
    for await (const chunk of events("POST", chat ? "v1/chat/completions" : "v1/completions", { json: asked, signal })) {
      usage = chunk.usage ?? usage;
      for (const choice of chunk.choices) {
        const piece = choice.text ?? choice.delta?.content ?? "";
        place.append(each.text ? piece : piece.trimStart());
        each.text = (each.text + piece).trimStart();
        reason = choice.finish_reason ?? reason;
      }
    }
  } finally {
    place.removeAttribute("aria-busy");
  }
  const count = usage?.completion_tokens ?? 0;
  const seconds = (performance.now() - began) / 1000;
  const ended = reason === "length" ? "cut off there" : "ended by itself";
  note.textContent = `${count} token${count === 1 ? "" : "s"} in ${seconds.toFixed(seconds < 10 ? 1 : 0)} s, ${ended}`;
}

// Marks what is different, and says it to those who do not see it.
function tell(answers) {
  const names = answers.map(({ side }) => byId(`model-${side}`).selectedOptions[0].textContent);
  const spoken = answers.map(({ text }, i) => ` ${names[i]}: ${text.trim() || "nothing"}`);
  const conclude = (seen) =>
    byId("compare-status").replaceChildren(seen, make("span", { className: "hidden", textContent: spoken.join(".") }));
  if (answers.length < 2) {
    conclude("Answered.");
    return;
  }
  const [first, second] = answers;
  if (first.text === second.text) {
    conclude("Both answer the same.");
    return;
  }
  for (const [own, other] of [[first, second], [second, first]]) {
    const parts = differences(own.text, other.text);
    byId(`answer-${own.side}`).replaceChildren(
      ...parts.map(([word, common]) => (common ? word : make("mark", { textContent: word }))),
    );
  }
  conclude("They differ where words are marked.");
}
