// The page: tabs, and which view is seen.

import * as address from "./address.js";
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

// Show the view that the address names, and only it.
function show() {
  const chosen = names.includes(address.view()) ? address.view() : names[0];
  if (address.view() !== chosen) history.replaceState(null, "", address.link(chosen));
  for (const [place, tab] of tabs.entries()) {
    const isChosen = names[place] === chosen;
    tab.setAttribute("aria-selected", isChosen);
    tab.tabIndex = isChosen ? 0 : -1;
    byId(names[place]).hidden = !isChosen;
  }
  address.keep();
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
  address.open(tab.getAttribute("aria-controls"));
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

for (const tab of tabs) {
  tab.addEventListener("click", () => address.open(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", press);
}
addEventListener("hashchange", show);
document.addEventListener("visibilitychange", show);
offerToken(() => ((tried = null), show()));
models.start();
trying.start();
show();
probe();
