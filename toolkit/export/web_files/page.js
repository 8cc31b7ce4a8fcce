// The page: takes a picture, lets the worker answer, and shows the answer.

import { cellsOf, drawCells, drawPicture, meanColours, patchesOfGroups } from "./drawing.js";

const TOP = 5;
const $ = (id) => document.getElementById(id);
const read = async (name) => (await fetch(new URL(name, import.meta.url))).json();
const [labels, tokens, example] = await Promise.all([
  read("labels.json"),
  read("tokens.json"),
  fetch(new URL("example.png", import.meta.url)).then((response) => response.blob()),
]);
const [rows, columns] = tokens.grid;
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
let asked = 0;
let ready = false;

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function ask(file) {
  asked += 1;
  $("time").textContent = "–";
  $("runs").textContent = "";
  say(ready ? "Working …" : "Loading the model …");
  worker.postMessage({ number: asked, file });
}

function element(name, text, parent) {
  const made = parent.appendChild(document.createElement(name));
  made.textContent = text;
  return made;
}

function showClasses(logits) {
  const largest = Math.max(...logits);
  const exponentials = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = exponentials.reduce((total, value) => total + value, 0);
  const ranked = exponentials.map((value, index) => [value / sum, labels[index]]).toSorted(([a], [b]) => b - a);
  $("classes").replaceChildren();
  for (const [probability, label] of ranked.slice(0, TOP)) {
    const item = element("li", "", $("classes"));
    item.dataset.probability = probability;
    element("span", label, item);
    element("span", `${(100 * probability).toFixed(1)}%`, item);
    const bar = element("div", "", item);
    bar.className = "bar";
    bar.ariaHidden = "true";
    element("div", "", bar).style.width = `${100 * probability}%`;
  }
}

/** For each stage, the patches of each token: found while the model merges, or those of its windows. */
function patchesOfStages(groups) {
  return tokens.stages.map((stage, index) => stage.windows ?? patchesOfGroups(groups, index, stage.tokens));
}

function showStages(picture, groups) {
  const colours = meanColours(picture, tokens.grid);
  $("figures").replaceChildren();
  $("stages").hidden = tokens.stages.length === 0;
  patchesOfStages(groups).forEach((patches, index) => {
    const { block, tokens: count } = tokens.stages[index];
    const most = Math.max(...patches.map((own) => own.length));
    const figure = element("figure", "", $("figures"));
    const canvas = element("canvas", "", figure);
    canvas.role = "img";
    canvas.ariaLabel = `The ${rows} × ${columns} patches in the colours of ${count} tokens`;
    canvas.dataset.tokens = count;
    drawCells(canvas, cellsOf(patches, tokens.grid), patches, colours, picture);
    element("figcaption", `Block ${block}: ${count} tokens, up to ${most} patches each`, figure);
  });
}

function show({ picture, logits, groups }) {
  showClasses(logits);
  $("seen").hidden = false;
  const canvas = $("seen").querySelector("canvas");
  canvas.ariaLabel = `The picture at ${picture.width} × ${picture.height} pixels`;
  drawPicture(canvas, picture, tokens.grid);
  showStages(picture, groups);
  say("");
}

worker.onmessage = ({ data }) => {
  if (data.failed) return say(`The model cannot be loaded: ${data.failed}`, true);
  if (data.ready) {
    ready = true;
    return;
  }
  if (data.number !== asked) return; // there is a newer picture
  if (data.error) say(`No answer: ${data.error}.`, true);
  else if (data.logits) show(data);
  else {
    $("time").textContent = `${data.milliseconds.toPrecision(3)} ms`;
    $("runs").textContent = `median of ${data.runs} runs, ${data.threads} thread${data.threads > 1 ? "s" : ""}`;
  }
};
worker.onerror = (event) => say(`The model cannot be loaded: ${event.message || "worker.js is missing"}`, true);

$("file").addEventListener("change", ({ target }) => {
  if (target.files.length) ask(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
});
$("example").addEventListener("click", () => ask(example));
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault(); // or the browser would open the file
    $("drop").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) ask(event.dataTransfer.files[0]);
  });
}

$("seen").querySelector("figcaption").textContent = `What the model sees, in ${rows} × ${columns} patches`;
$("tokens").textContent = [rows * columns, ...tokens.stages.map((stage) => stage.tokens)].join(" → ");
$("explanation").textContent = tokens.merges
  ? "Tokens that are alike merge. A token has the mean colour of the patches that merged into it."
  : "A token stands for the patches in its window, and has their mean colour. A patch in several windows is split among them.";
ask(example);
