// Lets a user in, by key where the server asks for one, and puts the parts of the page together.

import * as adapt from "./adapt.js";
import * as adapters from "./adapters.js";
import * as api from "./api.js";
import * as compare from "./compare.js";
import { byId, fail, say } from "./dom.js";

const parts = [compare, adapt, adapters];

async function enter() {
  let settings;
  try {
    settings = await api.call("GET", "page/settings");
  } catch (error) {
    if (error.status !== 401) fail("broken", error);
    return false;
  }
  fail("broken");
  fail("door-error");
  byId("door").hidden = true;
  byId("work").hidden = false;
  byId("who").hidden = !api.hasKey();
  say("tenant", settings.tenant);
  say("about", `One model, ${settings.model}, and a small adapter for each user.`);
  for (const part of parts) part.useSettings(settings);
  const listed = await adapters.refresh();
  const own = listed.find((x) => x.ended_at === null && x.owned_by === settings.tenant);
  if (own) adapt.watch(own);
  return true;
}

function askForKey(error) {
  adapters.stop();
  byId("work").hidden = true;
  byId("who").hidden = true;
  byId("door").hidden = false;
  if (error) fail("door-error", error);
  api.forgetKey();
  byId("key").focus();
}

compare.setUp();
adapt.setUp({
  compare: compare.compareWith,
  download: adapters.download,
  remove: adapters.remove,
  changed: adapters.refresh,
});
adapters.setUp({
  compare: compare.compareWith,
  watch: (adapter) => {
    adapt.watch(adapter);
    byId("watch-title").focus();
  },
  forget: adapt.forget,
  offer: compare.offer,
});
api.onRefused(askForKey);
byId("door-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  fail("door-error");
  api.useKey(byId("key").value.trim(), byId("keep").checked);
  if (await enter()) {
    byId("key").value = "";
    byId("compare-title").focus();
  }
});
byId("forget").addEventListener("click", () => {
  api.forgetKey();
  // The next user of this tab sees nothing of this one.
  location.reload();
});
if (document.documentElement.dataset.keys === undefined || api.hasKey()) enter();
else askForKey();
