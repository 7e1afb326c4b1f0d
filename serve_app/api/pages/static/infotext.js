// How a PNG says it was drawn: the text that A1111 and this service write, read as the fields of a request.

const KEYWORD = "parameters";
const FIELD = /\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)/g;

// The fields that a file tells of, and under `options` those that the page has no input for; null where it tells none.
export async function settingsIn(file) {
  const text = infotext(new DataView(await file.arrayBuffer()));
  try {
    return text && fieldsOf(text);
  } catch {
    return null; // of another form
  }
}

function infotext(view) {
  if (view.byteLength < 8 || view.getUint32(0) !== 0x89504e47) return null;
  for (let at = 8; at + 12 <= view.byteLength; ) {
    const length = view.getUint32(at);
    if (at + 12 + length > view.byteLength) return null;
    const kind = latin(view, at + 4, 4);
    const start = at + 8 + KEYWORD.length + 1;
    if (/^[ti]...$/.test(kind) && latin(view, at + 8, KEYWORD.length + 1) === `${KEYWORD}\0`) {
      if (kind === "tEXt") return latin(view, start, at + 8 + length - start);
      // Two bytes on compression, which is not read, then two more names.
      if (kind === "iTXt" && view.getUint8(start) === 0) {
        const content = new Uint8Array(view.buffer, start + 2, at + 8 + length - start - 2);
        const end = content.indexOf(0, content.indexOf(0) + 1);
        return new TextDecoder().decode(content.subarray(end + 1));
      }
    }
    at += 12 + length;
  }
  return null;
}

const latin = (view, start, length) =>
  Array.from(new Uint8Array(view.buffer, start, Math.max(0, Math.min(length, view.byteLength - start))), (byte) =>
    String.fromCharCode(byte),
  ).join("");

function fieldsOf(text) {
  const lines = text.split("\n");
  const told = Object.fromEntries([...lines.pop().matchAll(FIELD)].map(([, name, value]) => [name, unquoted(value)]));
  if (!told.Steps) return null;
  const negative = lines.findIndex((line) => line.startsWith("Negative prompt:"));
  const [prompt, rest] = negative < 0 ? [lines, []] : [lines.slice(0, negative), lines.slice(negative)];
  return {
    prompt: prompt.join("\n"),
    negative_prompt: rest.join("\n").replace(/^Negative prompt: ?/, ""),
    model: told.Model,
    scheduler: [told.Sampler, told["Schedule type"]].filter((part) => part && part !== "Automatic").join(" "),
    num_inference_steps: told.Steps,
    guidance_scale: told["CFG scale"],
    seed: told.Seed,
    size: /^\d+x\d+$/.test(told.Size) ? told.Size : null,
    // A1111 reads weights in every prompt.
    prompt_syntax: told["Prompt syntax"] ?? (told.Version === "Loraplex" ? "plain" : "a1111"),
    loras: json(told.Adapters, []).map(({ id, scale }) => ({ id: String(id), scale: Number(scale.denoiser ?? scale) })),
    options: json(told.Options, {}),
  };
}

const unquoted = (value) => (value.startsWith('"') ? json(value, value) : value);

function json(text, fallback) {
  try {
    return JSON.parse(text);
  } catch {
    return fallback;
  }
}
