// Generates an image with an adapter, and edits it, with each client of Node; prints one line of JSON for each.
import { generateImage } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { InferenceClient } from "@huggingface/inference";
import OpenAI, { toFile } from "openai";

const [url, adapter] = process.argv.slice(2);
const PNG = "\u0089PNG";
const signature = (bytes) => Buffer.from(bytes).subarray(0, 4).toString("latin1") === PNG;
const say = (client, isPng) => console.log(JSON.stringify({ client, isPng }));

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const drawn = await openai.images.generate({ model: adapter, prompt: "a red circle" });
const image = Buffer.from(drawn.data[0].b64_json, "base64");
say("openai generate", signature(image));
const file = await toFile(image, "a.png", { type: "image/png" });
const edited = await openai.images.edit({ model: adapter, prompt: "a blue circle", image: file });
say("openai edit", signature(Buffer.from(edited.data[0].b64_json, "base64")));

const hub = new InferenceClient(undefined, { endpointUrl: url });
const blob = await hub.textToImage({ inputs: "a red circle", parameters: { lora_adapter: adapter } });
say("huggingface textToImage", (await blob.arrayBuffer()).byteLength > 100);
const changed = await hub.imageToImage({ inputs: new Blob([image]), parameters: { prompt: "a circle", strength: 0.5 } });
say("huggingface imageToImage", (await changed.arrayBuffer()).byteLength > 100);

const sdk = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const { image: made } = await generateImage({ model: sdk.image(adapter), prompt: "a red circle" });
say("ai generateImage", signature(made.uint8Array));
