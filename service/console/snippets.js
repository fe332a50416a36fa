// What is on the screen as commands: the same requests for a shell and for Python.

const service = () => new URL(".", location.href.split("#")[0]).href.replace(/\/$/, "");

// Return a literal of Python; JSON differs in three words only.
const python = (value) => JSON.stringify(value, null, 1).replace(/\n\s*/g, " ").replace(/"(?:[^"\\]|\\.)*"|\btrue\b|\bfalse\b|\bnull\b/g, (word) => ({ true: "True", false: "False", null: "None" })[word] ?? word);

// Return commands for a shell: each `request` is {path, body}.
export function curl(requests, hasToken) {
  const token = hasToken ? ` \\\n  -H "Authorization: Bearer $LVM_TOKEN"` : "";
  const one = ({ path, body }) => `curl -s '${service()}/${path}' -H 'Content-Type: application/json'${token} --data-binary @- <<'EOF'\n${JSON.stringify(body)}\nEOF\n`;
  return requests.map(one).join("echo\n");
}

// Return a program that sends the requests; passages of an article are read from the service: `read` is {article, range}.
export function program(requests, hasToken) {
  const isArticle = Boolean(requests[0].read);
  const lines = [
    ...(hasToken ? ["import os"] : []),
    ...(isArticle ? ["from base64 import b64decode"] : []),
    ...(hasToken || isArticle ? [""] : []),
    "import httpx",
    ...(isArticle ? ["import numpy", "", "from lvm import Client"] : []),
    "",
    `url = ${python(service())}`,
    ...(hasToken ? [`token = os.environ["LVM_TOKEN"]`, `headers = {"Authorization": f"Bearer {token}"}`] : []),
    ...(isArticle ? withClient(requests, hasToken) : withText(requests, hasToken)),
  ];
  return `${lines.join("\n")}\n`;
}

function withClient(requests, hasToken) {
  const calls = requests.map(({ path, read, body: { context, ...options } }) => {
    const rows = `numpy.stack(vectors[${read.range.join(":")}])`;
    const given = Object.entries(options).map(([name, value]) => `, ${name}=${python(value)}`).join("");
    if (path === "predict") return [`    print(client.predict(${rows}${given}).vectors[:4])`];
    return [`    for passage in client.retrieve(${rows}${given}):`, `        print(f"{passage.score:.4f}  {passage.title}, passage {passage.position + 1}")`];
  });
  return [
    `article = httpx.get(f"{url}/articles/${requests[0].read.article}"${hasToken ? ", headers=headers" : ""}).raise_for_status().json()`,
    `vectors = [numpy.frombuffer(b64decode(chunk["vector"]), "<f4") for chunk in article["chunks"]]`,
    `with Client(url${hasToken ? ", token=token" : ""}) as client:`,
    ...calls.flat(),
  ];
}

function withText(requests, hasToken) {
  const sent = requests.map(({ path, body: { text, ...options } }) => {
    const call = `httpx.post(f"{url}/${path}", json={"text": text, **${python(options)}}${hasToken ? ", headers=headers" : ""})`;
    if (path === "predict") return [`answer = ${call}.raise_for_status().json()`, `print(answer["vector"][:4])`];
    return [`answer = ${call}.raise_for_status().json()`, `for passage in answer["results"]:`, `    print(f"{passage['score']:.4f}  {passage['title']}, passage {passage['position'] + 1}")`];
  });
  return [`text = ${python(requests[0].body.text)}`, ...sent.flat()];
}

// Copy a text; without a secure context browsers have only the old command. Returns whether it was copied.
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "unseen";
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    return isCopied;
  }
}
