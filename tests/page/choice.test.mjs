import assert from "node:assert/strict";
import test from "node:test";

import { part, random } from "./parts.mjs";

const { address, csv, facts, hits, isolated, kinds, listed, NOTHING, restored, shown } = await part("choice");

/** A model of two networks with two layers each. */
function made({ count = 200, labelled = true, hits: known = true } = {}) {
  const next = random(3);
  const array = (kind, most) => kind.from({ length: count }, () => Math.floor(next() * most));
  const classes = ["cat", "dog", "Ægir"];
  return {
    files: Array.from({ length: count }, (_, i) => `${i % 2 ? "left" : "RIGHT"}/${i}.png`),
    classes: labelled ? classes : [],
    labels: labelled ? array(Uint16Array, 3) : null,
    k: 5,
    steps: 250,
    networks: ["A", "B"].map((name) => ({
      name,
      predictions: labelled ? array(Uint16Array, 3) : null,
      probabilities: labelled ? array(Uint16Array, 65536) : null,
    })),
    panels: [0, 0, 1, 1].map((network, i) => ({
      network,
      layer: `conv${i % 2}`,
      hits: labelled && known ? array(Uint8Array, 251) : null,
      maps: [0, 1].map(() => ({ x: array(Uint16Array, 65536), y: array(Uint16Array, 65536) })),
    })),
  };
}

const model = made();
const [A, B] = model.networks;
const which = (state) => listed(shown(model, { ...NOTHING, ...state }), null);
const expected = (test) => model.files.flatMap((_, i) => (test(i) ? [i] : []));
const wrong = (network, i) => network.predictions[i] !== model.labels[i];

test("every filter leaves what it says", () => {
  assert.equal(which({}).length, 200);
  assert.deepEqual(which({ classes: [0, 2] }), expected((i) => model.labels[i] !== 1));
  assert.deepEqual(which({ text: " right/1" }), expected((i) => i % 2 === 0 && String(i)[0] === "1"));
  assert.deepEqual(which({ text: "æGIR" }), expected((i) => model.labels[i] === 2));
  assert.deepEqual(which({ text: "no such" }), []);
  assert.deepEqual(which({ show: "wrong-1" }), expected((i) => wrong(B, i)));
  assert.deepEqual(which({ show: "lost-0-1" }), expected((i) => !wrong(A, i) && wrong(B, i)));
  assert.deepEqual(which({ show: "won-0-1" }), expected((i) => wrong(A, i) && !wrong(B, i)));
  const [before, after] = [model.panels[1].hits, model.panels[3].hits];
  assert.deepEqual(which({ show: "rises-0-1" }), expected((i) => after[i] - before[i] >= 100));
  assert.deepEqual(which({ show: "falls-0-1" }), expected((i) => before[i] - after[i] >= 100));
  assert.deepEqual(which({ panel: 2, below: 0.4 }), expected((i) => model.panels[2].hits[i] < 100));
  assert.deepEqual(which({ panel: 2, below: 0 }), []);
  const both = which({ classes: [1], text: "left", show: "wrong-0", panel: 0, below: 0.5 });
  const hit = model.panels[0].hits;
  assert.deepEqual(both, expected((i) => model.labels[i] === 1 && i % 2 && wrong(A, i) && hit[i] < 125));
});

test("what may be shown is what is known", () => {
  const values = (one) => kinds(one).map(([value]) => value);
  assert.deepEqual(values(model), ["all", "wrong-0", "wrong-1", "lost-0-1", "won-0-1", "rises-0-1", "falls-0-1"]);
  assert.deepEqual(values(made({ labelled: false })), ["all"]);
  assert.deepEqual(values(made({ hits: false })), ["all", "wrong-0", "wrong-1", "lost-0-1", "won-0-1"]);
  assert.deepEqual(values({ ...model, networks: [A, { name: "B", predictions: null }] }).slice(0, 2), ["all", "wrong-0"]);
});

test("an address gives its state back", () => {
  const polygon = [[1, 2], [30000, 4], [5, 65000]];
  const state = {
    classes: [0, 2], text: "a&b=%#<>", show: "lost-0-1", panel: 3, below: 0.25, map: 1, point: 17,
    region: { panel: 2, map: 1, polygon },
  };
  assert.deepEqual(restored(model, address(state)), state);
  assert.equal(address(NOTHING), "");
  assert.deepEqual(restored(model, ""), NOTHING);
  assert.deepEqual(restored(model, address({ ...NOTHING, below: 0 })).below, 0);
});

test("of a hostile address only what is of the page is taken", () => {
  const texts = [
    "classes=9,-1,1.5,x,,0x1,1e0,%00", "show=wrong-7", "show=__proto__", "show=rises-0-9", "below=9:0.5", "below=0:",
    "below=0:-1", "below=0:2", "below=0:0x1", "below=:", "map=2", "map=-1", "map=1.0", "image=200", "image=NaN",
    "region=0,0,1,2,3,4", "region=9,0,1,2,3,4,5,6", "region=0,9,1,2,3,4,5,6", "region=0,0,1,2,3,4,5", "region=,,,,,,,",
    "region=0,0,1,2,3,4,5,Infinity", "region=length,0,1,2,3,4,5,6", "region=0,length,1,2,3,4,5,6", "__proto__=1",
    "constructor=1", "%", "%ff%fe", "&&&===", "classes", "region",
  ];
  for (const text of texts) assert.deepEqual(restored(model, text), NOTHING, text);
  assert.deepEqual(restored(model, "classes=2,1,1,2").classes, [1, 2]);
  assert.equal(restored(model, "text=<script>alert(1)</script>").text, "<script>alert(1)</script>");
  const unlabelled = made({ labelled: false });
  assert.deepEqual(restored(unlabelled, "classes=0&show=wrong-0"), NOTHING);
});

test("what is said of an image", () => {
  const own = { ...model, labels: Uint16Array.of(1), files: ["x.png"] };
  own.networks = [{ name: "A", predictions: Uint16Array.of(1), probabilities: Uint16Array.of(65535) }];
  own.networks.push({ name: "B", predictions: Uint16Array.of(0), probabilities: Uint16Array.of(32768) });
  assert.deepEqual(facts(own, 0), [["image", "x.png"], ["label", "dog"], ["A says", "dog (100 %)"], ["B says", "cat (50 %) ✗"]]);
  own.panels = [0, 0, 1].map((network, i) => ({ network, hits: Uint8Array.of(50 * i) }));
  assert.deepEqual(hits(own, 0), [["hits, A", "0 · 20 %"], ["hits, B", "40 %"]]);
  assert.deepEqual(facts(made({ labelled: false }), 0), [["image", "RIGHT/0.png"]]);
  assert.deepEqual(hits(made({ labelled: false }), 0), []);
});

test("a name that runs the other way stays by itself", () => {
  assert.equal(isolated("plain é 猫"), "plain é 猫");
  for (const name of ["חתול", "قط", "\u202eevil"]) assert.equal(isolated(name), `\u2068${name}\u2069`);
});

test("the table of images reads back", () => {
  const names = ['a"b', "c,d", "e\nf", "plain", " ", "=1+1"];
  const own = { ...made({ count: 6 }), files: names };
  const rows = csv(own, [5, 0, 1, 2, 3]);
  const cells = [...rows.matchAll(/("(?:[^"]|"")*"|[^,\n]*)([,\n])/g)];
  const read = [[]];
  for (const [, cell, end] of cells) {
    read.at(-1).push(cell.startsWith('"') ? cell.slice(1, -1).replaceAll('""', '"') : cell);
    if (end === "\n") read.push([]);
  }
  read.pop();
  const header = ["file", "label", "A prediction", "A probability", "B prediction", "B probability"];
  assert.deepEqual(read[0], [...header, "A conv0 hit", "A conv1 hit", "B conv0 hit", "B conv1 hit"]);
  assert.deepEqual(read.slice(1).map((row) => row[0]), [5, 0, 1, 2, 3].map((i) => names[i]));
  assert.equal(read[1][1], own.classes[own.labels[5]]);
  assert.equal(Number(read[1][3]), Number((own.networks[0].probabilities[5] / 65535).toFixed(4)));
  assert.equal(csv(made({ labelled: false, count: 1 }), [0]), "file\nRIGHT/0.png\n");
  assert.equal(csv(own, []).split("\n").length, 2);
});

test("listed are those shown and selected", () => {
  assert.deepEqual(listed(Uint8Array.of(1, 0, 1, 1), Uint8Array.of(1, 1, 0, 1)), [0, 3]);
  assert.deepEqual(listed(Uint8Array.of(1, 0, 1), null), [0, 2]);
});
