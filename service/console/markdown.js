// A safe subset of Markdown as elements: headings, paragraphs, lists, tables, `code`. All else stays text.

import { el } from "./dom.js";

const inline = (text) => text.split(/(`[^`]+`)/).map((part) => (/^`.+`$/.test(part) ? el("code", {}, part.slice(1, -1)) : part));
const cells = (line) => line.replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
const isNumber = (cell) => /^[-\u2212\d.,%]+$/.test(cell);

function grid([head, , ...body]) {
  const numbers = cells(body[0] ?? "").map(isNumber);
  const row = (line, tag) => el("tr", {}, cells(line).map((cell, place) => el(tag, { class: numbers[place] && "number" }, inline(isNumber(cell) ? cell.replace("-", "\u2212") : cell))));
  return el("table", {}, el("thead", {}, row(head, "th")), el("tbody", {}, body.map((line) => row(line, "td"))));
}

function block(text) {
  const lines = text.split("\n");
  const heading = /^(#{1,4}) (.*)$/.exec(lines[0]);
  if (heading) return el(`h${heading[1].length + 2}`, {}, inline(heading[2]));
  if (lines.every((line) => line.startsWith("|"))) {
    return el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" }, grid(lines));
  }
  if (lines.every((line) => /^[-*] |^ {2}/.test(line))) {
    return el("ul", {}, text.split(/\n?^[-*] /m).filter(Boolean).map((item) => el("li", {}, inline(item))));
  }
  return el("p", {}, inline(lines.join(" ")));
}

// Return {front, body}: the YAML front matter as text, and elements of the rest.
export function render(text) {
  const [, front, rest] = /^---\n(.*?)\n---\n(.*)$/s.exec(text) ?? [null, "", text];
  return { front, body: rest.trim().split(/\n{2,}/).map(block) };
}
