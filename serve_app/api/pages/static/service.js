// The service over HTTP: the catalog, and a drawing as a stream of events. Knows nothing of the page.

const KEY = "loraplex.key";

export class ServiceError extends Error {
  constructor(message, { status = 0, code = "", param = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
  }
}

// What an error says to a person.
export function sentence(error) {
  const message = error instanceof ServiceError ? error.message : `The page failed: ${error.message}`;
  return message.replace(/^[a-z](?=[a-z]* )/, (letter) => letter.toUpperCase()); // but never an id
}

export class Service {
  // `root` is the address of the page: the service may lie below a path.
  constructor(root = document.baseURI, storage = sessionStorage) {
    this.root = root;
    this.storage = storage;
  }

  get key() {
    return this.storage.getItem(KEY) ?? "";
  }

  set key(value) {
    if (value) this.storage.setItem(KEY, value);
    else this.storage.removeItem(KEY);
  }

  url(path) {
    return new URL(path, this.root).href;
  }

  // The rows of a list.
  async list(path, signal) {
    const reply = await this.#ask(path, { signal, headers: { accept: "application/json" } });
    const body = await reply.json();
    return Array.isArray(body) ? body : body.data;
  }

  // The picture of an adapter; with `mayDraw`, the service draws one where there is none.
  async picture(id, { mayDraw = false } = {}) {
    const path = id.split("/").map(encodeURIComponent).join("/");
    const reply = await this.#ask(`v1/pictures/${path}`, { method: mayDraw ? "POST" : "GET", cache: "default" });
    return reply.blob();
  }

  // Yields the events of a drawing: objects whose `type` ends in starting, progress, partial_image or completed.
  async *draw(request, signal) {
    const reply = await this.#ask(`v1/images/${request.picture ? "edits" : "generations"}`, {
      method: "POST",
      signal,
      ...body({ ...request.fields, stream: true, partial_images: 3 }, request),
    });
    for await (const event of events(reply.body)) {
      signal.throwIfAborted(); // what came before it was cancelled may be here already
      if (event.error) throw new ServiceError(event.error.message, event.error);
      yield event;
    }
  }

  async #ask(path, { headers = {}, ...options }) {
    if (this.key) headers = { ...headers, authorization: `Bearer ${this.key}` };
    let reply;
    try {
      reply = await fetch(this.url(path), { cache: "no-store", ...options, headers, credentials: "omit" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServiceError("The service cannot be reached. Is it still running?");
    }
    if (!reply.ok) throw await refusal(reply);
    return reply;
  }
}

function body(fields, { picture, mask }) {
  if (!picture) return { headers: { "content-type": "application/json" }, body: JSON.stringify(fields) };
  const form = new FormData();
  form.append("image", picture, picture.name || "picture.png");
  if (mask) form.append("mask", mask);
  for (const [name, value] of Object.entries(fields)) {
    form.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  return { body: form };
}

async function refusal(reply) {
  const fallback = `The service answered ${reply.status} ${reply.statusText}`.trim();
  try {
    const { error } = await reply.json();
    return new ServiceError(error.message ?? error ?? fallback, { ...error, status: reply.status });
  } catch {
    return new ServiceError(fallback, { status: reply.status });
  }
}

// The events of a server-sent stream, each one's data read as JSON.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data:"));
        if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The connection broke before the image was done. Try again.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
