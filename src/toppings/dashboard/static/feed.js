// How things are, as the server tells it: events over fetch, since EventSource sends no key.

const KEY = "toppings-key";
const SILENT_MS = 5e3;
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 1e4;

export const readKey = () => sessionStorage.getItem(KEY) ?? "";
export const keepKey = (key) => sessionStorage.setItem(KEY, key);
export const dropKey = () => sessionStorage.removeItem(KEY);

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, signal) {
  const key = readKey();
  const reply = await fetch(path, {
    headers: key ? { Authorization: `Bearer ${key}` } : {},
    cache: "no-store",
    credentials: "omit",
    signal,
  });
  if (reply.ok) return reply;
  let told = `it answered ${reply.status}`;
  try {
    told = String((await reply.json()).error.message);
  } catch {
    // no error object: the status has to do
  }
  throw new Refused(reply.status, told);
}

// One connection after the other, until `stop`. Calls `on.sections` with what has changed, `on.state` with a
// word on the connection, `on.refused` (and ends) where the key is wrong or missing.
export class Feed {
  constructor(path, on) {
    this.path = path;
    this.on = on;
    this.control = null;
  }

  get isRunning() {
    return this.control !== null;
  }

  stop() {
    this.control?.abort();
    this.control = null;
  }

  async start() {
    this.stop();
    const control = (this.control = new AbortController());
    let wait = FIRST_WAIT_MS;
    while (this.control === control) {
      this.on.state("connecting");
      try {
        let isHeard = false;
        await this.follow(control, () => {
          wait = FIRST_WAIT_MS;
          isHeard = true;
        });
        if (isHeard) continue; // streams end after some minutes
        if (this.control === control) this.on.state("lost: the server has closed the stream");
      } catch (error) {
        if (this.control !== control) return;
        if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
          this.control = null;
          this.on.refused(error);
          return;
        }
        this.on.state(`lost: ${error instanceof Refused ? error.message : "the server cannot be reached"}`);
      }
      await new Promise((go) => setTimeout(go, wait));
      wait = Math.min(2 * wait, LONGEST_WAIT_MS);
    }
  }

  // Until the stream ends. One that has said nothing for some seconds is given up.
  async follow(control, onEvent) {
    const mine = new AbortController();
    control.signal.addEventListener("abort", () => mine.abort());
    let silence = 0;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => mine.abort(), SILENT_MS);
    };
    try {
      heard();
      const reply = await ask(this.path, mine.signal);
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        heard();
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        for (const event of events) {
          if (!event.startsWith("data: ") || this.control !== control) continue;
          onEvent();
          this.on.sections(JSON.parse(event.slice(6)));
        }
      }
    } finally {
      clearTimeout(silence);
      mine.abort();
    }
  }
}
