import assert from "node:assert/strict";
import test from "node:test";
import { deflateSync } from "node:zlib";

import { part, random } from "./parts.mjs";

const { paint, pixel } = await part("paint");
const { built, read, unpack } = await part("data");

test("a colour's pixel, whole and faint", () => {
  assert.equal(pixel("#0072b2"), 0xffb27200);
  assert.equal(pixel("#000000", "#ffffff", 0.25), 0xffbfbfbf);
  assert.equal(pixel("#ffffff", "#000000", 0), 0xff000000);
});

test("points are painted as squares, the selected over the others, cut at the edges", () => {
  const next = random(8);
  const size = 23;
  const count = 60;
  const places = Int32Array.from({ length: count }, () => Math.floor(next() * (size * size + 40)) - 40).map((one) => Math.max(one, -1));
  const pick = () => Uint8Array.from({ length: count }, () => Number(next() < 0.6));
  const [shown, groups] = [pick(), pick()];
  const [colours, faint] = [[11, 12], [21, 22]];
  for (const selected of [null, pick(), new Uint8Array(count)]) {
    for (const radius of [0, 1, 2]) {
      const wanted = new Uint32Array(size * size);
      const square = (place, colour) => {
        for (let at = 0; at < size * size; at++) {
          const [r, c] = [Math.floor(at / size) - Math.floor(place / size), (at % size) - (place % size)];
          if (Math.abs(r) <= radius && Math.abs(c) <= radius) wanted[at] = colour;
        }
      };
      const order = [...places.keys()].filter((i) => places[i] >= 0 && shown[i]);
      if (selected) order.filter((i) => !selected[i]).forEach((i) => square(places[i], faint[groups[i]]));
      order.filter((i) => !selected || selected[i]).forEach((i) => square(places[i], colours[groups[i]]));
      const pixels = new Uint32Array(size * size).fill(99);
      paint(pixels, size, places, { shown, selected, groups, colours, faint, radius });
      assert.deepEqual(pixels, wanted);
    }
  }
  const pixels = new Uint32Array(4);
  paint(pixels, 2, Int32Array.of(3), { shown: [1], selected: null, groups: null, colours: [7], faint: [8], radius: 0 });
  assert.deepEqual([...pixels], [0, 0, 0, 7]);
  paint(pixels, 2, new Int32Array(0), { shown: [], selected: null, groups: null, colours: [7], faint: [8], radius: 3 });
  assert.deepEqual([...pixels], [0, 0, 0, 0]);
});

test("packed data is read, with letters of every script", async () => {
  const said = Buffer.from(JSON.stringify({ name: "猫\u202e", arrays: [["u2", 0, 3], ["f4", 8, 1], ["u1", 12, 0]] }));
  const text = Buffer.concat([said, Buffer.alloc((4 - (said.length % 4)) % 4, " ")]);
  const length = Buffer.alloc(4);
  length.writeUInt32LE(text.length);
  const arrays = Buffer.alloc(12);
  [1, 2, 65535].forEach((value, i) => arrays.writeUInt16LE(value, 2 * i));
  arrays.writeFloatLE(1.5, 8);
  const whole = Buffer.concat([length, text, arrays]);
  const found = await unpack(deflateSync(whole).toString("base64"));
  assert.equal(found.about.name, "猫\u202e");
  assert.deepEqual(found.arrays.map((one) => [...one]), [[1, 2, 65535], [1.5], []]);
  assert.deepEqual(read(Uint8Array.from(whole).buffer).about, found.about);
  await assert.rejects(unpack("AAAA"));
});

test("a model has arrays where the page has their numbers", () => {
  const about = {
    labels: null,
    networks: [{ name: "A", predictions: null, probabilities: 0 }],
    panels: [{ network: 0, hits: 0, maps: [[0, 1]] }],
    thumbnails: null,
  };
  const found = built({ about, arrays: ["zero", "one"] });
  assert.deepEqual(found.networks, [{ name: "A", predictions: null, probabilities: "zero" }]);
  assert.deepEqual(found.panels, [{ network: 0, hits: "zero", maps: [{ x: "zero", y: "one" }] }]);
  assert.deepEqual([found.labels, found.thumbnails], [null, null]);
  const pictures = built({ about: { ...about, thumbnails: { sheets: [1], images: 0 } }, arrays: ["zero", "one"] });
  assert.deepEqual(pictures.thumbnails, { sheets: ["one"], images: "zero" });
});
