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

// Return a program that sends the requests. `read` is {article, range} of passages that are read from the service.
export function program(requests, hasToken) {
  const [{ read, body }] = requests;
  const lines = [
    ...(hasToken ? ["import os", ""] : []),
    "from lvm import Client",
    "",
    ...(read ? [] : [`text = ${python(body.text)}`]),
    `with Client(${python(service())}${hasToken ? ', token=os.environ["LVM_TOKEN"]' : ""}) as client:`,
    ...(read ? [`    article = client.article(${read.article})`] : []),
    ...requests.flatMap(step),
  ];
  return `${lines.join("\n")}\n`;
}

function step({ path, read, body: { context, text, ...options } }) {
  const input = read ? `article.vectors[${read.range.join(":")}]` : "text";
  const given = [input, ...Object.entries(options).map(([name, value]) => `${name}=${python(value)}`)].join(", ");
  if (path === "predict") return [`    print(client.predict(${given}).vectors[:4])`];
  return [`    for passage in client.retrieve(${given}):`, '        print(f"{passage.score:.4f}  {passage.title}, passage {passage.position + 1}")'];
}
