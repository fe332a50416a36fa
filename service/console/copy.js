// Text to take along: shown as code, with a button that copies it and says so.

import { el } from "./dom.js";

const SHOWN_MS = 2000;

// Return a button that copies what `text()` returns, or the string `text`.
export function copyButton(text, label = "Copy") {
  const button = el("button", { type: "button", class: "plain copy" }, label);
  button.addEventListener("click", async () => {
    const isCopied = await copy(typeof text === "function" ? text() : text, button);
    button.textContent = isCopied ? "Copied" : "Select and copy by hand";
    setTimeout(() => (button.textContent = label), SHOWN_MS);
  });
  return button;
}

// Return a command or program as a block with its copy button.
export const snippet = (text, label = "Copy") => el("div", { class: "snippet" }, el("pre", { tabindex: "0" }, el("code", {}, text)), copyButton(text, label));

// Browsers offer the clipboard only to pages of https or of this machine; elsewhere the old way is left.
async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyFrom(el("textarea", { class: "offscreen", "aria-hidden": "true", tabindex: "-1" }, text), button);
  }
}

function copyFrom(area, button) {
  button.after(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  button.focus();
  return isCopied;
}
