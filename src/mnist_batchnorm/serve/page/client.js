// Client of the Open Inference Protocol, with at most one request per model at a time.

const TIMEOUT_MS = 10_000;

/**
 * A failed request.
 *
 * `kind` is "unreachable", "token" (missing or wrong), "busy" or "refused"; `retryAfter` is the time
 * until the next attempt in seconds, 0 if retrying is useless.
 */
export class ServerError extends Error {
  constructor(kind, message, retryAfter = 0) {
    super(message);
    Object.assign(this, { kind, retryAfter });
  }
}

/** Sends requests to the server of the page; the token stays in memory. */
export class Client {
  token = "";

  /** Return the names of the models that are ready. */
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
      // unverified unless the server says otherwise
      verified: parameters.verified === true || parameters.verified === "true",
      because: parameters.unverified_because ?? "the server does not say that it is verified",
    };
  }

  /** Return the ten logits for 784 pixels, the model's version, and the latency in ms. */
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

  // GET, or POST if there is a body.
  async #json(path, body) {
    const headers = this.token ? { Authorization: `Bearer ${this.token}` } : {};
    const options = { headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) };
    if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    let response, text;
    try {
      response = await fetch(path, options);
      text = await response.text();
    } catch {
      throw new ServerError("unreachable", "The server does not answer.", 2);
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
  const reported = reason(text) || `status ${response.status}`;
  if (response.status === 401) return new ServerError("token", reported);
  if (response.status === 503 || response.status === 429) {
    const retryAfter = Math.min(Math.max(Number(response.headers.get("Retry-After")) || 1, 1), 10);
    return new ServerError("busy", `The server is busy: ${reported}.`, retryAfter);
  }
  // 404: a model may have been unloaded, or loaded again
  return new ServerError("refused", `The server refuses: ${reported}.`, response.status === 404 ? 5 : 0);
}

function reason(text) {
  try {
    return String(JSON.parse(text).error ?? "").replace(/\.$/, "");
  } catch {
    return "";
  }
}

/** Sends the images of one model one at a time; of those that wait, only the newest is sent. */
export class LatestRequest {
  #waiting = null;
  #busy = false;

  constructor(send, answered, failed) {
    Object.assign(this, { send, answered, failed });
  }

  /** Send an image; then `answered` or `failed` is called. */
  put(image) {
    this.#waiting = image;
    if (!this.#busy) this.#work();
  }

  /** Drop the image that waits. */
  drop() {
    this.#waiting = null;
  }

  async #work() {
    this.#busy = true;
    while (this.#waiting) {
      const image = this.#waiting;
      this.#waiting = null;
      try {
        this.answered(image, await this.send(image));
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
