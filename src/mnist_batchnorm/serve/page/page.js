// The page: converts a drawing or a picture (picture.js), sends it to the networks (client.js) and
// shows the answers (answers.js). Nothing is stored, and only 784 pixels leave the browser.

import { addRows, Column, percent, ranked, softmax, title } from "./answers.js";
import { Board } from "./board.js";
import { Client, LatestRequest, ServerError } from "./client.js";
import { decode, fit, normalize, PictureError, SIDE } from "./picture.js";

const PREFERRED = ["mnist-bn", "mnist-plain"];
const ANNOUNCE_DELAY_MS = 700; // without a change, until the answer is read out

const $ = (id) => document.getElementById(id);
const client = new Client();
const board = new Board($("board"), changed, announce);
const networks = new Map(); // name -> { column, request, model, answer }
const problems = new Map(); // source -> message

let image = null; // { number, pixels }: the networks' input
let images = 0;
let choices = 0; // number of chosen files; only the newest is shown
let frame = 0; // requested animation frame
let [retryTimer, announceTimer] = [0, 0];

// --- the networks' input ------------------------------------------------------------------------

function changed() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    update();
  });
}

function update() {
  $("hint").hidden = !board.empty;
  $("clear").disabled = board.empty;
  $("undo").disabled = !board.undoable;
  report("picture", "");
  clearTimeout(announceTimer);
  const digit = board.picture ?? drawn();
  showSeen(digit);
  image = digit && { number: ++images, pixels: digit.pixels };
  if (image) infer();
  else clearAnswers();
}

function drawn() {
  if (board.empty) return null;
  const ink = board.ink();
  return ink.data.some((v) => v === 255) ? fit(ink) : null; // else a stroke beyond the edge
}

function showSeen(digit) {
  const shown = new ImageData(SIDE, SIDE);
  digit?.pixels.forEach((v, i) => shown.data.set([v, v, v, 255], 4 * i));
  $("sees").getContext("2d").putImageData(shown, 0, 0);
  $("sees").ariaLabel = digit ? "The image that the networks see" : "Nothing yet";
  const done = digit?.done.join(", ") || "sent as it is";
  $("done").textContent = digit ? `${done[0].toUpperCase()}${done.slice(1)}.` : "Nothing yet.";
}

async function choose(file) {
  const choice = ++choices;
  try {
    const { gray, done } = await decode(file);
    if (choice !== choices) return;
    const digit = normalize(gray);
    board.show({ ...digit, done: [...done, ...digit.done] });
  } catch (error) {
    if (!(error instanceof PictureError)) throw error;
    if (choice === choices) report("picture", error.message);
  }
}

// --- answers ------------------------------------------------------------------------------------

function infer() {
  if (image) for (const { request } of networks.values()) request.put(image);
}

function clearAnswers() {
  for (const network of networks.values()) {
    network.request.drop();
    network.answer = null;
    network.column.clear();
  }
  $("verdict").textContent = "\u00a0";
}

function answered(network, sent, { logits, version, latency }) {
  report(network.name, "");
  if (!image || networks.get(network.name) !== network) return;
  const probabilities = softmax(logits);
  network.answer = { number: sent.number, probabilities };
  network.column.show(probabilities);
  network.column.describe(network.model, latency);
  if (version && version !== network.version) {
    network.version = version; // the server has swapped the model
    describe(network).catch((error) => failed(network.name, error));
  }
  const all = [...networks.values()];
  if (all.some(({ answer }) => answer?.number !== image.number)) return;
  const tops = all.map(({ answer }) => ranked(answer.probabilities)[0]);
  const agree = tops.every((top) => top === tops[0]);
  const verdict = !agree
    ? `They disagree: ${tops.join(" or ")}.`
    : `${all.length > 1 ? "Both see" : "It sees"} a ${tops[0]}.`;
  $("verdict").textContent = verdict;
  clearTimeout(announceTimer);
  announceTimer = setTimeout(() => announce(spoken(all, verdict)), ANNOUNCE_DELAY_MS);
}

function spoken(all, verdict) {
  const parts = all.map(({ name, answer: { probabilities } }) => {
    const [first, second] = ranked(probabilities);
    return (
      `${title(name)}: ${first}, ${percent(probabilities[first])}, ` +
      `then ${second}, ${percent(probabilities[second])}.`
    );
  });
  return [verdict, ...parts].join(" ");
}

function failed(source, error) {
  if (!(error instanceof ServerError)) throw error;
  networks.get(source)?.column.fade(true);
  if (error.kind === "token") {
    $("metrics").hidden = true;
    $("token").hidden = false;
    report(source, client.token ? `The server does not take this token: ${error.message}.` : "");
    return;
  }
  report(source, error.retryAfter ? `${error.message} Trying again …` : error.message);
  if (!error.retryAfter) return;
  clearTimeout(retryTimer);
  retryTimer = setTimeout(error.kind === "busy" && networks.size ? infer : load, 1000 * error.retryAfter);
}

// --- the server's networks ----------------------------------------------------------------------

async function load() {
  try {
    const names = await client.names();
    const wanted = PREFERRED.filter((name) => names.includes(name));
    set(wanted.length ? wanted : names.slice(0, 2));
    await Promise.all([...networks.values()].map(describe));
  } catch (error) {
    failed("server", error);
    return;
  }
  $("token").hidden = true;
  $("metrics").hidden = Boolean(client.token); // which a link cannot show
  for (const source of [...problems.keys()]) if (source !== "picture") problems.delete(source);
  report("server", networks.size ? "" : "The server has no model loaded.");
  $("alone").hidden = networks.size !== 1;
  $("alone").textContent = `This server has one of them: ${[...networks.keys()]}.`;
  infer();
}

function set(names) {
  if (names.join() === [...networks.keys()].join()) return;
  for (const name of networks.keys()) problems.delete(name);
  networks.clear();
  $("networks").replaceChildren();
  for (const row of $("table").rows) while (row.cells.length > 1) row.deleteCell(-1);
  for (const name of names) {
    const network = { name, answer: null, column: new Column(name, $("networks"), $("table")) };
    network.request = new LatestRequest(
      ({ pixels }) => client.infer(name, pixels),
      (sent, answer) => answered(network, sent, answer),
      (error) => failed(name, error),
    );
    networks.set(name, network);
  }
}

async function describe(network) {
  network.model = await client.metadata(network.name);
  network.version = network.model.version;
  network.column.describe(network.model);
  const doubtful = [...networks.values()].filter(({ model }) => model && !model.verified);
  $("banner").hidden = doubtful.length === 0;
  const reasons = doubtful.map(({ name, model }) => `${name}: ${model.because}`);
  $("banner").textContent =
    `UNVERIFIED. What is served may not compute what was trained. ${reasons.join("; ")}`;
}

// --- messages -----------------------------------------------------------------------------------

function report(source, message) {
  if (message) problems.set(source, message);
  else problems.delete(source);
  const text = [...new Set(problems.values())].join(" ");
  if ($("trouble").textContent !== text) $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

function announce(text) {
  $("said").textContent = text;
}

// --- events -------------------------------------------------------------------------------------

$("clear").addEventListener("click", () => board.clear());
$("undo").addEventListener("click", () => board.undo());

$("file").addEventListener("change", ({ target }) => {
  if (target.files.length) choose(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
});

document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files][0];
  if (!file) return;
  event.preventDefault();
  choose(file);
});

document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});

document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping"); // left the window
});

document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (!file) return;
  event.preventDefault();
  choose(file);
});

$("token").addEventListener("submit", (event) => {
  event.preventDefault();
  client.token = $("secret").value.trim();
  $("secret").value = "";
  load();
});

addRows($("table"));
load();
