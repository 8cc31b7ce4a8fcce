// Draws on canvases: the picture with its patches, and the tokens in the colours of their patches.

const WIDTH = 672; // pixels of a canvas, or a little more

/** The patches of each token, from the token of each patch after a stage. */
export function patchesOfGroups({ data, dims }, stage, numTokens) {
  const numPatches = dims[2];
  const patches = Array.from({ length: numTokens }, () => []);
  for (let patch = 0; patch < numPatches; patch++) patches[data[stage * numPatches + patch]].push(patch);
  return patches;
}

/** The mean colour [red, green, blue] of each patch. Pixels at the edges that fill no patch do not count. */
export function meanColours({ width, height, channels, data }, [rows, columns]) {
  const [patchWidth, patchHeight] = [Math.floor(width / columns), Math.floor(height / rows)];
  return Array.from({ length: rows * columns }, (_, patch) => {
    const [top, left] = [Math.floor(patch / columns) * patchHeight, (patch % columns) * patchWidth];
    const sums = [0, 0, 0];
    for (let row = top; row < top + patchHeight; row++) {
      for (let column = left; column < left + patchWidth; column++) {
        for (let channel = 0; channel < 3; channel++) {
          sums[channel] += data[(row * width + column) * channels + (channel % channels)];
        }
      }
    }
    return sums.map((sum) => sum / (patchWidth * patchHeight));
  });
}

/**
 * Which token is drawn where: rows of cells, as many to a patch as tokens share it at most. Each of these tokens takes
 * one of its cells, and the others are filled up. -1: no token.
 */
export function cellsOf(patches, [rows, columns]) {
  const tokensOf = Array.from({ length: rows * columns }, () => []);
  patches.forEach((own, token) => own.forEach((patch) => tokensOf[patch].push(token)));
  const lanes = Math.max(1, ...tokensOf.map((tokens) => tokens.length));
  const cell = (tokens, lane) => {
    const distances = tokens.map((token) => (((lane - token) % lanes) + lanes) % lanes);
    return tokens.length ? tokens[distances.indexOf(Math.min(...distances))] : -1;
  };
  return Array.from({ length: rows * lanes }, (_, line) =>
    tokensOf.slice(Math.floor(line / lanes) * columns).slice(0, columns).map((tokens) => cell(tokens, line % lanes)),
  );
}

function prepare(canvas, width, height) {
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.strokeStyle = "white";
  return context;
}

export function drawCells(canvas, cells, patches, colours, { width, height }) {
  const columns = cells[0].length;
  const [across, down] = [WIDTH / columns, (WIDTH * height) / width / cells.length];
  const context = prepare(canvas, WIDTH, Math.round(down * cells.length));
  const colourOf = (token) => {
    const means = [0, 1, 2].map((channel) => patches[token].reduce((sum, patch) => sum + colours[patch][channel], 0));
    return `rgb(${means.map((sum) => Math.round(sum / patches[token].length))})`;
  };
  context.lineWidth = Math.min(2, across / 6, down / 3);
  cells.forEach((line, row) =>
    line.forEach((token, column) => {
      context.fillStyle = token < 0 ? "#1f1f1f" : colourOf(token);
      context.fillRect(column * across, row * down, across + 1, down + 1);
    }),
  );
  context.beginPath();
  cells.forEach((line, row) =>
    line.forEach((token, column) => {
      const [x, y] = [column * across, row * down];
      if (column && line[column - 1] !== token) context.moveTo(x, y), context.lineTo(x, y + down);
      if (row && cells[row - 1][column] !== token) context.moveTo(x, y), context.lineTo(x + across, y);
    }),
  );
  context.stroke();
}

export function drawPicture(canvas, { width, height, channels, data }, [rows, columns]) {
  const image = new ImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let channel = 0; channel < 4; channel++) {
      image.data[4 * pixel + channel] = channel === 3 ? 255 : data[pixel * channels + (channel % channels)];
    }
  }
  const own = new OffscreenCanvas(width, height);
  own.getContext("2d").putImageData(image, 0, 0);
  const context = prepare(canvas, WIDTH, Math.round((WIDTH * height) / width));
  context.imageSmoothingEnabled = width > WIDTH / 4; // the pixels of a tiny picture stay visible
  context.drawImage(own, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 0.4;
  context.beginPath();
  for (let row = 1; row < rows; row++) {
    context.moveTo(0, (row * canvas.height) / rows);
    context.lineTo(canvas.width, (row * canvas.height) / rows);
  }
  for (let column = 1; column < columns; column++) {
    context.moveTo((column * canvas.width) / columns, 0);
    context.lineTo((column * canvas.width) / columns, canvas.height);
  }
  context.stroke();
}
