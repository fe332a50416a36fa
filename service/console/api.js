// The way to the service: one caller, one kind of error, and the token where one is wanted.

import { byId } from "./dom.js";

const KEY = "lvm-token";
let asking = null; // one prompt for however many calls
let declined = false;

export class Problem extends Error {
  constructor(status, detail, id = "", pointer = "") {
    super(status ? `${detail} (${[status, id && `request ${id}`].filter(Boolean).join(", ")})` : detail);
    [this.status, this.pointer] = [status, pointer];
  }
}

// Answer with the response to a path below the page (behind a proxy there may be a prefix); throws Problem where it is none of the 200s or the service cannot be reached.
export async function call(path, { body, signal } = {}) {
  const token = sessionStorage.getItem(KEY);
  const headers = {
    ...(token ? { Authorization: `Bearer ${token}` } : {}),
    ...(body === undefined ? {} : { "Content-Type": "application/json" }),
  };
  const method = body === undefined ? "GET" : "POST";
  const response = await reach(path, { method, headers, body: JSON.stringify(body), signal, cache: "no-store" });
  if (response.status === 401 && (sessionStorage.getItem(KEY) !== token || (await ask(token)))) return call(path, { body, signal });
  if (!response.ok) throw await problemOf(response);
  return response;
}

export const hasToken = () => Boolean(sessionStorage.getItem(KEY));

export const get = async (path, options) => (await call(path, options)).json();

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "The service cannot be reached.");
  }
}

async function problemOf(response) {
  const body = await response.json().catch(() => ({}));
  const where = body.pointer ? ` at ${body.pointer}` : "";
  const way = response.status === 401 ? "This service requires a token, see Enter token above: " : "";
  return new Problem(response.status, `${way}${body.detail ?? response.statusText}${where}`, body.request_id, body.pointer);
}

// Ask for a token, unless that was declined; say whether there is a new one.
function ask(refused) {
  byId("token-button").hidden = false;
  if (declined) return false;
  asking ??= prompt(refused).finally(() => (asking = null));
  return asking;
}

function prompt(refused) {
  const [dialog, form, input] = ["token-dialog", "token-form", "token"].map(byId);
  if (refused) byId("token-reason").textContent = "The token was refused. Check it, or ask whoever runs this service.";
  input.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const end = (token) => {
      declined = !token;
      if (token) sessionStorage.setItem(KEY, token);
      dialog.close();
      resolve(Boolean(token));
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      end(input.value.trim());
    };
    byId("token-cancel").onclick = () => end("");
    dialog.oncancel = () => end("");
  });
}

// Let the button in the header ask again; `then` runs with a new token.
export function offerToken(then) {
  byId("token-button").addEventListener("click", async () => {
    declined = false;
    if (await ask(sessionStorage.getItem(KEY))) then();
  });
}
