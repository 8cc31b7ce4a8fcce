// Runs the model beside the page, which stays responsive. Takes { number, file }, and answers with { number, … }: first
// what the model says, then how long it takes.

import * as ort from "./runtime/ort.wasm.bundle.min.mjs";
import { frame, fromRgba, normalise } from "./preprocessing.js";

const TIMED_RUNS = 5;
const read = async (name) => (await fetch(new URL(name, import.meta.url))).json();

ort.env.logLevel = "error";
// Threads share memory, which browsers allow only to pages that are served with certain headers.
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

const loaded = Promise.all([
  ort.InferenceSession.create(new URL("model.onnx", import.meta.url).href, {
    executionProviders: ["wasm"],
    logSeverityLevel: 3,
  }),
  read("preprocessor_config.json"),
  read("tokens.json"),
]);

/** Decodes a picture: upright, on white, and with the colours that are in the file. */
async function decode(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", imageOrientation: "from-image" });
  } catch {
    throw new Error("this browser cannot read it as a picture");
  }
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

const median = (values) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)];
let latest = 0;

async function answer(number, file) {
  const [session, config, { channels }] = await loaded;
  const picture = frame(fromRgba(await decode(file), channels), config);
  const shape = [1, channels, picture.height, picture.width];
  const inputs = { pixel_values: new ort.Tensor("float32", normalise(picture, config), shape) };
  const { logits, groups } = await session.run(inputs);
  if (!logits.data.every(Number.isFinite)) throw new Error("the model's answer is not a number");
  postMessage({ number, picture, logits: logits.data, groups: groups && { data: groups.data, dims: groups.dims } });
  const times = [];
  for (let run = 0; run < TIMED_RUNS; run++) {
    await new Promise((resolve) => setTimeout(resolve)); // lets a new picture in
    if (number !== latest) return;
    const start = performance.now();
    await session.run(inputs);
    times.push(performance.now() - start);
  }
  postMessage({ number, milliseconds: median(times), runs: TIMED_RUNS, threads: ort.env.wasm.numThreads });
}

onmessage = async ({ data: { number, file } }) => {
  latest = number;
  try {
    await answer(number, file);
  } catch (error) {
    postMessage({ number, error: error.message });
  }
};

loaded.then(
  () => postMessage({ ready: true }),
  (error) => postMessage({ failed: error.message }),
);
