// The board to draw on, by mouse, touch, pen or keys. It knows nothing of the networks.

import { Gray } from "./picture.js";

export const SIZE = 280; // units of the board, and pixels of the ink that is read from it
const WIDTH = 24; // of a stroke: about 2.5 pixels of 28, as in MNIST
const STEP = 8; // of the cursor
const FINE = 2; // with Shift

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const EMPTY = { strokes: [], picture: null };

/**
 * Strokes on a canvas, or a picture.
 *
 * `changed` is called after each change, `announce` with text for screen readers.
 */
export class Board {
  #state = EMPTY; // never changed in place: undo restores the previous state
  #past = [];
  #pointer = null; // id of the pointer that draws
  #cursor = { x: SIZE / 2, y: SIZE / 2, down: false, shown: false };
  #pressedKeys = new Set();
  #sheet = new OffscreenCanvas(SIZE, SIZE);

  constructor(canvas, changed, announce) {
    Object.assign(this, { canvas, changed, announce });
    const listen = (type, listener) => canvas.addEventListener(type, listener);
    listen("pointerdown", (event) => this.#begin(event));
    listen("pointermove", (event) => this.#draw(event));
    for (const type of ["pointerup", "pointercancel"]) listen(type, (event) => this.#end(event));
    listen("keydown", (event) => this.#key(event));
    listen("keyup", (event) => this.#pressedKeys.delete(event.key));
    listen("blur", () => this.#leave());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paint());
    this.paint();
  }

  get empty() {
    return this.#state === EMPTY;
  }

  get undoable() {
    return this.#past.length > 0;
  }

  /** The picture passed to `show`, or null. */
  get picture() {
    return this.#state.picture;
  }

  /** The drawn ink, light on black. */
  ink() {
    const context = this.#sheet.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "black";
    context.fillRect(0, 0, SIZE, SIZE);
    strokes(context, this.#state.strokes, "white");
    const { data } = context.getImageData(0, 0, SIZE, SIZE);
    return new Gray(SIZE, SIZE, Uint8Array.from({ length: SIZE * SIZE }, (_, i) => data[4 * i]));
  }

  /** Show a picture, an object with `ink`, instead of the strokes. */
  show(picture) {
    this.#change({ strokes: [], picture });
  }

  clear() {
    this.#lift();
    if (!this.empty) this.#change(EMPTY);
  }

  undo() {
    this.#lift();
    if (!this.undoable) return;
    this.#state = this.#past.pop();
    this.#changed();
  }

  paint() {
    const context = this.canvas.getContext("2d");
    const color = getComputedStyle(this.canvas).color;
    context.setTransform(this.canvas.width / SIZE, 0, 0, this.canvas.height / SIZE, 0, 0);
    context.clearRect(0, 0, SIZE, SIZE);
    if (this.#state.picture) drawPicture(context, this.#state.picture.ink, color);
    strokes(context, this.#state.strokes, color);
    if (this.#cursor.shown) this.#drawCursor(context, color);
  }

  #change(state) {
    this.#past.push(this.#state);
    this.#state = state;
    this.#changed();
  }

  #changed() {
    this.paint();
    this.changed();
  }

  #start(point) {
    this.#change({ strokes: [...this.#state.strokes, [point]], picture: null });
  }

  // Extends the last stroke; not a separate undo step.
  #extend(points) {
    const last = [...this.#state.strokes.at(-1), ...points];
    this.#state = { strokes: [...this.#state.strokes.slice(0, -1), last], picture: null };
    this.#changed();
  }

  #at(event) {
    const { left, top, width, height } = this.canvas.getBoundingClientRect();
    return [((event.clientX - left) / width) * SIZE, ((event.clientY - top) / height) * SIZE];
  }

  #begin(event) {
    if (this.#pointer !== null || !event.isPrimary || event.button !== 0) return;
    this.#lift();
    this.#cursor.shown = false;
    this.#pointer = event.pointerId;
    this.canvas.setPointerCapture(event.pointerId);
    this.#start(this.#at(event));
  }

  #draw(event) {
    if (event.pointerId !== this.#pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    this.#extend((events.length ? events : [event]).map((one) => this.#at(one)));
  }

  #end(event) {
    if (event.pointerId === this.#pointer) this.#pointer = null;
  }

  #key(event) {
    if (event.altKey || this.#pointer !== null) return;
    const undo = (event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z";
    if ((event.ctrlKey || event.metaKey) && !undo) return;
    if (undo) this.undo();
    else if (event.key in ARROWS) this.#move(event);
    else if (event.key === " " || event.key === "Enter") event.repeat || this.#toggle();
    else if (event.key === "Delete" || event.key === "Backspace") this.clear();
    else if (event.key === "Escape" && this.#cursor.down) this.#toggle();
    else return;
    event.preventDefault();
  }

  // Arrows held together move the cursor diagonally.
  #move(event) {
    this.#pressedKeys.add(event.key);
    const step = event.shiftKey ? FINE : STEP;
    const cursor = this.#cursor;
    for (const key of this.#pressedKeys) {
      cursor.x = Math.min(Math.max(cursor.x + ARROWS[key][0] * step, 0), SIZE);
      cursor.y = Math.min(Math.max(cursor.y + ARROWS[key][1] * step, 0), SIZE);
    }
    cursor.shown = true;
    if (cursor.down) this.#extend([[cursor.x, cursor.y]]);
    else this.paint();
  }

  #toggle() {
    this.#cursor.shown = true;
    this.#cursor.down = !this.#cursor.down;
    if (this.#cursor.down) this.#start([this.#cursor.x, this.#cursor.y]);
    else this.paint();
    this.announce(this.#cursor.down ? "Pen down." : "Pen up.");
  }

  #lift() {
    this.#cursor.down = false;
  }

  #leave() {
    this.#pressedKeys.clear();
    this.#lift();
    this.#cursor.shown = false;
    this.paint();
  }

  #drawCursor(context, color) {
    const { x, y, down } = this.#cursor;
    context.lineWidth = 2;
    for (const [radius, style] of [[WIDTH / 2 + 4, color], [WIDTH / 2 + 6, "Canvas"]]) {
      context.strokeStyle = style;
      context.beginPath();
      context.arc(x, y, radius, 0, 2 * Math.PI);
      context.stroke();
    }
    context.fillStyle = color;
    context.beginPath();
    context.arc(x, y, down ? WIDTH / 2 : 3, 0, 2 * Math.PI);
    context.fill();
  }
}

function strokes(context, all, color) {
  Object.assign(context, { strokeStyle: color, fillStyle: color });
  Object.assign(context, { lineWidth: WIDTH, lineCap: "round", lineJoin: "round" });
  for (const [first, ...rest] of all) {
    context.beginPath();
    context.arc(...first, WIDTH / 2, 0, 2 * Math.PI); // canvas draws no line of zero length
    context.fill();
    context.beginPath();
    context.moveTo(...first);
    for (const point of rest) context.lineTo(...point);
    context.stroke();
  }
}

// Draw a picture's ink in the board's color, as large as fits.
function drawPicture(context, ink, color) {
  const sheet = new OffscreenCanvas(ink.width, ink.height);
  const inner = sheet.getContext("2d");
  const image = new ImageData(ink.width, ink.height);
  ink.data.forEach((v, i) => {
    image.data[4 * i + 3] = v;
  });
  inner.putImageData(image, 0, 0);
  inner.globalCompositeOperation = "source-in";
  inner.fillStyle = color;
  inner.fillRect(0, 0, ink.width, ink.height);
  const ratio = SIZE / Math.max(ink.width, ink.height);
  const [width, height] = [ink.width * ratio, ink.height * ratio];
  context.drawImage(sheet, (SIZE - width) / 2, (SIZE - height) / 2, width, height);
}
