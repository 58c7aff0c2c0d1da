// Which images are shown and which are selected, and what is said of them. Nothing here touches the page.

export const NOTHING = { classes: [], text: "", show: "all", panel: 0, below: 1.01, map: 0, point: -1, region: null };
const CHANGE = 0.4; // of a hit, that counts as one

/** The hits in a network's last layer, or null. */
function lastHits(model, network) {
  return model.panels.findLast((one) => one.network === network)?.hits;
}

/** What `show` may be: [[value, words], ...]. */
export function kinds(model) {
  const found = [["all", "all images"]];
  const known = model.networks.map((one, i) => [one, i]).filter(([one]) => one.predictions && model.labels);
  for (const [one, i] of known) found.push([`wrong-${i}`, `wrong in ${one.name}`]);
  for (const [one, i] of known.slice(1)) {
    const [first, a] = known[0];
    found.push([`lost-${a}-${i}`, `right in ${first.name}, wrong in ${one.name}`]);
    found.push([`won-${a}-${i}`, `wrong in ${first.name}, right in ${one.name}`]);
  }
  if (lastHits(model, 0)) {
    model.networks.slice(1).forEach((one, i) => {
      const first = model.networks[0].name;
      if (!lastHits(model, i + 1)) return;
      found.push([`rises-0-${i + 1}`, `hit rises from ${first} to ${one.name}`]);
      found.push([`falls-0-${i + 1}`, `hit falls from ${first} to ${one.name}`]);
    });
  }
  return found;
}

/** Which images the filters leave: 1 or 0 for each. */
export function shown(model, { classes, text, show, panel, below }) {
  const kept = new Uint8Array(model.files.length).fill(1);
  const drop = (test) => kept.forEach((one, i) => one && test(i) && (kept[i] = 0));
  if (classes.length && model.labels) {
    const chosen = new Set(classes);
    drop((i) => !chosen.has(model.labels[i]));
  }
  const word = text.trim().toLowerCase();
  if (word) {
    const named = model.classes.map((name) => name.toLowerCase().includes(word));
    drop((i) => !(model.labels && named[model.labels[i]]) && !model.files[i].toLowerCase().includes(word));
  }
  const hits = model.panels[panel]?.hits;
  if (below <= 1 && hits) drop((i) => hits[i] >= below * model.steps - 1e-9);
  const [kind, a, b] = show.split("-").map((part, i) => (i ? Number(part) : part));
  const right = (network, i) => model.networks[network].predictions[i] === model.labels[i];
  if (kind === "wrong") drop((i) => right(a, i));
  if (kind === "lost") drop((i) => !right(a, i) || right(b, i));
  if (kind === "won") drop((i) => right(a, i) || !right(b, i));
  if (kind === "rises" || kind === "falls") {
    const [before, after] = [a, b].map((network) => lastHits(model, network));
    const sign = kind === "rises" ? 1 : -1;
    drop((i) => sign * (after[i] - before[i]) < CHANGE * model.steps - 1e-9);
  }
  return kept;
}

/** The state as the part of an address behind "#", without what is as at first. */
export function address(state) {
  const said = new URLSearchParams();
  if (state.classes.length) said.set("classes", state.classes.join());
  if (state.text) said.set("text", state.text);
  if (state.show !== "all") said.set("show", state.show);
  if (state.below <= 1) said.set("below", `${state.panel}:${state.below}`);
  if (state.map) said.set("map", state.map);
  if (state.point >= 0) said.set("image", state.point);
  if (state.region) {
    const { panel, map, polygon } = state.region;
    said.set("region", [panel, map, ...polygon.flat().map(Math.round)].join());
  }
  return said.toString();
}

/** The state of an address; what it says that is not of this page is as at first. */
export function restored(model, text) {
  const said = new URLSearchParams(text);
  const number = (value, most) => (/^\d+$/.test(value ?? "") && Number(value) < most ? Number(value) : null);
  const state = { ...NOTHING, text: said.get("text") ?? "" };
  const classes = (said.get("classes") ?? "").split(",").map((one) => number(one, model.classes.length));
  state.classes = [...new Set(classes.filter((one) => one !== null))].sort((a, b) => a - b);
  if (kinds(model).some(([value]) => value === said.get("show"))) state.show = said.get("show");
  const [panel, below] = (said.get("below") ?? "").split(":");
  if (number(panel, model.panels.length) !== null && /^[01](\.\d+)?$/.test(below) && Number(below) <= 1) {
    Object.assign(state, { panel: Number(panel), below: Number(below) });
  }
  state.map = number(said.get("map"), Math.max(...model.panels.map((one) => one.maps.length))) ?? 0;
  state.point = number(said.get("image"), model.files.length) ?? -1;
  const [where, turn, ...corners] = (said.get("region") ?? "").split(",").map((one) => (one === "" ? NaN : Number(one)));
  const known = model.panels[where]?.maps[turn];
  if (known && corners.length >= 6 && corners.length % 2 === 0 && corners.every(Number.isFinite)) {
    const polygon = corners.flatMap((one, i) => (i % 2 ? [] : [[one, corners[i + 1]]]));
    state.region = { panel: where, map: turn, polygon };
  }
  return state;
}

const OTHER_WAY = /[\u0590-\u08ff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufdff\ufe70-\ufefc]/;

/** A name within a sentence, whose order of letters it leaves as it is. */
export function isolated(name) {
  return OTHER_WAY.test(name) ? `\u2068${name}\u2069` : name;
}

/** What is known of an image: [[words, value], ...]. */
export function facts(model, i) {
  const found = [["image", model.files[i]]];
  if (model.labels) found.push(["label", model.classes[model.labels[i]]]);
  for (const one of model.networks) {
    if (!one.predictions) continue;
    const wrong = model.labels && one.predictions[i] !== model.labels[i] ? " ✗" : "";
    const sure = ((100 * one.probabilities[i]) / 65535).toFixed(0);
    found.push([`${one.name} says`, `${isolated(model.classes[one.predictions[i]])} (${sure} %)${wrong}`]);
  }
  return found;
}

/** The hit of an image in each layer of each network, in order: [[words, values], ...]. */
export function hits(model, i) {
  return model.networks.flatMap((one, network) => {
    const own = model.panels.filter((panel) => panel.network === network && panel.hits);
    const shares = own.map((panel) => ((100 * panel.hits[i]) / model.steps).toFixed(0));
    return own.length ? [[`hits, ${one.name}`, `${shares.join(" · ")} %`]] : [];
  });
}

/** Numbers of the images that are selected and shown; of all that are shown where nothing is selected. */
export function listed(kept, selected) {
  const found = [];
  kept.forEach((one, i) => one && (!selected || selected[i]) && found.push(i));
  return found;
}

/** A table of images as CSV. */
export function csv(model, images) {
  const quoted = (value) => (/[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  const networks = model.networks.filter((one) => one.predictions);
  const panels = model.panels.filter((one) => one.hits);
  const header = ["file", ...(model.labels ? ["label"] : [])];
  for (const one of networks) header.push(`${one.name} prediction`, `${one.name} probability`);
  for (const one of panels) header.push(`${model.networks[one.network].name} ${one.layer} hit`);
  const rows = images.map((i) => [
    model.files[i],
    ...(model.labels ? [model.classes[model.labels[i]]] : []),
    ...networks.flatMap((one) => [model.classes[one.predictions[i]], (one.probabilities[i] / 65535).toFixed(4)]),
    ...panels.map((one) => +(one.hits[i] / model.steps).toFixed(4)),
  ]);
  return [header, ...rows].map((row) => `${row.map(quoted).join()}\n`).join("");
}
