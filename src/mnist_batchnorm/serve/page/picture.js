// Converts pictures of digits to the format of MNIST's images (LeCun, Cortes and Burges,
// http://yann.lecun.com/exdb/mnist/).
//
// The same algorithm, to the pixel, as client/normalize.py, which explains the constants: change
// both. It runs here too because the page shows the network's input while a person draws, and
// sends no picture to the server, only 784 pixels.

export const SIDE = 28;
const BOX = 20;
const CENTER = 14;
const MAX_BYTES = 32 * 2 ** 20;
const MAX_PIXELS = 50_000_000;
const WORKING_SIDE = 512;
const CONTRAST = 32;
const PAPER = 0.95;
const FULL_INK = 0.9;
const EDGE = 96;
const OPAQUE = 128;
const MAX_DARK_SHARE = 0.01;

const ROWS = 256; // read at once: some browsers refuse a canvas as large as a photograph

/** An error that the user can correct; the message says how. */
export class PictureError extends Error {}

/** Gray pixels: 0 to 255, row by row. */
export class Gray {
  constructor(width, height, data = new Uint8Array(width * height)) {
    Object.assign(this, { width, height, data });
  }
}

/** Read a picture file; return its gray pixels and the steps of the conversion. */
export async function decode(file) {
  if (file.size > MAX_BYTES) {
    throw new PictureError(`The file is larger than ${MAX_BYTES / 2 ** 20} MiB. Make the picture smaller.`);
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new PictureError("This is not a picture, or it is damaged. Save it as PNG or JPEG.");
  }
  try {
    return toGray(bitmap);
  } finally {
    bitmap.close();
  }
}

function toGray(bitmap) {
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) {
    throw new PictureError(
      `The picture has ${width} × ${height} pixels, more than ${MAX_PIXELS.toLocaleString("en")} in all. ` +
        "Make it smaller.",
    );
  }
  const gray = new Gray(width, height);
  const alpha = new Uint8Array(width * height);
  const colored = luma(bitmap, gray.data, alpha);
  const done = colored ? ["turned grey"] : [];
  if (alpha.some((a) => a !== 255)) {
    const paper = background(gray.data, alpha);
    gray.data.forEach((v, i) => {
      gray.data[i] = Math.round((v * alpha[i] + paper * (255 - alpha[i])) / 255);
    });
    done.push(`laid on ${paper ? "white" : "black"}`);
  }
  return { gray, done };
}

// ITU-R 601-2 luma in the integers that Pillow computes it with. Returns whether there is color.
function luma(bitmap, gray, alpha) {
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, Math.min(ROWS, height));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let colored = false;
  for (let top = 0; top < height; top += ROWS) {
    const rows = Math.min(ROWS, height - top);
    context.clearRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, top, width, rows, 0, 0, width, rows);
    const { data } = context.getImageData(0, 0, width, rows);
    for (let i = 0, at = top * width; i < data.length; i += 4, at += 1) {
      const red = data[i];
      const green = data[i + 1];
      const blue = data[i + 2];
      colored ||= red !== green || green !== blue;
      gray[at] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
      alpha[at] = data[i + 3];
    }
  }
  return colored;
}

function background(gray, alpha) {
  let [seen, dark] = [0, 0];
  gray.forEach((v, i) => {
    seen += alpha[i] >= OPAQUE;
    dark += alpha[i] >= OPAQUE && v < 128;
  });
  return dark <= MAX_DARK_SHARE * seen ? 0 : 255;
}

/** Convert a gray picture to MNIST's format; return the 784 pixels, the ink and the steps. */
export function normalize(gray) {
  if (isNormal(gray)) return { pixels: gray.data, ink: gray, done: [] };
  const longer = Math.max(gray.width, gray.height);
  const working = longer > WORKING_SIDE ? scale(gray, WORKING_SIDE, boxFilter) : gray;
  const { ink, inverted } = toInk(working);
  const digit = fit(ink, longer > WORKING_SIDE);
  return { ...digit, ink, done: [...(inverted ? ["inverted"] : []), ...digit.done] };
}

/** Convert ink, light on black, to MNIST's format. */
export function fit(ink, scaled = false) {
  const box = boundingBox(ink, EDGE);
  if (!box) throw new PictureError("There is nothing to see yet.");
  const cropped = crop(ink, box);
  const fitted = scale(cropped, BOX, triangleFilter);
  const done = [];
  if (cropped.width !== ink.width || cropped.height !== ink.height) done.push("cropped");
  if (scaled || fitted.width !== cropped.width || fitted.height !== cropped.height) {
    done.push(`scaled to ${fitted.width} × ${fitted.height}`);
  }
  return { pixels: centered(fitted), done: [...done, "centred"] };
}

function isNormal(gray) {
  if (gray.width !== SIDE || gray.height !== SIDE) return false;
  const box = boundingBox(gray, 1);
  if (!box || level(border(gray), 0.5) !== 0) return false;
  const longer = Math.max(box.right - box.left, box.bottom - box.top);
  return (
    longer >= BOX - 2 && longer <= BOX && centerOfMass(gray).every((pixel) => Math.abs(pixel - CENTER) <= 1)
  );
}

function toInk(gray) {
  const counts = histogram(gray.data);
  const edge = border(gray);
  let paper = level(edge, 0.5);
  const darkest = counts.findIndex((count) => count > 0);
  let lightest = counts.findLastIndex((count) => count > 0);
  const inverted = paper - darkest > lightest - paper;
  if (inverted) {
    counts.reverse();
    edge.reverse();
    paper = level(edge, 0.5);
    lightest = 255 - darkest;
  }
  const middle = Math.floor((paper + lightest) / 2);
  const low = Math.min(level(edge, PAPER), middle);
  const high = level(counts.map((count, v) => (v > middle ? count : 0)), FULL_INK);
  const span = high - low;
  if (span < CONTRAST) {
    throw new PictureError("Nothing stands out from the picture's background. A digit should.");
  }
  const levels = counts.map((_, v) =>
    Math.min(255, Math.max(0, Math.floor((510 * (v - low) + span) / (2 * span)))),
  );
  const data = gray.data.map((v) => levels[inverted ? 255 - v : v]);
  return { ink: new Gray(gray.width, gray.height, data), inverted };
}

function histogram(data) {
  const counts = new Array(256).fill(0);
  for (const v of data) counts[v] += 1;
  return counts;
}

// Of the outermost rows and columns, corners counted twice.
function border({ width, height, data }) {
  const counts = new Array(256).fill(0);
  for (let x = 0; x < width; x += 1) {
    counts[data[x]] += 1;
    counts[data[(height - 1) * width + x]] += 1;
  }
  for (let y = 0; y < height; y += 1) {
    counts[data[y * width]] += 1;
    counts[data[y * width + width - 1]] += 1;
  }
  return counts;
}

// The lowest level with at least this share of the pixels at or below it.
function level(counts, quantile) {
  const wanted = quantile * counts.reduce((sum, count) => sum + count, 0);
  let below = 0;
  return counts.findIndex((count) => (below += count) >= wanted);
}

function boundingBox({ width, height, data }, least) {
  let [left, top, right, bottom] = [width, height, 0, 0];
  for (let y = 0, at = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, at += 1) {
      if (data[at] < least) continue;
      left = Math.min(left, x);
      right = Math.max(right, x + 1);
      top = Math.min(top, y);
      bottom = y + 1;
    }
  }
  return right ? { left, top, right, bottom } : null;
}

function crop(gray, { left, top, right, bottom }) {
  const cropped = new Gray(right - left, bottom - top);
  for (let y = top; y < bottom; y += 1) {
    const row = gray.data.subarray(y * gray.width + left, y * gray.width + right);
    cropped.data.set(row, (y - top) * cropped.width);
  }
  return cropped;
}

const boxFilter = { support: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) };
const triangleFilter = { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) };

// Scale the longer side to `longer` pixels; halves are rounded up.
function scale(gray, longer, filter) {
  const now = Math.max(gray.width, gray.height);
  const [width, height] = [gray.width, gray.height].map((side) =>
    Math.max(1, Math.floor((2 * side * longer + now) / (2 * now))),
  );
  const narrow = width === gray.width ? gray : transpose(scaleColumns(transpose(gray), width, filter));
  return height === narrow.height ? narrow : scaleColumns(narrow, height, filter);
}

// Every new row is a weighted mean of old ones, in the fixed point of Pillow's resize: weights in
// units of 2^-22, each pass rounded to whole levels.
function scaleColumns({ width, height, data }, rows, filter) {
  const ONE = 2 ** 22;
  const scaled = new Gray(width, rows);
  const ratio = height / rows;
  const stretch = Math.max(ratio, 1); // a filter shrinks the picture, and never sharpens it
  const reach = filter.support * stretch;
  const sums = new Float64Array(width);
  for (let row = 0; row < rows; row += 1) {
    const center = (row + 0.5) * ratio;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const end = Math.min(height, Math.trunc(center + reach + 0.5));
    const weights = [];
    for (let y = first; y < end; y += 1) weights.push(filter.weight((y - center + 0.5) * (1 / stretch)));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    sums.fill(ONE / 2);
    weights.forEach((weight, i) => {
      const whole = Math.trunc(0.5 + (weight / total) * ONE);
      const at = (first + i) * width;
      for (let x = 0; x < width; x += 1) sums[x] += whole * data[at + x];
    });
    for (let x = 0; x < width; x += 1) {
      scaled.data[row * width + x] = Math.min(255, Math.floor(sums[x] / ONE));
    }
  }
  return scaled;
}

function transpose({ width, height, data }) {
  const turned = new Gray(height, width);
  for (let y = 0, at = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, at += 1) turned.data[x * height + y] = data[at];
  }
  return turned;
}

// Row and column of the center of mass, to the nearest pixel, halves up.
function centerOfMass({ width, data }) {
  let [total, rows, columns] = [0, 0, 0];
  data.forEach((v, i) => {
    total += v;
    rows += v * Math.floor(i / width);
    columns += v * (i % width);
  });
  return [rows, columns].map((moment) => Math.floor((2 * moment + total) / (2 * total)));
}

function centered(ink) {
  const pixels = new Uint8Array(SIDE * SIDE);
  const [row, column] = centerOfMass(ink);
  const top = Math.min(Math.max(CENTER - row, 0), SIDE - ink.height);
  const left = Math.min(Math.max(CENTER - column, 0), SIDE - ink.width);
  for (let y = 0; y < ink.height; y += 1) {
    pixels.set(ink.data.subarray(y * ink.width, (y + 1) * ink.width), (top + y) * SIDE + left);
  }
  return pixels;
}
