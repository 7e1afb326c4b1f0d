// Prompts to begin with. The embedded demo bases know shapes, colours and sizes alone; other bases know more.

const sdxl = (style, scale = 1) => ({ id: `demo/sdxl-${style}`, scale });
const sd15 = (style, scale = 1) => ({ id: `demo/sd15-${style}`, scale });

const STAR = "a large yellow star on a blue background";
const CIRCLE = "a large red circle on a yellow background";

const OF_BASE = {
  "demo/sdxl": [
    { label: "Star", prompt: STAR },
    { label: "Inverted", prompt: STAR, adapters: [sdxl("inverted")] },
    { label: "Stripes", prompt: STAR, adapters: [sdxl("stripes", 0.7)] },
    { label: "Two at once", prompt: STAR, adapters: [sdxl("sketch", 0.8), sdxl("sepia", 0.5)] },
  ],
  "demo/sd15": [
    { label: "Circle", prompt: CIRCLE },
    { label: "Inverted", prompt: CIRCLE, adapters: [sd15("inverted")] },
    { label: "Sketch", prompt: CIRCLE, adapters: [sd15("sketch")] },
    { label: "Two at once", prompt: CIRCLE, adapters: [sd15("sketch", 0.8), sd15("sepia", 0.5)] },
  ],
};

const OF_OTHERS = [
  { label: "Lighthouse", prompt: "a lighthouse on a cliff at dusk, long exposure photograph" },
  { label: "Fox", prompt: "a red fox asleep in fresh snow, soft morning light" },
  { label: "Street", prompt: "a rainy street at night, neon reflections, wide angle" },
  { label: "Teapot", prompt: "a glazed teapot on a linen cloth, studio photograph" },
];

export const examplesFor = (baseId) => (baseId ? (OF_BASE[baseId] ?? OF_OTHERS) : []);
