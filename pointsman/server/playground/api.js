// The server's routes. The API key lives in this object and nowhere else.

class Api {
  constructor(askForKey) {
    this.askForKey = askForKey;
    this.key = "";
  }

  async request(path, body, signal) {
    for (;;) {
      const headers = this.key ? { authorization: `Bearer ${this.key}` } : {};
      if (body !== undefined) headers["content-type"] = "application/json";
      const response = await fetch(path, {
        method: body === undefined ? "GET" : "POST",
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
        credentials: "omit",
        cache: "no-store",
      });
      if (response.ok) return response;
      const error = await readError(response);
      if (response.status !== 401 || !(await this.askForKey(this.key))) throw error;
    }
  }

  async json(path, body, signal) {
    return (await this.request(path, body, signal)).json();
  }

  /** The events of a streamed answer. */
  async *stream(path, body, signal) {
    const response = await this.request(path, body, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the connection ended before the answer did");
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: ?/, "");
        if (data === "[DONE]") return;
        const parsed = JSON.parse(data);
        if (parsed.error) throw new Error(parsed.error.message);
        yield parsed;
      }
    }
  }
}

async function readError(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not ours: something between here and the server has answered
  }
  const error = new Error(message);
  error.status = response.status;
  return error;
}
