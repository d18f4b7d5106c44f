// The side that shows routing: of a token, of an answer, of the server.

const RECENT_SECONDS = 10;
const POLL_MILLISECONDS = 1000;

class RoutingView {
  constructor(api) {
    this.api = api;
    this.answer = null;
    this.position = null;
    this.cell = null;
    this.samples = [];
    this.span = "recent";
    this.tokenMap = new HeatMap(find("token-map"), {
      label: "Experts of the token", describe: (layer, expert) => this.describeRank(layer, expert), choose: (cell) => this.answerMap.pick(cell),
    });
    this.answerMap = new HeatMap(find("answer-map"), {
      label: "Load of the answer", describe: (layer, expert) => this.describeAnswer(layer, expert), choose: (cell) => this.brush(cell),
    });
    this.serverMap = new HeatMap(find("server-map"), {
      label: "Load of the server", describe: (layer, expert) => describeLoad(this.serverLoad, layer, expert, this.samples.at(-1).layers[layer]),
    });
    this.tokenMap.clear("Layers by experts appear here.");
    this.answerMap.clear("No record yet.");
    this.serverMap.clear("Layers by experts appear here.");
    find("token-back").addEventListener("click", () => this.answer.step(-1));
    find("token-next").addEventListener("click", () => this.answer.step(1));
    find("tint").addEventListener("change", () => this.paint());
    find("download").addEventListener("click", () => this.download());
    for (const button of document.querySelectorAll("[data-span]")) button.addEventListener("click", () => this.setSpan(button.dataset.span));
  }

  /** Show an answer's record. */
  show(answer) {
    if (this.answer === answer || !answer.record) return;
    if (this.answer) this.answer.element.classList.remove("picked");
    this.answer = answer;
    this.position = this.cell = this.answerMap.chosen = null;
    answer.element.classList.add("picked");
    const record = answer.record;
    this.load = record.load(answer.numPrompt);
    const rows = `${record.numRows} rows by ${record.numLayers} layers by ${record.topK} of ${record.numExperts} experts`;
    find("answer-title").textContent = `${rows}; ${record.plain.dtype}, checksum right. The map is of the answer's tokens.`;
    find("download").disabled = false;
    this.answerMap.show(record.numLayers, record.numExperts, this.load.ratios, { layers: record.layers });
    const tint = find("tint");
    tint.replaceChildren(option("", "nothing"), option("p", "probability"), ...record.layers.map((layer, at) => option(String(at), `best expert of layer ${layer}`)));
    tint.disabled = false;
    this.clearToken();
  }

  /** Nothing is shown any more. */
  clear() {
    this.answer = this.position = this.cell = null;
    this.answerMap.clear("No record yet.");
    find("answer-title").textContent = "The record of an answer comes with its last token.";
    find("download").disabled = find("tint").disabled = true;
    this.clearToken();
  }

  clearToken() {
    this.position = null;
    this.tokenMap.clear("Layers by experts appear here.");
    find("token-title").replaceChildren(make("p", "faint", "Select a token of an answer."));
    find("token-table").hidden = true;
    find("token-back").disabled = find("token-next").disabled = true;
  }

  showToken(answer, position) {
    this.show(answer);
    if (!answer.record) return;
    this.position = position;
    const token = answer.token(position), experts = answer.record.at(position), record = answer.record;
    find("token-title").replaceChildren(...describeToken(answer, token, position));
    find("token-back").disabled = find("token-next").disabled = false;
    find("token-table").hidden = !experts;
    if (!experts) {
      const last = position === answer.numPrompt + answer.tokens.length - 1;
      this.tokenMap.clear(last ? "The last token was sampled and never fed back: no expert has seen it." : "This row is missing from the record.");
      return;
    }
    this.tokenMap.chosen = null;
    const ranks = (this.ranks = new Float64Array(record.numLayers * record.numExperts));
    experts.forEach((ids, layer) => ids.forEach((id, rank) => (ranks[layer * record.numExperts + id] = rank + 1)));
    this.tokenMap.show(record.numLayers, record.numExperts, ranks, { ranks: record.topK, layers: record.layers });
    const rows = experts.map((ids, layer) => {
      const row = make("tr"), head = make("th", "", String(record.layers[layer]));
      head.scope = "row";
      row.append(head, make("td", "", ids.join(", ")));
      return row;
    });
    find("token-table").querySelector("tbody").replaceChildren(...rows);
  }

  describeRank(layer, expert) {
    const { record } = this.answer, rank = this.ranks[layer * record.numExperts + expert];
    const used = rank ? `choice ${rank} of ${record.topK}` : "not used";
    return `Layer ${record.layers[layer]}, expert ${expert}: ${used}. Click to mark all tokens that used it.`;
  }

  describeAnswer(layer, expert) {
    const text = describeLoad(this.load, layer, expert, this.answer.record.layers[layer]);
    const chosen = this.cell && this.cell.layer === layer && this.cell.expert === expert;
    return text + (chosen ? " Its tokens are marked; click again to unmark." : " Click to mark its tokens.");
  }

  /** Mark the tokens that used an expert. */
  brush(cell) {
    this.cell = cell;
    this.paint();
    this.answerMap.say(cell ? this.describeAnswer(cell.layer, cell.expert) : "");
    if (cell) this.answer.strip.open = true;
  }

  paint() {
    const { answer, cell } = this, tint = find("tint").value;
    if (!answer) return;
    const uses = cell && ((position) => (answer.record.at(position) || [])[cell.layer]?.includes(cell.expert));
    answer.paint(uses, tint && ((position) => tintOf(answer, position, tint)));
  }

  setSpan(span) {
    this.span = span;
    for (const button of document.querySelectorAll("[data-span]")) button.setAttribute("aria-pressed", String(button.dataset.span === span));
    this.drawServer();
  }

  /** Ask the server for its counts, as long as the page is looked at. */
  async poll() {
    for (;;) {
      try {
        if (!document.hidden && (!this.samples.length || find("server-card").offsetParent)) this.takeSample(await this.api.json("/routing_load"));
      } catch {
        find("server-title").textContent = "The server does not answer.";
      }
      await new Promise((resolve) => setTimeout(resolve, POLL_MILLISECONDS));
    }
  }

  takeSample(sample) {
    const load = new Load(sample.layers.length, sample.num_experts, Float64Array.from(sample.counts.flat()));
    this.samples.push({ time: performance.now(), load, layers: sample.layers, tokens: sample.num_tokens });
    while (this.samples.length > 2 && this.samples[1].time < performance.now() - RECENT_SECONDS * 1000) this.samples.shift();
    this.drawServer();
  }

  drawServer() {
    const latest = this.samples.at(-1), first = this.samples[0];
    if (!latest) return;
    const recent = this.span === "recent";
    const tokens = recent ? latest.tokens - first.tokens : latest.tokens;
    const rate = recent && latest.time > first.time ? (tokens * 1000) / (latest.time - first.time) : 0;
    this.serverLoad = recent ? latest.load.since(first.load) : latest.load;
    if (!tokens) {
      find("server-title").textContent = recent ? "No token in the last 10 seconds." : "No token has been computed yet.";
      if (!this.serverMap.canvas) return;
    } else {
      const busiest = Math.max(...this.serverLoad.ratios);
      const speed = recent ? `, ${Math.round(rate).toLocaleString("en")} a second` : "";
      find("server-title").textContent = `${tokens.toLocaleString("en")} tokens${speed}, prompts included. Busiest expert: ${busiest.toFixed(2)} times an even share.`;
    }
    this.serverMap.show(latest.load.numLayers, latest.load.numExperts, this.serverLoad.ratios, { layers: latest.layers });
  }

  download() {
    const blob = new Blob([JSON.stringify(this.answer.record.plain)], { type: "application/json" });
    const link = make("a");
    link.href = URL.createObjectURL(blob);
    link.download = "routed_experts.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}

function describeLoad(load, layer, expert, name = layer) {
  if (!load) return "";
  const count = load.counts[layer * load.numExperts + expert];
  return `Layer ${name}, expert ${expert}: ${count.toLocaleString("en")} tokens, ${load.ratio(layer, expert).toFixed(2)} times an even share.`;
}

/** A token amid its neighbours, and how likely it and others were. */
function describeToken(answer, token, position) {
  const around = make("p", "around"), title = make("p", "faint");
  const texts = (from, to) => Array.from({ length: to - from }, (_, at) => (answer.token(from + at) || { text: "" }).text || "").join("").replace(/\n/g, "↵");
  const end = Math.min(position + 7, answer.numPrompt + answer.tokens.length);
  around.append(texts(Math.max(position - 6, 0), position), make("b", "", token.text.replace(/\n/g, "↵") || "∅"), texts(position + 1, end));
  title.textContent = `Position ${position}` + (token.prompt ? ", in the prompt" : `, chosen with ${percent(token.logprob)}`);
  if (token.prompt) return [around, title];
  const list = make("ol", "guesses");
  list.setAttribute("aria-label", "Likeliest tokens here");
  for (const guess of token.top.filter((guess, at) => at < 2 || guess.logprob > Math.log(0.0005))) {
    const item = make("li"), bar = make("span", "bar");
    bar.style.width = `${Math.max(100 * Math.exp(guess.logprob), 0.5)}%`;
    item.append(make("span", "name", guess.text.replace(/\n/g, "↵")), bar, make("span", "share", percent(guess.logprob)));
    list.append(item);
  }
  return [around, title, list];
}

function tintOf(answer, position, tint) {
  if (tint === "p") {
    const token = answer.token(position);
    return token.prompt ? "" : `color-mix(in srgb, var(--heat-2) ${Math.round(70 * (1 - Math.exp(token.logprob)))}%, transparent)`;
  }
  const experts = answer.record.at(position);
  return experts ? `hsl(${(experts[Number(tint)][0] * 137.508) % 360}deg 70% 55% / .38)` : "";
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share < 0.01 ? "< 0.01 %" : `${share >= 99.95 ? "100" : share >= 10 ? share.toFixed(1) : share.toPrecision(2)} %`;
}

function option(value, text) {
  const element = make("option", "", text);
  element.value = value;
  return element;
}

function find(id) {
  return document.getElementById(id);
}
