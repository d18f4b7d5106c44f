// A map of layers by experts: a canvas that can be pointed at, clicked, and walked with the arrow keys.

class HeatMap {
  /** `describe(layer, expert)` says what a cell shows; `choose(layer, expert)` is called when one is clicked. */
  constructor(holder, { label, describe, choose }) {
    this.holder = holder;
    this.label = label;
    this.describe = describe;
    this.choose = choose;
    this.note = holder.parentElement.querySelector(".note");
    this.hint = this.note ? this.note.textContent : "";
    this.canvas = null;
    this.cursor = null;
    this.chosen = null;
    new ResizeObserver(() => this.draw()).observe(holder);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Show values, layer by layer: 0 unused, 1 an even share, 3 and above the hottest; `ranks` are drawn as numbers instead. */
  show(numLayers, numExperts, values, { ranks = false, layers = null } = {}) {
    Object.assign(this, { numLayers, numExperts, values, ranks, layers });
    if (!this.canvas) {
      this.create();
      this.say("");
    }
    this.draw();
  }

  clear(text) {
    this.canvas = this.values = this.cursor = this.chosen = null;
    const empty = document.createElement("p");
    empty.className = "empty";
    empty.textContent = text;
    this.holder.replaceChildren(empty);
    this.say("");
  }

  create() {
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.addEventListener("pointermove", (event) => this.point(this.cell(event)));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("click", (event) => this.pick(this.cell(event)));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.holder.replaceChildren(this.canvas);
  }

  measure() {
    const room = this.holder.clientWidth;
    this.left = this.numLayers > 12 ? 26 : 22;
    this.wide = Math.max(3, Math.min(26, (room - this.left - 1) / this.numExperts));
    this.high = Math.max(5, Math.min(20, 320 / this.numLayers));
    this.width = this.left + this.wide * this.numExperts + 1;
    this.top = this.high < 10 ? 5 : 0;
    this.height = this.top + this.high * this.numLayers + 16;
  }

  draw() {
    if (!this.canvas || !this.holder.clientWidth) return;
    this.measure();
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.width * scale);
    this.canvas.height = Math.round(this.height * scale);
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${this.height}px`;
    this.canvas.setAttribute("aria-label", `${this.label}: ${this.numLayers} layers by ${this.numExperts} experts. Arrow keys move, Enter picks.`);
    const context = this.canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const style = getComputedStyle(document.documentElement);
    const colours = ["--heat-0", "--heat-1", "--heat-2", "--heat-3"].map((name) => rgb(style.getPropertyValue(name)));
    const gap = this.wide > 6 && this.high > 6 ? 1 : this.wide > 3.5 ? 0.5 : 0;
    for (let layer = 0; layer < this.numLayers; layer++) {
      for (let expert = 0; expert < this.numExperts; expert++) this.fill(context, layer, expert, colours, gap, style);
    }
    this.axes(context, style);
    for (const [cell, width] of [[this.chosen, 2.5], [this.cursor, 1.5]]) {
      if (!cell) continue;
      context.strokeStyle = style.getPropertyValue(cell === this.chosen ? "--pick" : "--ink");
      context.lineWidth = width;
      context.strokeRect(this.left + cell.expert * this.wide, this.top + cell.layer * this.high, this.wide, this.high);
    }
  }

  fill(context, layer, expert, colours, gap, style) {
    const value = this.values[layer * this.numExperts + expert];
    const x = this.left + expert * this.wide, y = this.top + layer * this.high;
    context.fillStyle = this.ranks && value ? style.getPropertyValue("--pick") : ramp(colours, this.ranks ? 0 : value);
    if (this.ranks && value) context.globalAlpha = 1 - (0.62 * (value - 1)) / Math.max(this.ranks - 1, 1);
    context.fillRect(x + gap / 2, y + gap / 2, this.wide - gap, this.high - gap);
    context.globalAlpha = 1;
    if (this.ranks && value && this.wide >= 12 && this.high >= 12) {
      context.fillStyle = style.getPropertyValue(value - 1 < this.ranks / 2 ? "--accent-ink" : "--ink");
      context.font = `600 10px ${style.getPropertyValue("--mono")}`;
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.fillText(String(value), x + this.wide / 2, y + this.high / 2 + 0.5);
    }
  }

  axes(context, style) {
    context.fillStyle = style.getPropertyValue("--faint");
    context.font = `10px ${style.getPropertyValue("--mono")}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const rows = Math.ceil(12 / this.high), columns = niceStep(18 / this.wide);
    for (let layer = 0; layer < this.numLayers; layer += rows) {
      context.fillText(String(this.name(layer)), this.left - 5, this.top + (layer + 0.5) * this.high);
    }
    context.textAlign = "center";
    for (let expert = 0; expert < this.numExperts; expert += columns) {
      context.fillText(String(expert), this.left + (expert + 0.5) * this.wide, this.height - 7);
    }
  }

  name(layer) {
    return this.layers ? this.layers[layer] : layer;
  }

  cell(event) {
    const box = this.canvas.getBoundingClientRect();
    const expert = Math.floor((event.clientX - box.left - this.left) / this.wide);
    const layer = Math.floor((event.clientY - box.top - this.top) / this.high);
    return expert >= 0 && expert < this.numExperts && layer >= 0 && layer < this.numLayers ? { layer, expert } : null;
  }

  point(cell) {
    this.cursor = cell;
    this.say(cell ? this.describe(cell.layer, cell.expert) : this.chosen ? this.describe(this.chosen.layer, this.chosen.expert) : "");
    this.draw();
  }

  pick(cell) {
    const same = cell && this.chosen && cell.layer === this.chosen.layer && cell.expert === this.chosen.expert;
    this.chosen = same ? null : cell;
    if (this.choose) this.choose(this.chosen);
    this.draw();
  }

  key(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key in moves) {
      const [down, right] = moves[event.key];
      const from = this.cursor || this.chosen || { layer: 0, expert: -1 };
      const layer = Math.min(Math.max(from.layer + down, 0), this.numLayers - 1);
      const expert = Math.min(Math.max(from.expert + right, 0), this.numExperts - 1);
      this.point({ layer, expert });
      const x = this.left + expert * this.wide, seen = this.holder.clientWidth;
      if (x < this.holder.scrollLeft || x + this.wide > this.holder.scrollLeft + seen) this.holder.scrollLeft = x - seen / 2;
    } else if ((event.key === "Enter" || event.key === " ") && this.cursor) {
      this.pick(this.cursor);
    } else {
      return;
    }
    event.preventDefault();
  }

  say(text) {
    if (this.note) this.note.textContent = text || (this.canvas ? this.hint : "");
  }
}

function rgb(text) {
  const hex = text.trim().slice(1);
  return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

/** From unused over an even share to three times that. */
function ramp(colours, value) {
  const at = value <= 1 ? value : Math.min(1 + (value - 1), 3);
  const low = Math.min(Math.floor(at), 2), part = at - low;
  const mixed = colours[low].map((channel, index) => Math.round(channel + (colours[low + 1][index] - channel) * part));
  return `rgb(${mixed.join(" ")})`;
}

function niceStep(least) {
  return [1, 2, 4, 5, 8, 10, 16, 20, 32, 64].find((step) => step >= least) || 64;
}
