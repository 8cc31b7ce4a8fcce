// Prepares a picture as the image processor does, to the pixel: what Pillow and NumPy compute, in the same steps. A
// picture is { width, height, channels, data } with 8 bits per channel, row by row.

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

function cubic(x) {
  const distance = Math.abs(x);
  if (distance < 1) return (1.5 * distance - 2.5) * distance * distance + 1;
  return distance < 2 ? ((-0.5 * distance + 2.5) * distance - 4) * distance + 2 : 0;
}

// By their numbers in Pillow: how far a filter reaches, and its weight at a distance. 0, the nearest pixel, has none.
const FILTERS = {
  1: { reach: 3, weigh: (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0) },
  2: { reach: 1, weigh: (x) => Math.max(1 - Math.abs(x), 0) },
  3: { reach: 2, weigh: cubic },
  4: { reach: 0.5, weigh: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  5: { reach: 1, weigh: (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0) },
};
// Pillow's weights are integers with so many bits after the point.
const ONE = 2 ** 22;
// As everywhere in HPool-ViT: how many times its short side a picture may be long.
const MAX_ASPECT_RATIO = 64;

/** For each of `after` pixels, the first of `before` pixels that it is made of, and the weights from there on. */
function findWeights(before, after, resample) {
  const scale = before / after;
  if (resample === 0) {
    return Array.from({ length: after }, (_, index) => ({ first: Math.floor((index + 0.5) * scale), weights: [ONE] }));
  }
  const { reach, weigh } = FILTERS[resample];
  const stretch = Math.max(scale, 1); // a smaller picture is smoothed, so that nothing flickers
  return Array.from({ length: after }, (_, index) => {
    const centre = (index + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - reach * stretch + 0.5), 0);
    const end = Math.min(Math.trunc(centre + reach * stretch + 0.5), before);
    const weights = Array.from({ length: end - first }, (_, step) => weigh((first + step - centre + 0.5) / stretch));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return { first, weights: weights.map((weight) => Math.trunc((weight / sum) * ONE + Math.sign(weight) * 0.5)) };
  });
}

/** Resizes lines of pixels. Pixels of a line lie `step` values apart; `starts` says where each line begins. */
function resizeLines(from, to, weightsOf, step, fromStarts, toStarts) {
  for (let line = 0; line < fromStarts.length; line++) {
    for (let index = 0; index < weightsOf.length; index++) {
      const { first, weights } = weightsOf[index];
      let sum = ONE / 2;
      let position = fromStarts[line] + first * step;
      for (let tap = 0; tap < weights.length; tap++, position += step) sum += from[position] * weights[tap];
      to[toStarts[line] + index * step] = Math.floor(sum / ONE); // the array clamps to 0 … 255
    }
  }
}

const range = (length) => Array.from({ length }, (_, index) => index);

export function resize({ width, height, channels, data }, newWidth, newHeight, resample) {
  if (newWidth !== width) {
    const to = new Uint8ClampedArray(newWidth * height * channels);
    const starts = (size) =>
      range(height * channels).map((line) => Math.floor(line / channels) * size * channels + (line % channels));
    resizeLines(data, to, findWeights(width, newWidth, resample), channels, starts(width), starts(newWidth));
    data = to;
  }
  if (newHeight !== height) {
    const line = newWidth * channels;
    const to = new Uint8ClampedArray(line * newHeight);
    resizeLines(data, to, findWeights(height, newHeight, resample), line, range(line), range(line));
    data = to;
  }
  return { width: newWidth, height: newHeight, channels, data };
}

/** The middle of a picture; what lies outside it is black. */
export function cropCentre({ width, height, channels, data }, newWidth, newHeight) {
  const left = Math.floor((width - newWidth) / 2);
  const top = Math.floor((height - newHeight) / 2);
  const to = new Uint8ClampedArray(newWidth * newHeight * channels);
  for (let row = Math.max(0, -top); row < Math.min(newHeight, height - top); row++) {
    for (let column = Math.max(0, -left); column < Math.min(newWidth, width - left); column++) {
      const source = ((row + top) * width + column + left) * channels;
      to.set(data.subarray(source, source + channels), (row * newWidth + column) * channels);
    }
  }
  return { width: newWidth, height: newHeight, channels, data: to };
}

/** A picture of 3 channels, or 1, from the RGBA of a canvas, which is opaque. */
export function fromRgba({ width, height, data }, channels) {
  const to = new Uint8ClampedArray(width * height * channels);
  for (let pixel = 0, from = 0; pixel < width * height; pixel++, from += 4) {
    if (channels === 1) {
      to[pixel] = (19595 * data[from] + 38470 * data[from + 1] + 7471 * data[from + 2] + 32768) >> 16;
      continue;
    }
    for (let channel = 0; channel < 3; channel++) to[3 * pixel + channel] = data[from + channel];
  }
  return { width, height, channels, data: to };
}

/** The picture as the model sees it: resized and cropped. `config` is the content of preprocessor_config.json. */
export function frame(picture, config) {
  const { width, height } = picture;
  const [short, long] = [Math.min(width, height), Math.max(width, height)];
  if (short <= 1) throw new Error(`the picture is too small: ${width} × ${height} pixels`);
  if (long > MAX_ASPECT_RATIO * short) throw new Error(`the picture is too long: ${width} × ${height} pixels`);
  if (config.do_resize) {
    const edge = config.size.shortest_edge;
    const sides = edge ? [width, height].map((side) => Math.trunc((edge * side) / short)) : null;
    picture = resize(picture, ...(sides ?? [config.size.width, config.size.height]), config.resample);
  }
  return config.do_center_crop ? cropCentre(picture, config.crop_size.width, config.crop_size.height) : picture;
}

/** The numbers that the model takes, of shape (channels, height, width). */
export function normalise({ width, height, channels, data }, config) {
  const values = new Float32Array(data.length);
  const round = Math.fround; // as NumPy and PyTorch, which compute in 32 bits
  for (let channel = 0; channel < channels; channel++) {
    const [mean, deviation] = [config.image_mean, config.image_std].map((list) => round(list?.[channel]));
    for (let pixel = 0; pixel < width * height; pixel++) {
      let value = data[pixel * channels + channel];
      if (config.do_rescale) value = round(value * round(config.rescale_factor));
      if (config.do_normalize) value = round(round(value - mean) / deviation);
      values[channel * width * height + pixel] = value;
    }
  }
  return values;
}
