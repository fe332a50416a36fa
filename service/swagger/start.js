// Read the description of the API, with the token that the console keeps in this tab, and show it in Swagger UI.

const KEY = "lvm-token";
const byId = (id) => document.getElementById(id);
// The page may be served below a prefix, which every request then needs.
const base = new URL(".", location.href).href;

async function load() {
  const token = sessionStorage.getItem(KEY);
  const response = await fetch("openapi.json", { headers: token ? { Authorization: `Bearer ${token}` } : {} });
  if (response.status === 401) return askForToken(token);
  if (!response.ok) throw new Error(`openapi.json is answered with status ${response.status}`);
  show(await response.json(), token);
}

function show(spec, token) {
  byId("message").hidden = true;
  byId("token-form").hidden = true;
  spec.servers = [{ url: base.replace(/\/$/, "") }];
  const ui = SwaggerUIBundle({
    spec,
    domNode: byId("swagger"),
    deepLinking: true,
    displayRequestDuration: true,
    docExpansion: "list",
    defaultModelsExpandDepth: 0,
    validatorUrl: null,
    onComplete: () => token && ui.preauthorizeApiKey("token", token),
  });
}

function askForToken(refused) {
  byId("message").textContent = refused ? "The token is unknown to this service." : "This service needs a token.";
  byId("token-form").hidden = false;
  byId("token").focus();
}

function say(error) {
  byId("message").hidden = false;
  byId("message").textContent = `The API cannot be shown: ${error.message}`;
}

byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("token").value.trim());
  load().catch(say);
});
load().catch(say);
