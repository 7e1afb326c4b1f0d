// The request behind an image as commands that draw it again elsewhere. Pure.
//
// `asked` is {fields, picture, mask}, `service` is {url, hasKey}: its address with a slash at the end, and whether it asks
// for a key. No snippet holds the key itself: it is read from LORAPLEX_KEY.

const UNPACK = `python3 -c '
import base64, json, sys
for index, image in enumerate(json.load(sys.stdin)["data"]):
    open(f"image-{index}.png", "wb").write(base64.b64decode(image["b64_json"]))'`;

const PICTURE = "picture.png";
// What the Python client names itself; the rest goes beside it.
const OWN = new Set(["model", "prompt", "n", "size"]);

export function curl({ fields, picture, mask }, { url, hasKey }) {
  const parts = [`curl -sS ${url}v1/images/${picture ? "edits" : "generations"}`];
  if (hasKey) parts.push(`-H "Authorization: Bearer $LORAPLEX_KEY"`);
  if (picture) {
    parts.push(`-F ${shell(`image=@"${(picture.name || PICTURE).replaceAll(/["\\]/g, "\\$&")}"`)}`);
    if (mask) parts.push(`-F 'mask=@"${mask.name}"'`);
    for (const [name, value] of Object.entries(fields)) {
      parts.push(`--form-string ${shell(`${name}=${typeof value === "object" ? JSON.stringify(value) : value}`)}`);
    }
  } else {
    parts.push("-H 'Content-Type: application/json'", `-d ${shell(JSON.stringify(fields))}`);
  }
  return `${parts.join(" \\\n  ")} \\\n| ${UNPACK}\n`;
}

export function python({ fields, picture, mask }, { url, hasKey }) {
  const named = Object.entries(fields).filter(([name]) => OWN.has(name));
  const others = Object.entries(fields).filter(([name]) => !OWN.has(name));
  return [
    "import base64",
    ...(hasKey ? ["import os"] : []),
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${url}v1`)}, api_key=${hasKey ? 'os.environ["LORAPLEX_KEY"]' : '"none"'})`,
    `reply = client.images.${picture ? "edit" : "generate"}(`,
    ...(picture ? [`    image=open(${literal(picture.name || PICTURE)}, "rb"),`] : []),
    ...(mask ? [`    mask=open(${literal(mask.name)}, "rb"),`] : []),
    ...named.map(([name, value]) => `    ${name}=${literal(value)},`),
    "    extra_body={",
    ...others.map(([name, value]) => `        ${literal(name)}: ${picture ? formLiteral(value) : literal(value)},`),
    "    },",
    ")",
    "for index, image in enumerate(reply.data):",
    `    with open(f"image-{index}.png", "wb") as file:`,
    "        file.write(base64.b64decode(image.b64_json))",
    "",
  ].join("\n");
}

const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

// A form has no objects: what is one goes as JSON text.
const formLiteral = (value) => literal(typeof value === "object" ? JSON.stringify(value) : value);

// JSON's text and numbers are Python's too.
function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, part]) => `${literal(name)}: ${literal(part)}`).join(", ")}}`;
}
