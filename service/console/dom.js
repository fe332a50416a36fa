// Elements of text and nodes, never of markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
export const byId = (id) => document.getElementById(id);

// Say something in a notice, or with no words hide it.
export function notify(id, words = "") {
  const notice = byId(id);
  if (notice.textContent !== words) notice.textContent = words;
  notice.hidden = !words;
}

// Fill a table: heads are [text or nodes, isNumber, text if nodes]; cells are text or nodes. On a phone a row is a block, so every cell knows its head.
export function table(node, heads, rows, empty) {
  node.setAttribute("role", "table");
  const head = el("tr", { role: "row" }, heads.map(([text, number]) => el("th", { scope: "col", role: "columnheader", class: number && "number" }, text)));
  const cell = (value, column) => el("td", { role: "cell", class: heads[column][1] && "number", "data-head": heads[column][2] ?? heads[column][0] }, value ?? "–");
  const line = (row) => el("tr", { role: "row" }, row.map(cell));
  const body = rows.length ? rows.map(line) : el("tr", { role: "row" }, el("td", { role: "cell", colspan: heads.length, class: "quiet" }, empty));
  node.replaceChildren(el("thead", { role: "rowgroup" }, head), el("tbody", { role: "rowgroup" }, body));
}

// A figure with its name above and its remark below.
export function readout(name, value, remark = "", state = null) {
  const parts = [el("dt", {}, name), el("dd", { class: "value" }, value)];
  return el("dl", { class: "readout", "data-state": state }, parts, remark ? el("dd", { class: "remark" }, remark) : null);
}
