// Shows what the networks answer: a card each, and a table of ten digits with a bar a network.

const DIGITS = Array.from({ length: 10 }, (_, digit) => digit);
const TITLES = { "mnist-bn": "With batch norm", "mnist-plain": "Without batch norm" };

/** Return what a model is called on the page. */
export function title(name) {
  return TITLES[name] ?? name;
}

/** Return probabilities for logits. */
export function softmax(logits) {
  const most = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - most));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
}

/** Return a probability as people read it; never 0 % or 100 %, which no network says. */
export function percent(probability) {
  if (probability < 0.001) return "<\u00a00.1\u00a0%";
  if (probability > 0.999) return ">\u00a099.9\u00a0%";
  return `${(100 * probability).toFixed(1)}\u00a0%`;
}

/** Return the digits, the likeliest first. */
export function ranked(probabilities) {
  return DIGITS.toSorted((one, other) => probabilities[other] - probabilities[one]);
}

function element(tag, className = "", text = "") {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}

/** One network's card and its column of the table. */
export class Column {
  constructor(name, cards, table) {
    this.name = name;
    this.card = element("article", "network");
    this.digit = element("p", "digit");
    this.sure = element("p", "sure quiet");
    this.facts = element("p", "facts quiet");
    this.card.append(element("h3", "", title(name)), this.digit, this.sure, this.facts);
    cards.append(this.card);
    const head = element("th", "", title(name));
    head.scope = "col";
    table.tHead.rows[0].append(head);
    this.cells = [...table.tBodies[0].rows].map((row) => {
      const [cell, box] = [row.insertCell(), element("div", "cell")];
      const [track, fill, number] = [element("div", "track"), element("div", "fill"), element("span")];
      track.append(fill);
      box.append(track, number);
      cell.append(box);
      return { box, fill, number };
    });
    this.clear();
  }

  /** Show a model's version and standing, and how long its last answer took, in ms. */
  describe({ version, sha256, verified }, latency) {
    const standing = element("span", verified ? "verified" : "unverified", verified ? "verified" : "UNVERIFIED");
    this.facts.title = sha256 ? `SHA-256 ${sha256}` : "";
    this.facts.replaceChildren(`${this.name}, version ${version}, `, standing);
    if (latency !== undefined) this.facts.append(`, ${latency.toFixed(latency < 10 ? 1 : 0)}\u00a0ms`);
  }

  /** Show probabilities. */
  show(probabilities) {
    const [first, second] = ranked(probabilities);
    this.digit.textContent = String(first);
    this.sure.textContent = `${percent(probabilities[first])}, then ${second}:\u00a0${percent(probabilities[second])}`;
    this.cells.forEach(({ box, fill, number }, digit) => {
      box.classList.toggle("first", digit === first);
      fill.style.width = `${100 * probabilities[digit]}%`;
      number.textContent = percent(probabilities[digit]);
    });
    this.fade(false);
  }

  /** Show no answer. */
  clear() {
    this.digit.textContent = "–";
    this.sure.textContent = "";
    for (const { box, fill, number } of this.cells) {
      box.classList.remove("first");
      fill.style.width = "0";
      number.textContent = "–";
    }
    this.fade(false);
  }

  /** Show that the answer is to something older than what is drawn. */
  fade(stale) {
    this.card.classList.toggle("stale", stale);
    for (const { box } of this.cells) box.classList.toggle("stale", stale);
  }
}

/** Make the table's rows. */
export function addRows(table) {
  for (const digit of DIGITS) {
    const head = element("th", "", String(digit));
    head.scope = "row";
    table.tBodies[0].insertRow().append(head);
  }
}
