// Models: aliases, versions and their cards, the shadow, the ledger.

import { call, get } from "./api.js";
import { byId, el, notify, readout, table } from "./dom.js";
import { NONE, ago, cosine, ms, percent, signed, time, whole } from "./format.js";
import { render } from "./markdown.js";
import { histogram, parse, quantile, select } from "./prometheus.js";

const PAGE = 20;
let moves = [];

const guard = (action) => (...given) => action(...given).catch((error) => notify("models-notice", error.message));

export function start() {
  byId("older").addEventListener("click", guard(older));
}

export const load = guard(async () => {
  const [models, metrics] = await Promise.all([get("models"), call("metrics").then((response) => response.text())]);
  notify("models-notice");
  aliases(models.aliases);
  versions("nets", models.versions.filter(({ kind }) => kind !== "corpus"), models.aliases);
  versions("corpora", models.versions.filter(({ kind }) => kind === "corpus"), models.aliases);
  shadow(parse(metrics), models.aliases.candidate);
  moves = [];
  await older();
});

function aliases(known) {
  const state = ({ refused, warning }) => {
    const words = [refused && `refused ${refused.id}: ${refused.reason}`, warning].filter(Boolean);
    return words.length ? el("span", { class: "warning" }, words.join(" ")) : "none";
  };
  const rows = Object.entries(known).map(([alias, one]) => [
    el("strong", {}, alias),
    el("code", {}, one.id || NONE),
    el("time", { datetime: one.since, title: time(one.since) }, ago(one.since)),
    one.runtime,
    one.breaker,
    state(one),
  ]);
  table(byId("aliases"), [["Alias"], ["Serves"], ["Since"], ["Runtime"], ["Breaker"], ["Refused or warned"]], rows, "No alias is set.");
}

function versions(node, all, known) {
  const data = [...new Set(all.flatMap(({ scores }) => Object.keys(scores ?? {})))];
  const figures = data.flatMap((name) => [[`${name}: cosine`, true], ["margin", true], ["baseline", true]]);
  const heads = [["Version"], ["Kind"], ["T \u00d7 D", true], ["Parameters", true], ...figures];
  const rows = all.map((one) => {
    const names = Object.entries(known).filter(([, { id }]) => id === one.id).map(([alias]) => el("span", { class: "mark" }, alias));
    const name = el("span", { class: "version" }, opener(one), names);
    if (one.error) return [name, el("span", { class: "warning" }, one.error), ...heads.slice(2).map(() => NONE)];
    const size = `${one.context_length} \u00d7 ${one.dim}`;
    return [name, one.architecture || one.kind, size, one.parameters ? whole(one.parameters) : NONE, ...data.flatMap((set) => scores(one.scores[set]))];
  });
  table(byId(node), heads, rows, "None.");
}

function scores(score) {
  if (!score) return [NONE, NONE, NONE];
  return [cosine(score.cosine), signed(score.margin), cosine(Math.max(...Object.values(score.baselines)))];
}

const opener = ({ id }) => el("button", { type: "button", class: "link", click: guard(() => card(id)), "aria-label": `Card of ${id}` }, el("code", {}, id));

async function card(id) {
  const text = await (await call(`models/${id}/card`)).text();
  const { front, body } = render(text);
  const close = el("button", { type: "button", class: "plain", click: () => (byId("card").hidden = true) }, "Close");
  const matter = el("details", {}, el("summary", {}, "Front matter"), el("pre", { tabindex: "0" }, front));
  byId("card").replaceChildren(el("p", { class: "where" }, el("code", {}, id), close), ...body, matter);
  byId("card").setAttribute("aria-label", `Card of ${id}`);
  byId("card").hidden = false;
  byId("card").focus();
}

function shadow(samples, candidate) {
  const named = (outcome) => select(samples, "lvm_shadow_total", { outcome })[0]?.value ?? 0;
  const [near, overlap, extra] = ["cosine", "overlap", "extra_seconds"].map((name) => histogram(samples, `lvm_shadow_${name}`));
  const average = (found) => (found?.count ? found.sum / found.count : null);
  if (!candidate && !named("compared")) {
    byId("shadow").replaceChildren(el("p", { class: "quiet" }, "No version is aliased candidate, so nothing is compared: ", el("code", {}, "lvm promote candidate VERSION"), " begins it."));
    return;
  }
  const slower = average(extra);
  byId("shadow").replaceChildren(
    el("div", { class: "readouts" },
      readout("Candidate", candidate?.id.split("/")[0] ?? NONE, candidate?.id.split("/")[1] ?? "no longer set"),
      readout("Compared", whole(named("compared")), `${whole(named("skipped"))} skipped, ${whole(named("failed"))} failed`),
      readout("Cosine to the answer given", cosine(average(near)), `mean; a tenth below ${cosine(quantile(0.1, near))}`),
      readout("Passages both find", percent(average(overlap)), "of the first 10"),
      readout("Takes longer by", ms(slower === null ? null : slower * 1e3), "mean, alone in a batch"),
    ),
  );
}

async function older() {
  const page = await get(`ledger?offset=${moves.length}&limit=${PAGE}`);
  moves.push(...page.moves);
  if (page.skipped) notify("models-notice", `Left out: ${page.skipped} lines of the ledger that are no moves.`);
  const rows = moves.map(({ time: at, who, alias, action, before, after, why }) => [
    el("time", { datetime: at }, time(at)), who, alias, action, el("code", {}, before ?? NONE), el("code", {}, after ?? NONE), why || NONE,
  ]);
  table(byId("ledger"), [["Time"], ["Who"], ["Alias"], ["Move"], ["From"], ["To"], ["Why"]], rows, "No alias was ever moved.");
  byId("older").hidden = moves.length >= page.total;
}
