// Draws with an adapter, and edits a picture with it, by each client of Node; prints each image in base64 as a line of
// JSON.
import { readFileSync } from "node:fs";
import { generateImage } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { InferenceClient } from "@huggingface/inference";
import { DallEAPIWrapper } from "@langchain/openai";
import OpenAI, { toFile } from "openai";

const [url, adapter, path, everything] = process.argv.slice(2);
const picture = readFileSync(path);
const mask = readFileSync(everything);
const prompt = "a red circle on a blue background";
const say = (client, step, image) => console.log(JSON.stringify({ client, step, image }));
const base64 = async (blob) => Buffer.from(await blob.arrayBuffer()).toString("base64");

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const drawn = await openai.images.generate({ model: adapter, prompt, seed: 7 });
say("openai", "generate", drawn.data[0].b64_json);
const image = await toFile(picture, "a.png", { type: "image/png" });
const edited = await openai.images.edit({ model: adapter, prompt, image, strength: 0.5, seed: 7 });
say("openai", "edit", edited.data[0].b64_json);

const hub = new InferenceClient(undefined, { endpointUrl: url });
const asked = { lora_adapter: adapter, seed: 7 };
say("huggingface", "generate", await base64(await hub.textToImage({ inputs: prompt, parameters: asked })));
const change = { inputs: new Blob([picture]), parameters: { ...asked, prompt, strength: 0.5 } };
say("huggingface", "edit", await base64(await hub.imageToImage(change)));

const sdk = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const made = await generateImage({ model: sdk.image(adapter), prompt });
say("ai", "generate", made.image.base64);
const whole = { text: prompt, images: [picture], mask };
const remade = await generateImage({ model: sdk.image(adapter), prompt: whole });
say("ai", "edit", remade.image.base64);

// Asks for a style, a quality and an address, whatever its user says.
const tool = new DallEAPIWrapper({ baseUrl: `${url}/v1`, apiKey: "none", model: adapter, size: "64x64" });
say("langchain", "generate", (await tool.invoke(prompt)).replace("data:image/png;base64,", ""));
