// What the page shows of LOAD: tiles, the map, the bars of one layer, a row a layer.

const find = (id) => document.getElementById(id);
const make = (kind, text) => Object.assign(document.createElement(kind), { textContent: text });
const number = (value, digits) => value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const numLayers = LOAD.layers.length, numExperts = LOAD.counts[0].length;
const totals = LOAD.counts.map((row) => row.reduce((sum, count) => sum + count, 0));
const share = (layer, expert) => (totals[layer] ? (LOAD.counts[layer][expert] * numExperts) / totals[layer] : 0);
const unused = (layer) => LOAD.counts[layer].filter((count) => !count).length;

function describe(layer, expert) {
  const count = LOAD.counts[layer][expert];
  const part = LOAD.numTokens ? ` (${number((100 * count) / LOAD.numTokens, 1)} % of the tokens)` : "";
  return `Layer ${LOAD.layers[layer]}, expert ${expert}: ${number(count, 0)} tokens${part}, ${number(share(layer, expert), 2)}× an even share`;
}

function tiles() {
  const most = LOAD.balances.reduce((best, [value], layer) => (value > LOAD.balances[best][0] ? layer : best), 0);
  const busiest = LOAD.counts[most].indexOf(Math.max(...LOAD.counts[most]));
  const entropy = LOAD.balances.reduce((sum, [, value]) => sum + value, 0) / numLayers;
  const dead = LOAD.counts.reduce((sum, _, layer) => sum + unused(layer), 0);
  for (const [value, label] of [
    [number(LOAD.numTokens, 0), "tokens"],
    [`${number(LOAD.balances[most][0], 2)}×`, `busiest of an even share: layer ${LOAD.layers[most]}, expert ${busiest}`],
    [number(entropy, 3), "mean entropy of the layers; 1 is even"],
    [number(dead, 0), `of ${number(numLayers * numExperts, 0)} experts never used`],
  ]) {
    const tile = document.createElement("li");
    tile.append(make("b", value), make("span", label));
    find("tiles").append(tile);
  }
  return most;
}

function showLayer(layer) {
  find("layer-title").textContent = `Layer ${LOAD.layers[layer]}`;
  const top = Math.max(...LOAD.counts[layer].map((_, expert) => share(layer, expert)), 1);
  const even = document.createElement("hr");
  even.style.bottom = `${100 / top}%`;
  const bars = LOAD.counts[layer].map((_, expert) => {
    const bar = document.createElement("div");
    bar.style.height = `${(100 * share(layer, expert)) / top}%`;
    bar.title = describe(layer, expert);
    return bar;
  });
  find("bars").replaceChildren(even, ...bars);
  find("bars").setAttribute("aria-label", `Load of the ${numExperts} experts of layer ${LOAD.layers[layer]}`);
  [...find("rows").children].forEach((row, index) => row.setAttribute("aria-selected", String(index === layer)));
}

function rows() {
  const most = Math.max(...LOAD.balances.map(([value]) => value), 1);
  LOAD.balances.forEach(([busiest, entropy, effective], layer) => {
    const row = document.createElement("tr");
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.width = `${(9 * busiest) / most}rem`;
    const cell = document.createElement("td");
    cell.append(bar, `${number(busiest, 2)}×`);
    row.append(make("td", LOAD.layers[layer]), cell, make("td", number(entropy, 3)), make("td", number(effective, 1)), make("td", unused(layer)));
    row.addEventListener("click", () => showLayer(layer));
    find("rows").append(row);
  });
}

const first = tiles();
rows();
const map = new HeatMap(find("map"), { label: document.title, describe, choose: (cell) => cell && showLayer(cell.layer) });
map.show(numLayers, numExperts, LOAD.counts.flatMap((row, layer) => row.map((_, expert) => share(layer, expert))), { layers: LOAD.layers });
showLayer(first);
