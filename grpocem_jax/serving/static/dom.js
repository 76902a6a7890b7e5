// Elements of the page. Text of models and users becomes text, never elements.

export const byId = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function say(id, text) {
  const place = byId(id);
  if (place.textContent !== text) place.textContent = text;
}

export function fail(id, error) {
  const place = byId(id);
  place.hidden = !error;
  place.textContent = error ? sentence(error.message ?? String(error)) : "";
}

// An error of the interface as a sentence.
export function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?…]$/.test(whole) ? whole : `${whole}.`;
}

export function options(select, entries, chosen) {
  select.replaceChildren(
    ...entries.map(([value, textContent]) => make("option", { value, textContent })),
  );
  if (entries.some(([value]) => value === chosen)) select.value = chosen;
}

// Asks before something is lost; the focus goes back to where it was.
export function confirmed(title, text, yes) {
  const dialog = byId("confirm");
  say("confirm-title", title);
  say("confirm-text", text);
  say("confirm-yes", yes);
  dialog.returnValue = "no";
  dialog.showModal();
  byId("confirm-no").focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

export function show(element) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "nearest" });
}
