// A safe subset of Markdown as elements: headings, paragraphs, lists, tables, `code`. All else stays text.

import { el, table } from "./dom.js";

const inline = (text) => text.split(/(`[^`]+`)/).map((part) => (/^`.+`$/.test(part) ? el("code", {}, part.slice(1, -1)) : part));
const cells = (line) => line.replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
const isNumber = (cell) => /^[-\u2212\d.,%]+$/.test(cell);

const shown = (cell) => inline(isNumber(cell) ? cell.replace("-", "\u2212") : cell);

// A table whose rows begin alike has them in groups; any other is a list of blocks on a phone.
function grid([first, , ...rest]) {
  const [heads, rows] = [cells(first), rest.map(cells)];
  const isNumeric = heads.map((_, column) => isNumber(rows[0]?.[column] ?? ""));
  const names = [...new Set(rows.map(([name]) => name))];
  if (rows.length > names.length) return grouped(heads, rows, names, isNumeric);
  const node = el("table");
  table(node, heads.map((head, column) => [inline(head), isNumeric[column], head]), rows.map((row) => row.map(shown)), "");
  return node;
}

function grouped([, ...heads], rows, names, isNumeric) {
  const line = (row, tag) => el("tr", {}, row.map((cell, column) => el(tag, { class: isNumeric[column + 1] && "number" }, shown(cell))));
  const group = (name) => el("tbody", {}, el("tr", { class: "group" }, el("th", { colspan: heads.length, scope: "rowgroup" }, inline(name))), rows.filter(([first]) => first === name).map(([, ...row]) => line(row, "td")));
  return el("table", { class: "grouped" }, el("thead", {}, line(heads, "th")), names.map(group));
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
