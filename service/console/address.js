// The address of what is seen: `#/VIEW?name=value&...`. A view keeps its values while another view is seen.

const kept = new Map(); // the query of each view that was seen

const parts = () => /^#\/([^?]*)\??(.*)$/s.exec(location.hash) ?? ["", "", ""];
const join = (view, query) => `#/${view}${query && "?"}${query}`;

// Return the view that the address names, or "".
export const view = () => parts()[1];

// Return the values of the view that is seen; what they hold may come from anywhere, and is to be checked.
export const values = () => new URLSearchParams(parts()[2]);

// Replace values of the view that is seen, without a new entry in the history; null, undefined or "" removes one.
export function set(changes) {
  const next = changed(values(), changes);
  if (next !== parts()[2]) history.replaceState(null, "", join(view(), next));
}

// Open a view, with the values that it had and `changes`, as a new entry of the history; listeners of `hashchange` show it.
export function open(name, changes = {}) {
  keep();
  const next = link(name, changes);
  if (next !== location.hash) history.pushState(null, "", next);
  dispatchEvent(new HashChangeEvent("hashchange"));
}

// Return a relative address of a view, with the values that it had and `changes`.
export const link = (name, changes = {}) => join(name, changed(new URLSearchParams(name === view() ? parts()[2] : kept.get(name)), changes));

// Note the values of the view that is seen, for when it is seen again.
export const keep = () => kept.set(view(), parts()[2]);

function changed(query, changes) {
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "") query.delete(name);
    else query.set(name, value);
  }
  return query.toString().replaceAll("%2F", "/");
}
