// The conversation: what is sent, and what becomes of it.

const TOOLS_EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Get the weather of a city",
      parameters: {
        type: "object",
        properties: { city: { type: "string", description: "the city" }, days: { type: "integer", description: "number of days" } },
        required: ["city"],
      },
    },
  },
  {
    type: "function",
    function: {
      name: "book_table",
      description: "Book a table at a restaurant",
      parameters: {
        type: "object",
        properties: {
          restaurant: { type: "string", description: "name of the restaurant" },
          guests: { type: "integer", description: "number of guests" },
        },
        required: ["restaurant", "guests"],
      },
    },
  },
];
const IDEAS = [
  ["A word problem", "Tom has 14 apples. He buys 3 bags with 6 apples in each and gives 7 apples away. How many apples does Tom have now?"],
  ["Boxes", "There are 15 boxes with 12 eggs in each. How many eggs are there in total?"],
  ["A tool call", "What is the weather in Lisbon?", TOOLS_EXAMPLE],
];
const PIECE = 1000;

class Chat {
  constructor(api, routing) {
    this.api = api;
    this.routing = routing;
    this.messages = [];
    this.running = null;
    this.log = find("log");
    this.box = find("message");
    this.scroller = find("scroll");
    find("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    this.box.addEventListener("input", () => this.fitBox());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.running) this.stop();
    });
    find("stop").addEventListener("click", () => this.stop());
    find("new-chat").addEventListener("click", () => this.reset());
    find("tools").addEventListener("input", () => readTools());
    find("tools-example").addEventListener("click", () => this.setTools(TOOLS_EXAMPLE));
    find("ideas").append(...IDEAS.map(([title, text, tools]) => this.idea(title, text, tools)));
  }

  idea(title, text, tools) {
    const button = make("button");
    button.type = "button";
    button.append(make("b", "", title), text);
    button.addEventListener("click", () => {
      if (tools) this.setTools(tools);
      this.box.value = text;
      this.send();
    });
    return button;
  }

  setTools(tools) {
    find("tools").value = JSON.stringify(tools, null, 2);
    readTools();
  }

  fitBox() {
    this.box.style.height = "auto";
    this.box.style.height = `${this.box.scrollHeight + 2}px`;
  }

  send() {
    const text = this.box.value.trim();
    if (!text || this.running) return;
    this.box.value = "";
    this.fitBox();
    this.messages.push({ role: "user", content: text });
    this.log.append(make("li", "user", text));
    this.ask();
  }

  /** Ask for the assistant's next turn. */
  async ask() {
    const tools = readTools();
    if (tools === null) {
      showView("settings");
      find("tools").focus();
      return;
    }
    find("welcome").hidden = true;
    this.dropButtons();
    const answer = new Answer((picked, position) => this.pick(picked, position));
    answer.grown = () => this.follow();
    this.log.append(answer.element);
    this.setRunning(new AbortController());
    this.follow(true);
    try {
      for await (const chunk of this.api.stream("/v1/chat/completions", requestBody(this.messages, tools), this.running.signal)) answer.take(chunk);
    } catch (error) {
      if (error.name === "AbortError") answer.stopped = true;
      else answer.fail(error.message);
    }
    this.setRunning(null);
    this.finish(answer);
  }

  finish(answer) {
    const before = this.messages.length;
    if (answer.content || answer.calls.length || answer.finish) this.messages.push(answer.message);
    const buttons = [button("Again", () => this.again(answer, before))];
    if (answer.content) buttons.unshift(button("Copy", () => navigator.clipboard.writeText(answer.content)));
    answer.end(buttons);
    if (answer.calls.length && !answer.stopped) this.askForResults(answer);
    if (answer.record) {
      const below = make("p", "row");
      if (answer.prompt) below.append(this.promptButton(answer));
      answer.jump = button("See the experts", () => showView("routing"));
      answer.jump.classList.add("phone");
      answer.jump.hidden = true;
      below.append(answer.jump);
      answer.list.after(below);
      this.routing.show(answer);
    }
    this.follow();
  }

  /** Drop the last answer and ask once more. */
  again(answer, before) {
    if (this.running) return;
    this.messages.length = before;
    answer.element.remove();
    if (this.routing.answer === answer) this.routing.clear();
    this.ask();
  }

  promptButton(answer) {
    const show = button(`Show the prompt's ${answer.prompt.length} tokens too`, async () => {
      show.disabled = true;
      const texts = [];
      for (let at = 0; at < answer.prompt.length; at += PIECE) {
        const tokens = answer.prompt.slice(at, at + PIECE).map((token) => [token]);
        texts.push(...(await this.api.json("/detokenize", { tokens, skip_special_tokens: false })).text);
      }
      answer.showPrompt(texts);
      show.remove();
      this.routing.paint();
    });
    return show;
  }

  /** Below each call, a place for what the tool says. */
  askForResults(answer) {
    const boxes = answer.calls.map((call, index) => {
      const box = make("textarea", "code");
      box.rows = 2;
      box.placeholder = "What the tool answers";
      box.setAttribute("aria-label", `Result of ${call.name}`);
      answer.cards.children[index].append(box);
      return box;
    });
    const give = button(boxes.length > 1 ? "Give these results" : "Give this result", () => {
      if (this.running) return;
      answer.calls.forEach((call, index) => {
        this.messages.push({ role: "tool", tool_call_id: call.id, content: boxes[index].value });
        boxes[index].readOnly = true;
      });
      give.remove();
      this.ask();
    });
    answer.cards.append(give);
    boxes[0].focus();
  }

  dropButtons() {
    for (const old of this.log.querySelectorAll(".meta button")) if (old.textContent === "Again") old.remove();
  }

  pick(answer, position) {
    if (answer.jump) answer.jump.hidden = false;
    this.routing.showToken(answer, position);
    this.routing.paint();
  }

  setRunning(controller) {
    this.running = controller;
    this.log.setAttribute("aria-busy", String(Boolean(controller)));
    find("stop").hidden = !controller;
    find("send").hidden = Boolean(controller);
    if (!controller) this.box.focus({ preventScroll: true });
  }

  stop() {
    this.running.abort();
  }

  reset() {
    if (this.running) this.stop();
    this.messages = [];
    this.log.replaceChildren();
    find("welcome").hidden = false;
    this.routing.clear();
    showView("chat");
    this.box.focus();
  }

  /** Keep the end in sight, unless someone has scrolled up to read. */
  follow(always = false) {
    const rest = this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight;
    if (always || rest < 160) this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}

/** The tools in the editor: a list, undefined where there are none, null where they cannot be read. */
function readTools() {
  const box = find("tools"), note = find("tools-note");
  note.className = "note";
  note.textContent = "";
  if (!box.value.trim()) return undefined;
  try {
    const tools = JSON.parse(box.value);
    if (!Array.isArray(tools)) throw new Error("it must be a list");
    note.textContent = `${tools.length} ${tools.length === 1 ? "tool" : "tools"}: ${tools.map((tool) => tool.function.name).join(", ")}`;
    return tools.length ? tools : undefined;
  } catch (error) {
    note.classList.add("bad");
    note.textContent = `This cannot be read: ${error.message}`;
    return null;
  }
}

function requestBody(messages, tools) {
  const system = find("system").value.trim();
  const body = {
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
    logprobs: true,
    top_logprobs: 5,
  };
  for (const input of find("sampling").querySelectorAll('input[type="number"]')) {
    if (input.value !== "") body[input.name] = Number(input.value);
  }
  if (find("record").checked) Object.assign(body, { return_routed_experts: true, return_token_ids: true });
  if (tools) Object.assign(body, { tools, tool_choice: find("tool-choice").value });
  return body;
}

function button(text, action) {
  const element = make("button", "small", text);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}
