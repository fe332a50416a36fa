// The page: tabs, and which view is seen.

import { offerToken } from "./api.js";
import { byId } from "./dom.js";
import * as live from "./live.js";
import * as models from "./models.js";
import * as trying from "./try.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const names = tabs.map((tab) => tab.getAttribute("aria-controls"));
const KEYS = { ArrowRight: (at) => at + 1, ArrowLeft: (at) => at - 1, Home: () => 0, End: () => -1 };
const PROBE_MS = 5000;
let tried = null;

// The view that the address names; with a slash, or the browser would scroll to it.
const named = () => location.hash.slice(2);

// Show one view, and only it.
function choose(name) {
  const chosen = names.includes(name) ? name : names[0];
  for (const [place, tab] of tabs.entries()) {
    const isChosen = names[place] === chosen;
    tab.setAttribute("aria-selected", isChosen);
    tab.tabIndex = isChosen ? 0 : -1;
    byId(names[place]).hidden = !isChosen;
  }
  if (named() !== chosen) history.replaceState(null, "", `#/${chosen}`);
  live.watch(chosen === "live" && !document.hidden);
  if (chosen === "models") models.load();
  if (chosen === "try" && !tried) tried = trying.load();
}

function press(event) {
  const at = tabs.indexOf(event.target);
  const next = KEYS[event.key]?.(at);
  if (next === undefined) return;
  event.preventDefault();
  const tab = tabs.at(next % tabs.length);
  tab.focus();
  choose(tab.getAttribute("aria-controls"));
}

// Say whether the service takes requests; the probe needs no token.
async function probe() {
  if (!document.hidden) {
    const ready = await fetch("readyz", { cache: "no-store" }).then((response) => response.ok, () => null);
    const [words, state] = { true: ["ready", "hit"], false: ["not ready", "miss"], null: ["unreachable", "miss"] }[ready];
    if (byId("status").textContent !== words) byId("status").textContent = words;
    byId("status").dataset.state = state;
  }
  setTimeout(probe, PROBE_MS);
}

const chosen = () => choose(named());

for (const tab of tabs) {
  tab.addEventListener("click", () => choose(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", press);
}
addEventListener("hashchange", chosen);
document.addEventListener("visibilitychange", chosen);
offerToken(() => ((tried = null), chosen()));
models.start();
trying.start();
chosen();
probe();
