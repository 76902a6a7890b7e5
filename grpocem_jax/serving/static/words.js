// What users paste, as the interface takes it, and what it answers, in words.

// Reads pasted examples; `joint` is what stands between a prompt and its answer.
export function readExamples(text, joint) {
  const listed = fromJson(text.trim());
  if (listed) return { examples: listed, form: "as JSON" };
  const apart = /\n[ \t]*\n/.test(text.trim());
  const parts = (apart ? text.split(/\n(?:[ \t]*\n)+/) : text.split("\n"))
    .map((part) => part.replace(/^\s*\n/, "").trimEnd())
    .filter((part) => part.trim());
  const examples = parts.map((part) => {
    const at = part.indexOf("=>");
    if (at < 0) return part;
    const [prompt, answer] = [part.slice(0, at).trimEnd(), part.slice(at + 2).trim()];
    return answer ? { prompt, completion: joint + answer } : prompt;
  });
  return { examples, form: apart ? "with empty lines between" : "one a line" };
}

function fromJson(text) {
  try {
    if (text.startsWith("[")) {
      const listed = JSON.parse(text);
      return Array.isArray(listed) ? listed : null;
    }
    if (!text.startsWith("{")) return null;
    return text.split("\n").filter((line) => line.trim()).map((line) => JSON.parse(line));
  } catch {
    return null;
  }
}

export function countExamples({ examples, form }) {
  if (!examples.length) return "No example yet.";
  const many = examples.length > 1;
  const answers = examples.filter((x) => x?.completion).length;
  const what = many ? `${examples.length} examples, ${form}` : "1 example";
  if (!answers) return `${what}; all of each text is learned.`;
  if (answers === examples.length) return `${what}; only the answers are learned.`;
  return `${what}; ${answers} of them with an answer.`;
}

// The same where each is a prompt of a task, with the columns that its reward reads.
export function countPrompts({ examples }) {
  if (!examples.length) return "No prompt yet.";
  if (!examples.every((x) => x && typeof x === "object" && !Array.isArray(x))) return "Each prompt has to be a JSON object.";
  return examples.length > 1 ? `${examples.length} prompts.` : "1 prompt.";
}

export const rewardHint = (columns) =>
  `The model answers each prompt, and the reward judges the answers. Paste one JSON object a line, with ${columns.join(", ")}.`;

// The prompt of an example, where it has one that is a string.
export const promptOf = (example) => (typeof example?.prompt === "string" ? example.prompt : "");

export const METHODS = {
  gradient: "Gradient (quick)",
  cem: "Cross-Entropy Method",
  experts: "Mixture of experts",
};

export const titleOf = (adapter) => adapter.name || `Adapter ${adapter.id.slice(-6)}`;

export const number = (value, digits = 3) => value.toFixed(digits).replace("-", "−");

export const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);

const percent = (value) => (value < 10 ? value.toFixed(1) : value.toFixed(0));

// How much more or less probable a token has become, from a change in nats.
function likelier(gain) {
  const ratio = Math.exp(Math.abs(gain));
  const direction = gain < 0 ? "less" : "more";
  if (ratio >= 2) return `${percent(ratio)} times ${direction} probable`;
  return `${percent(100 * (ratio - 1))}% ${direction} probable`;
}

// What a gain on held-back examples means.
function change(gain, result) {
  if (Math.abs(gain) < 5e-4) return "nothing changed";
  if (!isLikelihood(result)) return `the mean ${result.fitness_unit} changed by ${signed(gain)}`;
  return `the right next word became ${likelier(gain)} on average (${signed(gain)} nats per token)`;
}

const isLikelihood = (result) => result.fitness_unit === "nats/token";

// What came of a search: a title and a text.
export function verdict({ status, result, error, name }, base) {
  if (status !== "ready") {
    const what = { failed: "The search failed", cancelled: "Cancelled" }[status] ?? "Interrupted";
    return { good: false, title: `${what}.`, text: error ?? "" };
  }
  if (result?.adapted === undefined) {
    return { good: true, title: "Uploaded.", text: "It was adapted elsewhere." };
  }
  const gain = result.held_back_gain;
  const moved = gain === null ? "" : change(gain, result);
  if (!result.adapted) {
    const why = result.note || "nothing did better on held-back text";
    const small = gain < 5e-4 ? "" : ", too little to be told from chance";
    const tested = moved ? `On examples that a search had not seen, ${moved}${small}. ` : "";
    return {
      good: false,
      title: `Not adapted: ${why}.`,
      text: `${tested}So ${name ? `“${name}”` : "the adapter"} answers as ${base} does. More examples, or examples that have more in common, may help.`,
    };
  }
  return {
    good: true,
    title: moved ? "Adapted: it does better on held-back examples." : "Adapted.",
    text: moved
      ? `What was learned from one half of the examples was tested on the other half, which it had not seen: there, ${moved}.`
      : "It was not judged on held-back examples: the server has that switched off.",
  };
}

// What a search took, as pairs of name and value.
export function facts({ asked, result }) {
  const listed = [];
  if (result?.fitness_before != null && result.fitness_after != null) {
    const name = isLikelihood(result) ? "Log-likelihood per token" : `Mean ${result.fitness_unit}`;
    listed.push([name, `${number(result.fitness_before)} → ${number(result.fitness_after)}`]);
  }
  if (asked.examples) listed.push(["Examples", String(asked.examples)]);
  if (result?.generations) {
    listed.push(["Generations", `${result.generations}${result.converged ? ", converged" : ""}`]);
  }
  if (result?.seconds) {
    const compiled = result.compile_seconds >= 0.5 ? ` (and ${number(result.compile_seconds, 0)} s to compile)` : "";
    listed.push(["Time", `${number(result.seconds, result.seconds < 10 ? 1 : 0)} s${compiled}`]);
  }
  return listed;
}

// How far a search has come.
export function progress({ status, generation, generations }) {
  if (status === "queued") return "Waiting for its turn.";
  if (generation === 0) return "Starting; the first search after the server's start takes longer.";
  return `Generation ${generation} of ${generations}.`;
}

const SPANS = [["day", 86400], ["hour", 3600], ["minute", 60]];

export function ago(seconds) {
  const passed = Math.max(0, Date.now() / 1000 - seconds);
  for (const [name, length] of SPANS) {
    const count = Math.floor(passed / length);
    if (count) return `${count} ${name}${count > 1 ? "s" : ""} ago`;
  }
  return "just now";
}

// A text in runs of words, each with whether it is in a longest common subsequence with another.
export function differences(text, other) {
  const [own, others] = [text, other].map((x) => x.match(/\s*\S+|\s+$/g) ?? []);
  const [a, b] = [own, others].map((words) => words.map((word) => word.trim()));
  const length = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      length[i][j] =
        a[i] === b[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  const found = [];
  const add = (word, common) => {
    const last = found.at(-1);
    const space = common ? "" : word.match(/^\s*/)[0];
    if (last?.[1] === common) {
      last[0] += word;
    } else if (space) {
      // The space before a run that differs is no part of it.
      add(space, true);
      found.push([word.slice(space.length), false]);
    } else {
      found.push([word, common]);
    }
  };
  for (let i = 0, j = 0; i < a.length; ) {
    if (j < b.length && a[i] === b[j]) {
      add(own[i], true);
      i += 1;
      j += 1;
    } else if (j < b.length && length[i][j + 1] >= length[i + 1][j]) {
      j += 1;
    } else {
      add(own[i], false);
      i += 1;
    }
  }
  return found;
}

export const SAMPLE_PROMPT =
  "Review: I tried the new restaurant. The waiter was charming.\nSentiment:";

const REVIEWS = [
  ["We had dinner there on Friday. The soup was cold.", "negative"],
  ["I tried the new restaurant. The fish was delicious.", "positive"],
  ["We stayed there for two nights. The rooms were bright.", "positive"],
  ["I booked a room for the weekend. The staff were rude.", "negative"],
  ["We had dinner there on Friday. The prices were fair.", "positive"],
  ["I tried the new restaurant. The dessert was far too sweet.", "negative"],
  ["We stayed there for two nights. The bed was soft.", "positive"],
  ["I booked a room for the weekend. The pool was closed.", "negative"],
];

export const SAMPLE_EXAMPLES = REVIEWS.map(
  ([review, label]) => `Review: ${review}\nSentiment: => in the end ${label}.`,
).join("\n\n");
