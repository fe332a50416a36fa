// The page: tabs, which view is seen, and how the service is.

import * as address from "./address.js";
import { offerToken } from "./api.js";
import { byId } from "./dom.js";
import { describe, drifts, worst } from "./drift.js";
import * as live from "./live.js";
import * as models from "./models.js";
import { listen, watch } from "./telemetry.js";
import * as trying from "./try.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const names = tabs.map((tab) => tab.getAttribute("aria-controls"));
const KEYS = { ArrowRight: (at) => at + 1, ArrowLeft: (at) => at - 1, Home: () => 0, End: () => -1 };
const PROBE_MS = 5000;
let probing = 0;

// Show the view that the address names, and only it.
function show() {
  const chosen = names.includes(address.view()) ? address.view() : names[0];
  if (address.view() !== chosen) globalThis.history.replaceState(null, "", address.link(chosen));
  for (const [place, tab] of tabs.entries()) {
    const isChosen = names[place] === chosen;
    tab.setAttribute("aria-selected", isChosen);
    tab.tabIndex = isChosen ? 0 : -1;
    byId(names[place]).hidden = !isChosen;
  }
  address.keep();
  watch(chosen === "live");
  if (chosen === "live") live.show();
  if (chosen === "models") models.load();
  if (chosen === "try") trying.show();
}

function press(event) {
  const at = tabs.indexOf(event.target);
  const next = KEYS[event.key]?.(at);
  if (next === undefined) return;
  event.preventDefault();
  const tab = tabs.at(next % tabs.length);
  tab.focus();
  address.open(tab.getAttribute("aria-controls"));
}

// Say whether the service takes requests; the probe needs no token.
async function probe() {
  clearTimeout(probing);
  if (!document.hidden) label("status", ...(await stateOfService()));
  probing = setTimeout(probe, PROBE_MS);
}

async function stateOfService() {
  const response = await fetch("readyz", { cache: "no-store" }).catch(() => null);
  if (!response) return ["unreachable", "miss"];
  if (response.ok) return ["ready", "hit"];
  const { type = "", detail } = await response.json().catch(() => ({}));
  return type.endsWith(":draining") ? ["draining", "warn", "It answers what it has accepted, and then ends."] : ["not ready", "miss", detail];
}

function label(id, words, state, why = "") {
  const node = byId(id);
  if (node.textContent !== words) node.textContent = words;
  if (state) node.dataset.state = state;
  else delete node.dataset.state;
  node.title = why;
}

// Say the drift in the header of every view.
function sayDrift(samples, error) {
  if (error) return label("drift", "drift unknown", null, error.message);
  const { words, state, why } = describe(worst(drifts(samples)));
  return label("drift", words, state, `${why} Click to see it over time.`);
}

for (const tab of tabs) {
  tab.addEventListener("click", () => address.open(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", press);
}
byId("drift").addEventListener("click", (event) => {
  event.preventDefault();
  address.open("live");
  byId("inputs").open = true;
  const seen = [byId("inputs"), byId("serving").parentElement].find((one) => one.checkVisibility());
  seen.scrollIntoView();
  (seen.querySelector("summary") ?? seen).focus();
});
addEventListener("hashchange", show);
document.addEventListener("visibilitychange", () => (show(), document.hidden || probe()));
offerToken(() => (trying.forget(), show()));
listen(sayDrift);
listen(live.take);
live.start();
models.start();
trying.start();
show();
probe();
