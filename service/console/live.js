// Live: /metrics read again and again while someone looks, kept for five minutes, and drawn.

import { call } from "./api.js";
import { byId, el, notify, readout, table } from "./dom.js";
import { NONE, ms, percent, quantity, rate, whole } from "./format.js";
import { Plot, SPAN_S } from "./plot.js";
import { between, histogram, parse, quantile, rise, select, total, values } from "./prometheus.js";

const EVERY_MS = 2000;
const BACK = 5; // scrapes that a rate or percentile looks back: 10 s
const GOOD = ["ok", "fallback"];
const BREAKER = { 0: "closed", 0.5: "half-open", 1: "open" };
const PERCENTILES = [["p50", 0.5], ["p95", 0.95], ["p99", 0.99]];
const scrapes = []; // {at: seconds, samples}
const plots = new Map();
let timer = 0;

// Look while `isSeen`, at once and then every two seconds.
export function watch(isSeen) {
  clearTimeout(timer);
  if (isSeen) look();
}

async function look() {
  try {
    const samples = parse(await (await call("metrics")).text());
    scrapes.push({ at: performance.now() / 1000, samples });
    while (scrapes[0].at < scrapes.at(-1).at - SPAN_S - 2 * BACK) scrapes.shift();
    notify("live-notice");
    show();
  } catch (error) {
    const last = scrapes.length ? ` The last reading is ${Math.round(performance.now() / 1000 - scrapes.at(-1).at)} s old.` : "";
    notify("live-notice", `${error.message}${last}`);
  }
  clearTimeout(timer);
  if (!document.hidden && !byId("live").hidden) timer = setTimeout(look, EVERY_MS);
}

// What a scrape says beside the one BACK before it, or the first after a break.
class Stretch {
  constructor(place) {
    const from = Math.max(0, place - BACK);
    const gap = scrapes.findLastIndex(({ at }, one) => one > from && one <= place && at - scrapes[one - 1].at > 15);
    [this.later, this.earlier] = [scrapes[place], scrapes[Math.max(from, gap)]];
    this.at = this.later.at;
    this.seconds = this.at - this.earlier.at;
  }

  rise(name, wanted) {
    return this.seconds ? rise(total(this.later.samples, name, wanted), total(this.earlier.samples, name, wanted)) : null;
  }

  rate(name, wanted) {
    const more = this.rise(name, wanted);
    return more === null ? null : more / this.seconds;
  }

  histogram(name, wanted) {
    return this.seconds ? between(histogram(this.later.samples, name, wanted), histogram(this.earlier.samples, name, wanted)) : null;
  }

  level(name, wanted) {
    return total(this.later.samples, name, wanted);
  }

  quantile(share, route) {
    const seconds = quantile(share, this.histogram("lvm_request_seconds", { route, stage: "total" }));
    return seconds === null ? null : seconds * 1e3;
  }

  mean(name, wanted, scale = 1) {
    const found = this.histogram(name, wanted);
    return found?.count ? (scale * found.sum) / found.count : null;
  }

  // The requests of inference routes that ended in one of `outcomes`, or in any.
  requests(routes, outcomes = [undefined]) {
    const wanted = routes.flatMap((route) => outcomes.map((outcome) => (outcome ? { route, outcome } : { route })));
    return this.seconds ? wanted.reduce((sum, labels) => sum + (this.rise("lvm_requests_total", labels) ?? 0), 0) : null;
  }
}

const share = (part, whole, scale = 1) => (whole ? (scale * part) / whole : null);

function show() {
  const stretches = scrapes.map((_, place) => new Stretch(place));
  const { samples } = scrapes.at(-1);
  const routes = values(samples, "lvm_in_flight_requests", "route");
  summary(stretches.at(-1), routes);
  for (const view of views(samples, routes, stretches)) draw(...view);
  serving(samples);
}

// Every plot as [title, unit, where its axis ends at least, series]; a series is [name, its value in a stretch].
function views(samples, routes, stretches) {
  const engines = values(samples, "lvm_queue_rows", "engine");
  const stages = ["decode", "queue", "infer", "encode"];
  const used = routes.filter((route) => total(samples, "lvm_requests_total", { route }) || !route.startsWith("/v2"));
  const seen = select(samples, "lvm_requests_total").filter(({ labels, value }) => value && used.includes(labels.route));
  const latency = used.map((route) => [`Latency of ${route}`, "ms", 1, PERCENTILES.map(([name, part]) => [name, (one) => one.quantile(part, route)])]);
  const flow = seen.map(({ labels }) => [`${labels.route} ${labels.outcome}`, (one) => one.rate("lvm_requests_total", labels)]);
  const drift = select(samples, "lvm_input_drift").map(({ labels }) => [`${labels.engine} ${labels.figure.replaceAll("_", " ")}`, (one) => one.level("lvm_input_drift", labels)]);
  const all = [
    ...latency,
    ["Time of /predict by stage, mean", "ms", 0.1, stages.map((stage) => [stage, (one) => one.mean("lvm_request_seconds", { route: "/predict", stage }, 1e3)])],
    ["Requests by route and outcome", "/s", 1, flow],
    ["Rows in a batch, mean", "", 1, engines.map((engine) => [engine, (one) => one.mean("lvm_batch_rows", { engine })])],
    ["Rows waiting or running", "", 1, engines.map((engine) => [engine, (one) => one.level("lvm_queue_rows", { engine })])],
    ["Answered by another engine", "%", 1, [["fallback share", (one) => share(one.requests(routes, ["fallback"]), one.requests(routes, GOOD), 100)]]],
    ["Drift of inputs, in deviations of the training data", "\u03c3", 1, drift],
  ];
  const points = (value) => stretches.map((one) => [one.at, value(one)]);
  return all.map(([title, unit, most, series]) => [title, unit, most, series.map(([name, value]) => ({ name, points: points(value) }))]);
}

function draw(title, unit, most, series) {
  if (!plots.has(title)) {
    plots.set(title, new Plot(title, unit, most));
    byId("plots").append(plots.get(title).element);
  }
  plots.get(title).draw(series, scrapes.at(-1).at);
}

function summary(one, routes) {
  const [all, good, other] = [one.requests(routes), one.requests(routes, GOOD), one.requests(routes, ["fallback"])];
  const bad = all ? 1 - good / all : null;
  const { samples } = one.later;
  const open = select(samples, "lvm_breaker_open").filter(({ value }) => value);
  byId("readouts").replaceChildren(
    readout("Requests", rate(all === null ? null : all / one.seconds), `${whole(total(samples, "lvm_in_flight_requests"))} in flight`),
    ...["/predict", "/retrieve"].map((route) => readout(`p99 of ${route}`, ms(one.quantile(0.99, route)), `p50 ${ms(one.quantile(0.5, route))}`)),
    readout("Not answered", percent(bad), "refused, failed, expired or cancelled", bad > 0.001 ? "miss" : null),
    readout("By another engine", percent(share(other, good)), "fallback share", other ? "miss" : null),
    readout("Breakers", open.length ? open.map(({ labels, value }) => `${labels.engine} ${BREAKER[value]}`).join(", ") : "closed", "of all engines", open.length ? "miss" : null),
  );
}

function serving(samples) {
  const rows = select(samples, "lvm_model_info").map(({ labels: { alias, model, version, runtime } }) => {
    const breaker = total(samples, "lvm_breaker_open", { engine: alias });
    const refused = ["refused", "failed"].reduce((sum, outcome) => sum + (total(samples, "lvm_reloads_total", { alias, outcome }) ?? 0), 0);
    const drift = select(samples, "lvm_input_drift", { engine: alias }).map(({ value }) => Math.abs(value));
    const most = drift.length ? Math.max(...drift) : null;
    return [alias, el("code", {}, `${model}/${version}`), runtime, BREAKER[breaker] ?? NONE, whole(refused), quantity(most, "\u03c3")];
  });
  const heads = [["Alias"], ["Version"], ["Runtime"], ["Breaker"], ["Reloads refused", true], ["Largest drift", true]];
  table(byId("serving"), heads, rows, "No version is loaded.");
}
