// The fitness of a search over its generations, as SVG.

import { make } from "./dom.js";
import { number } from "./words.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const HEIGHT = 220;
const [TOP, RIGHT, BOTTOM, LEFT] = [12, 14, 40, 52];

function draw(tag, attributes, ...children) {
  const made = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// About `count` round numbers from `low` to `high`.
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((x) => x * power >= raw);
  const first = Math.ceil(low / step);
  const found = [];
  for (let i = first; i * step <= high + step * 1e-6; i += 1) found.push(i * step);
  return { values: found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

// Draws the curve of an adapter into a place, as wide as the place is.
export function drawChart(place, { curve, generations }) {
  const width = Math.max(240, Math.floor(place.clientWidth));
  // The gradient has one candidate, whose mean is itself.
  const names = curve.some((x) => x.mean !== x.best) ? ["mean", "best"] : ["best"];
  const known = curve.flatMap((x) => names.map((name) => x[name])).filter(Number.isFinite);
  let [low, high] = [Math.min(...known), Math.max(...known)];
  if (!known.length) [low, high] = [-1, 0];
  const margin = Math.max((high - low) * 0.08, 1e-3);
  [low, high] = [low - margin, high + margin];
  const last = Math.max(generations, 2);
  const x = (g) => LEFT + ((g - 1) / (last - 1)) * (width - LEFT - RIGHT);
  const y = (f) => TOP + ((high - f) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const svg = draw("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`,
    width,
    height: HEIGHT,
    role: "img",
    "aria-labelledby": "chart-title",
    "aria-describedby": "chart-text",
  });
  const label = (text, where) => svg.append(draw("text", where, text));

  const down = ticks(low, high, 4);
  for (const value of down.values) {
    svg.append(draw("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
    label(number(value, down.digits), { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" });
  }
  const across = ticks(1, last, width < 420 ? 4 : 8).values.filter(Number.isInteger);
  for (const value of new Set([1, ...across.filter((v) => v > 1)])) {
    label(String(value), { x: x(value), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" });
  }
  label("generation", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle" });

  for (const name of names) {
    const points = curve.filter((point) => Number.isFinite(point[name]));
    const path = points.map((p, i) => `${i ? "L" : "M"}${x(p.generation).toFixed(1)} ${y(p[name]).toFixed(1)}`);
    if (!points.length) continue;
    const end = points.at(-1);
    svg.append(draw("path", { class: name, d: path.join("") }));
    svg.append(draw("circle", { class: name, cx: x(end.generation), cy: y(end[name]), r: 3.5 }));
  }
  place.replaceChildren(svg, ...(names.length > 1 ? [legend()] : []));
}

function legend() {
  const entries = [["best", "best so far"], ["mean", "mean of the generation"]];
  return make(
    "ul",
    { className: "legend", ariaHidden: "true" },
    ...entries.map(([name, text]) => {
      const line = draw("svg", { width: 22, height: 10 }, draw("line", { class: name, x1: 1, x2: 21, y1: 5, y2: 5 }));
      return make("li", {}, line, text);
    }),
  );
}

// The chart in a sentence.
export function describeChart(curve, unit) {
  const best = curve.map((x) => x.best).filter(Number.isFinite);
  if (!best.length) return "";
  const many = curve.at(-1).generation;
  const first = `${number(best[0])} after the first generation`;
  const last = many > 1 ? `, ${number(best.at(-1))} after ${many}` : "";
  return `${first}${last}${unit}.`;
}

export function fillTable(table, curve) {
  const row = (tag, cells) =>
    make("tr", {}, ...cells.map((textContent) => make(tag, { textContent, ...(tag === "th" ? { scope: "col" } : {}) })));
  const shown = (value) => (Number.isFinite(value) ? number(value, 4) : "–");
  table.replaceChildren(
    make("thead", {}, row("th", ["Generation", "Best so far", "Mean"])),
    make("tbody", {}, ...curve.map((x) => row("td", [String(x.generation), shown(x.best), shown(x.mean)]))),
  );
}
