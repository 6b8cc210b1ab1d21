// The server's side of the page: the Open Inference Protocol, one request a model at a time.

const PATIENCE = 10_000; // ms for one answer

/**
 * A request that came to nothing.
 *
 * `kind` is "away" (no answer), "token" (the server wants one), "busy" or "refused"; `wait` is how
 * many seconds to let pass before the next try, 0 where another try is no use.
 */
export class ServerError extends Error {
  constructor(kind, message, wait = 0) {
    super(message);
    Object.assign(this, { kind, wait });
  }
}

/** Talks to the server that the page came from; the token stays in memory. */
export class Client {
  token = "";

  /** Return the names of the models that answer. */
  async names() {
    const index = await this.#json("v2/repository/index", {});
    if (!Array.isArray(index)) throw new ServerError("refused", "The server does not say what it serves.");
    const ready = index.filter(({ state }) => state === undefined || state === "READY");
    return [...new Set(ready.map(({ name }) => name))];
  }

  /** Return a model's metadata: its version and whether the gate has passed it. */
  async metadata(name) {
    const { parameters = {}, versions = [] } = await this.#json(`v2/models/${encodeURIComponent(name)}`);
    return {
      version: String(parameters.version ?? versions.at(-1) ?? "not stated"),
      sha256: parameters.sha256 ?? "",
      // whatever does not say so is not
      verified: parameters.verified === true || parameters.verified === "true",
      because: parameters.unverified_because ?? "the server does not say that it is verified",
    };
  }

  /** Return the ten logits of an image of 784 pixels, the version that gave them, and the time in ms. */
  async infer(name, pixels) {
    const input = { name: "image", shape: [1, 28, 28], datatype: "UINT8", data: Array.from(pixels) };
    const started = performance.now();
    const answer = await this.#json(`v2/models/${encodeURIComponent(name)}/infer`, { inputs: [input] });
    const latency = performance.now() - started;
    const logits = answer.outputs?.find((output) => output.name === "logits")?.data?.flat();
    if (logits?.length !== 10 || !logits.every(Number.isFinite)) {
      throw new ServerError("refused", `${name} gave no logits for ten digits.`);
    }
    return { logits, version: String(answer.model_version ?? ""), latency };
  }

  // GET, or POST where there is a body.
  async #json(path, body) {
    const headers = this.token ? { Authorization: `Bearer ${this.token}` } : {};
    const options = { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE) };
    if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    let response, text;
    try {
      response = await fetch(path, options);
      text = await response.text();
    } catch {
      throw new ServerError("away", "The server does not answer.", 2);
    }
    if (!response.ok) throw refusal(response, text);
    try {
      return JSON.parse(text);
    } catch {
      throw new ServerError("refused", "The server's answer is not JSON.");
    }
  }
}

function refusal(response, text) {
  const said = reason(text) || `status ${response.status}`;
  if (response.status === 401) return new ServerError("token", said);
  if (response.status === 503 || response.status === 429) {
    const wait = Math.min(Math.max(Number(response.headers.get("Retry-After")) || 1, 1), 10);
    return new ServerError("busy", `The server is busy: ${said}.`, wait);
  }
  // not there (any more): a model may have been taken away, or put back
  return new ServerError("refused", `The server refuses: ${said}.`, response.status === 404 ? 5 : 0);
}

function reason(text) {
  try {
    return String(JSON.parse(text).error ?? "").replace(/\.$/, "");
  } catch {
    return "";
  }
}

/** Asks one model, one question at a time; of those that wait only the newest is asked. */
export class Asker {
  #waiting = null;
  #busy = false;

  constructor(ask, answered, failed) {
    Object.assign(this, { ask, answered, failed });
  }

  /** Put a question; its answer goes to `answered`, what went wrong to `failed`. */
  put(question) {
    this.#waiting = question;
    if (!this.#busy) this.#work();
  }

  /** Drop the question that waits. */
  drop() {
    this.#waiting = null;
  }

  async #work() {
    this.#busy = true;
    while (this.#waiting) {
      const question = this.#waiting;
      this.#waiting = null;
      try {
        this.answered(question, await this.ask(question));
      } catch (error) {
        if (!(error instanceof ServerError)) {
          this.#busy = false;
          throw error;
        }
        this.failed(error);
      }
    }
    this.#busy = false;
  }
}
