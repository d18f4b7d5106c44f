// The routing record of an answer: read, checked, asked.

const CRC = (() => {
  const table = new Uint32Array(256);
  for (let byte = 0; byte < 256; byte++) {
    let value = byte;
    for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
    table[byte] = value;
  }
  return (bytes) => {
    let value = 0xffffffff;
    for (const byte of bytes) value = table[(value ^ byte) & 255] ^ (value >>> 8);
    return (value ^ 0xffffffff) >>> 0;
  };
})();

class RoutingRecord {
  constructor(record) {
    if (record.version !== 1) throw new Error(`the record has version ${record.version}; this page reads version 1`);
    const text = atob(record.data);
    const bytes = Uint8Array.from(text, (character) => character.charCodeAt(0));
    if (CRC(bytes) !== record.crc32) throw new Error("the record was damaged on its way: its checksum differs");
    [this.numRows, this.numLayers, this.topK] = record.shape;
    this.ids = record.dtype === "uint16" ? new Uint16Array(bytes.buffer) : bytes;
    if (this.ids.length !== this.numRows * this.numLayers * this.topK) throw new Error("the record has another length than it says");
    this.start = record.start;
    this.numExperts = record.num_experts;
    this.layers = record.layers;
    this.missing = record.missing;
    this.plain = record;
  }

  /** The experts that the token at a position of prompt and answer used: a list for each layer, or null where that is not known. */
  at(position) {
    const row = position - this.start;
    if (row < 0 || row >= this.numRows || this.missing.some(([first, last]) => first <= row && row < last)) return null;
    return this.layers.map((_, layer) => this.of(row, layer));
  }

  of(row, layer) {
    const first = (row * this.numLayers + layer) * this.topK;
    return Array.from(this.ids.subarray(first, first + this.topK));
  }

  /** How many tokens from a position on used each expert. */
  load(position) {
    const load = new Load(this.numLayers, this.numExperts);
    for (let at = Math.max(position, this.start); at < this.start + this.numRows; at++) {
      const experts = this.at(at);
      if (experts) experts.forEach((ids, layer) => ids.forEach((id) => (load.counts[layer * this.numExperts + id] += 1)));
    }
    return load;
  }
}

/** Counts of layers by experts. */
class Load {
  constructor(numLayers, numExperts, counts) {
    this.numLayers = numLayers;
    this.numExperts = numExperts;
    this.counts = counts || new Float64Array(numLayers * numExperts);
  }

  total(layer) {
    let sum = 0;
    for (let expert = 0; expert < this.numExperts; expert++) sum += this.counts[layer * this.numExperts + expert];
    return sum;
  }

  /** An expert's share of its layer, as a multiple of an even share. */
  ratio(layer, expert) {
    return (this.counts[layer * this.numExperts + expert] * this.numExperts) / (this.total(layer) || 1);
  }

  get ratios() {
    const ratios = new Float64Array(this.counts.length);
    for (let layer = 0; layer < this.numLayers; layer++) {
      const even = this.total(layer) / this.numExperts || 1;
      for (let at = layer * this.numExperts; at < (layer + 1) * this.numExperts; at++) ratios[at] = this.counts[at] / even;
    }
    return ratios;
  }

  since(earlier) {
    return new Load(this.numLayers, this.numExperts, this.counts.map((count, at) => count - earlier.counts[at]));
  }
}
