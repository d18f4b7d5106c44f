// One answer as it grows: what is shown of it, and what is known of its tokens.

const SPECIAL = /^(<\/?think>|<\/?minimax:tool_call>|\]~!?b\]|\[e~\[)$/;
const AT_ONCE_MILLISECONDS = 3;

class Answer {
  constructor(pick) {
    this.pick = pick;
    this.reasoning = "";
    this.content = "";
    this.calls = [];
    this.tokens = []; // of the answer: {text, logprob, top}
    this.prompt = null; // ids of the prompt's tokens, then their texts in promptTexts
    this.promptTexts = [];
    this.record = null;
    this.usage = null;
    this.finish = null;
    this.begun = performance.now();
    this.first = this.last = null;
    this.early = 0; // tokens that came in one go with the first
    this.dirty = false;
    this.selected = null;
    this.build();
  }

  build() {
    this.element = make("li", "answer busy");
    this.thinking = make("details", "thinking");
    this.thinking.hidden = true;
    this.thinkingTitle = make("summary", "", "Thinking");
    this.thinkingText = make("div");
    this.thinking.append(this.thinkingTitle, this.thinkingText);
    this.text = make("div", "text");
    this.cards = make("div");
    this.cards.hidden = true;
    this.cards.className = "calls";
    this.strip = make("details", "tokens");
    this.strip.hidden = true;
    this.stripTitle = make("summary", "", "Tokens");
    this.list = make("div", "strip");
    this.list.setAttribute("role", "listbox");
    this.list.setAttribute("aria-label", "Tokens of the answer; arrow keys move from one to the next");
    this.strip.append(this.stripTitle, this.list);
    this.meta = make("p", "meta");
    this.element.append(this.thinking, this.text, this.cards, this.strip, this.meta);
    this.list.addEventListener("click", (event) => this.choose(event.target.closest(".token")));
    this.list.addEventListener("keydown", (event) => this.walk(event));
    this.strip.addEventListener("toggle", () => this.drawTokens());
    this.thinking.addEventListener("toggle", () => (this.touched = this.touched || !this.folding));
  }

  /** Take one chunk of the stream. */
  take(chunk) {
    const now = performance.now();
    if (chunk.prompt_token_ids) this.prompt = chunk.prompt_token_ids;
    if (chunk.usage) this.usage = chunk.usage;
    for (const choice of chunk.choices) {
      const delta = choice.delta;
      if (delta.reasoning_content) this.reasoning += delta.reasoning_content;
      if (delta.content) this.content += delta.content;
      for (const piece of delta.tool_calls || []) this.takeCall(piece);
      const entries = (choice.logprobs && choice.logprobs.content) || [];
      for (const entry of entries) {
        const top = (entry.top_logprobs || []).map((other) => ({ text: tokenText(other), logprob: other.logprob }));
        this.tokens.push({ text: tokenText(entry), logprob: entry.logprob, top });
      }
      if (entries.length || delta.content || delta.reasoning_content) {
        this.first = this.first || now;
        this.last = now;
        if (now - this.first < AT_ONCE_MILLISECONDS) this.early = Math.max(this.tokens.length, 1);
      }
      if (choice.routed_experts) this.record = new RoutingRecord(choice.routed_experts);
      if (choice.finish_reason) this.finish = choice.finish_reason;
    }
    this.schedule();
  }

  takeCall(piece) {
    const call = (this.calls[piece.index] = this.calls[piece.index] || { id: "", name: "", arguments: "" });
    if (piece.id) call.id = piece.id;
    if (piece.function.name) call.name = piece.function.name;
    call.arguments += piece.function.arguments || "";
  }

  schedule() {
    if (this.dirty) return;
    this.dirty = true;
    requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.dirty = false;
    grow(this.thinkingText, this.reasoning);
    grow(this.text, this.content);
    this.text.hidden = !this.content;
    this.thinking.hidden = !this.reasoning;
    if (!this.touched) {
      this.folding = true;
      this.thinking.open = !this.ended && !this.content && !this.calls.length;
      requestAnimationFrame(() => (this.folding = false));
    }
    this.cards.hidden = !this.calls.length;
    this.calls.forEach((call, index) => this.drawCall(call, index));
    this.strip.hidden = !this.tokens.length;
    this.drawTokens();
    this.drawMeta();
    if (this.grown) this.grown();
  }

  drawCall(call, index) {
    let card = this.cards.children[index];
    if (!card) {
      card = make("section", "call");
      const title = make("h3");
      title.append(make("span", "", "calls"), make("b"));
      card.append(title, make("div"));
      card.setAttribute("aria-label", `Tool call ${index + 1}`);
      this.cards.append(card);
    }
    if (card.dataset.drawn === call.arguments && card.dataset.name === call.name) return;
    Object.assign(card.dataset, { drawn: call.arguments, name: call.name });
    card.querySelector("b").textContent = call.name;
    card.children[1].replaceChildren(showArguments(call.arguments));
  }

  drawTokens() {
    this.stripTitle.textContent = `${this.tokens.length} tokens` + (this.record ? ", each with its experts" : "");
    if (!this.strip.open) return;
    for (let index = this.list.querySelectorAll(".token:not(.prompt)").length; index < this.tokens.length; index++) {
      this.list.append(this.chip(this.tokens[index].text, this.numPrompt + index));
    }
  }

  get numPrompt() {
    return this.prompt ? this.prompt.length : 0;
  }

  chip(text, position, prompt = false) {
    const chip = make("span", "token" + (prompt ? " prompt" : "") + (SPECIAL.test(text) ? " special" : ""));
    chip.textContent = text.replace(/\n/g, "↵\n") || "∅";
    chip.dataset.position = position;
    chip.setAttribute("role", "option");
    chip.setAttribute("aria-selected", "false");
    chip.tabIndex = this.list.childElementCount || prompt ? -1 : 0;
    return chip;
  }

  /** Put the prompt's tokens before the answer's. */
  showPrompt(texts) {
    this.promptTexts = texts;
    this.list.prepend(...texts.map((text, position) => this.chip(text, position, true)));
  }

  choose(chip, focus = true) {
    if (!chip) return;
    for (const other of document.querySelectorAll('.token[aria-selected="true"]')) other.setAttribute("aria-selected", "false");
    for (const other of this.list.querySelectorAll('.token[tabindex="0"]')) other.tabIndex = -1;
    chip.setAttribute("aria-selected", "true");
    chip.tabIndex = 0;
    if (focus) chip.focus({ preventScroll: true });
    chip.scrollIntoView({ block: "nearest", inline: "nearest" });
    this.selected = Number(chip.dataset.position);
    this.pick(this, this.selected);
  }

  step(by) {
    const chips = [...this.list.querySelectorAll(".token")];
    const at = chips.findIndex((chip) => Number(chip.dataset.position) === this.selected);
    this.choose(chips[Math.min(Math.max(at + by, 0), chips.length - 1)], document.activeElement.classList.contains("token"));
  }

  walk(event) {
    const chip = event.target.closest(".token");
    if (!chip) return;
    const near = { ArrowLeft: chip.previousElementSibling, ArrowRight: chip.nextElementSibling, Home: this.list.firstElementChild, End: this.list.lastElementChild };
    const target = event.key in near ? near[event.key] : { ArrowUp: lineAbove(chip, -1), ArrowDown: lineAbove(chip, 1), Enter: chip, " ": chip }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    this.choose(target || chip);
  }

  /** What is known of the token at a position of prompt and answer. */
  token(position) {
    if (position < this.numPrompt) return { text: this.promptTexts[position], prompt: true };
    return this.tokens[position - this.numPrompt];
  }

  /** Let tokens that `test(position)` holds for stand out, and tint all by `colour(position)`. */
  paint(test, colour) {
    for (const chip of this.list.children) {
      const position = Number(chip.dataset.position);
      chip.classList.toggle("lit", Boolean(test && test(position)));
      chip.style.backgroundColor = (colour && colour(position)) || "";
    }
  }

  /** Tokens a second after the first; over the whole time where nearly all came at once, for then the network has bunched them. */
  rate(number) {
    const late = number - this.early;
    return late > number / 4 ? (1000 * late) / (this.last - this.first) : (1000 * number) / (this.last - this.begun);
  }

  drawMeta() {
    const facts = [];
    const number = this.usage ? this.usage.completion_tokens : this.tokens.length;
    if (this.first) facts.push(`first token ${seconds(this.first - this.begun)}`);
    if (number > 1) facts.push(`${Math.round(this.rate(number)).toLocaleString("en")} tokens/s`);
    if (number) facts.push(`${number} tokens`);
    const cached = this.usage && this.usage.prompt_tokens_details && this.usage.prompt_tokens_details.cached_tokens;
    if (this.usage) facts.push(`prompt ${this.usage.prompt_tokens}` + (cached ? `, ${cached} from the cache` : ""));
    if (this.finish === "length") facts.push("cut off by the length limit");
    if (this.stopped) facts.push("stopped");
    this.meta.replaceChildren(...facts.map((fact) => make("span", "", fact)), ...(this.buttons || []));
  }

  end(buttons) {
    this.ended = true;
    this.buttons = buttons;
    this.element.classList.remove("busy");
    if (this.reasoning) this.thinkingTitle.textContent = this.usage && this.usage.completion_tokens_details
      ? `Thinking, ${this.usage.completion_tokens_details.reasoning_tokens} tokens` : "Thinking";
    if (this.record) this.strip.open = true;
    this.draw();
  }

  fail(message) {
    this.element.append(make("p", "error", message));
  }

  /** The turn as the next request has it. */
  get message() {
    const message = { role: "assistant", content: this.content || (this.calls.length ? null : "") };
    if (this.reasoning) message.reasoning_content = this.reasoning;
    if (this.calls.length) {
      message.tool_calls = this.calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
    }
    return message;
  }
}

function make(name, className = "", text = "") {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

/** Set an element's text, adding only what is new, so that a selection in it stays. */
function grow(element, text) {
  const node = element.firstChild;
  if (!node) element.append(document.createTextNode(text));
  else if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}

function tokenText(entry) {
  if (!entry.bytes) return entry.token;
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(Uint8Array.from(entry.bytes));
  } catch {
    return `‹${entry.bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}›`;
  }
}

function showArguments(text) {
  let values;
  try {
    values = JSON.parse(text);
  } catch {
    return make("pre", "", text);
  }
  const list = make("dl");
  for (const [name, value] of Object.entries(values)) {
    list.append(make("dt", "", name), make("dd", "", typeof value === "string" ? value : JSON.stringify(value)));
  }
  return Object.keys(values).length ? list : make("pre", "", "no arguments");
}

function lineAbove(chip, direction) {
  const from = chip.getBoundingClientRect();
  let best = null, bestDistance = Infinity;
  for (let other = chip; other; other = direction < 0 ? other.previousElementSibling : other.nextElementSibling) {
    const box = other.getBoundingClientRect();
    const lines = Math.abs(box.top - from.top);
    if (lines < from.height / 2) continue;
    if (lines > 2.4 * from.height && best) break;
    const distance = lines * 10 + Math.abs(box.left - from.left);
    if (distance < bestDistance) [best, bestDistance] = [other, distance];
  }
  return best;
}

function seconds(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}
