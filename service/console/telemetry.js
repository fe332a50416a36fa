// The one reader of /metrics: every 2 s while Live is seen, else every 10 s, never while the page is hidden.

import { call } from "./api.js";
import { History } from "./history.js";
import { parse } from "./prometheus.js";

const KEY = `lvm-history ${location.pathname}`;
const SOON_MS = 2000;
const LATER_MS = 10_000;
const listeners = [];
let pause = LATER_MS;
let timer = 0;

export const history = History.fromText(sessionStorage.getItem(KEY) ?? "");

// Call `listener` with (samples, null) after each scrape, and with (null, error) if there was none.
export const listen = (listener) => listeners.push(listener);

// Read at once and go on, soon or later, until the page is hidden or wants a token.
export function watch(isSoon) {
  clearTimeout(timer);
  pause = isSoon ? SOON_MS : LATER_MS;
  if (!document.hidden) read();
}

async function read() {
  const mine = (timer = setTimeout(() => {}));
  const told = await scrape();
  for (const listener of listeners) listener(...told);
  if (mine === timer && !document.hidden && told[1]?.status !== 401) timer = setTimeout(read, pause);
}

async function scrape() {
  try {
    const samples = parse(await (await call("metrics")).text());
    history.add(Date.now() / 1000, samples);
    return [samples, null];
  } catch (error) {
    return [null, error];
  }
}

// Keep the history for this tab; without room it is lost, and nothing else.
function save() {
  try {
    sessionStorage.setItem(KEY, history.toText());
  } catch {
    sessionStorage.removeItem(KEY);
  }
}

addEventListener("pagehide", save);
document.addEventListener("visibilitychange", () => document.hidden && save());
