import assert from "node:assert/strict";
import test from "node:test";

import { part, random } from "./parts.mjs";

const { fitted, inside, neighbors, pick, places, SPAN, step, zoomed } = await part("geometry");

function points(count, most = SPAN, seed = 1) {
  const next = random(seed);
  const axis = () => Uint16Array.from({ length: count }, () => Math.round(next() * most));
  return { x: axis(), y: axis() };
}

test("a whole map fits into the square, its corners on the margin", () => {
  const view = fitted(200, 8);
  const corners = places({ x: Uint16Array.of(0, SPAN), y: Uint16Array.of(0, SPAN) }, view, 200);
  assert.deepEqual([...corners], [8 * 200 + 8, 192 * 200 + 192]);
  assert.equal(places({ x: new Uint16Array(0), y: new Uint16Array(0) }, view, 200).length, 0);
});

test("what is outside of the square has no place", () => {
  const map = points(500);
  const view = { scale: 0.02, left: -300, top: -400 };
  places(map, view, 200).forEach((place, i) => {
    const [column, row] = [Math.round(map.x[i] * 0.02 - 300), Math.round(map.y[i] * 0.02 - 400)];
    const within = column >= 0 && column < 200 && row >= 0 && row < 200;
    assert.equal(place, within ? row * 200 + column : -1);
  });
});

test("zooming leaves what is under the pointer, and ends at the whole map and at 200 times", () => {
  const least = fitted(300);
  const once = zoomed(least, 3, 50, 70, least);
  const at = (view) => [(50 - view.left) / view.scale, (70 - view.top) / view.scale];
  at(once).forEach((value, i) => assert.ok(Math.abs(value - at(least)[i]) < 1e-6));
  assert.deepEqual(zoomed(once, 0.01, 10, 10, least), least);
  assert.equal(zoomed(once, 1e9, 10, 10, least).scale, least.scale * 200);
});

test("the nearest shown point is picked, the first of equals, none beyond the radius", () => {
  const next = random(5);
  const map = points(300);
  const view = fitted(300);
  const shown = Uint8Array.from(map.x, () => Number(next() < 0.7));
  for (let trial = 0; trial < 200; trial++) {
    const [px, py] = [next() * 300, next() * 300];
    const far = [...map.x].map((x, i) => Math.hypot(x * view.scale + view.left - px, map.y[i] * view.scale + view.top - py));
    const near = far.map((distance, i) => (shown[i] ? distance : Infinity));
    const least = Math.min(...near);
    assert.equal(pick(map, view, shown, px, py, 10), least <= 10 ? near.indexOf(least) : -1);
  }
  const same = { x: Uint16Array.of(9, 9, 9), y: Uint16Array.of(9, 9, 9) };
  assert.equal(pick(same, { scale: 1, left: 0, top: 0 }, [0, 1, 1], 9, 9, 10), 1);
  assert.equal(pick(same, { scale: 1, left: 0, top: 0 }, [0, 0, 0], 9, 9, 10), -1);
  assert.equal(pick(same, { scale: 1, left: 0, top: 0 }, [1, 1, 1], 19, 9, 10), 0); // just within
});

test("neighbours are those of a sort by distance and number, with ties", () => {
  for (const most of [SPAN, 6]) {
    const map = points(120, most, 3);
    for (const [point, k] of [[0, 5], [7, 1], [119, 10], [50, 200]]) {
      const far = (i) => (map.x[i] - map.x[point]) ** 2 + (map.y[i] - map.y[point]) ** 2;
      const others = [...map.x.keys()].filter((i) => i !== point).sort((a, b) => far(a) - far(b) || a - b);
      assert.deepEqual(neighbors(map, point, k), others.slice(0, k));
    }
  }
  assert.deepEqual(neighbors({ x: Uint16Array.of(1), y: Uint16Array.of(1) }, 0, 5), []);
});

test("a step goes to the nearest shown point within 45 degrees", () => {
  const map = points(150, 400, 9);
  const next = random(2);
  const shown = Uint8Array.from(map.x, () => Number(next() < 0.8));
  for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
    for (let point = 0; point < 150; point++) {
      const ahead = (i) => {
        const [x, y] = [map.x[i] - map.x[point], map.y[i] - map.y[point]];
        const along = x * dx + y * dy;
        return along > 0 && Math.abs(dx ? y : x) <= along ? x * x + y * y : Infinity;
      };
      const all = [...map.x.keys()].map((i) => (i === point || !shown[i] ? Infinity : ahead(i)));
      const least = Math.min(...all);
      assert.equal(step(map, shown, point, dx, dy), least === Infinity ? -1 : all.indexOf(least));
    }
  }
});

test("inside a box and a concave polygon, as areas say", () => {
  const map = points(2000, 100, 4);
  const box = inside(map, [[10.5, 20.5], [60.5, 20.5], [60.5, 80.5], [10.5, 80.5]]);
  box.forEach((one, i) => {
    const { x, y } = { x: map.x[i], y: map.y[i] };
    assert.equal(one, Number(x > 10.5 && x < 60.5 && y > 20.5 && y < 80.5));
  });
  // an L, by its two boxes
  const shape = [[0.5, 0.5], [90.5, 0.5], [90.5, 30.5], [40.5, 30.5], [40.5, 95.5], [0.5, 95.5]];
  inside(map, shape).forEach((one, i) => {
    const [x, y] = [map.x[i], map.y[i]];
    const low = x > 0.5 && x < 90.5 && y > 0.5 && y < 30.5;
    const left = x > 0.5 && x < 40.5 && y > 0.5 && y < 95.5;
    assert.equal(one, Number(low || left));
  });
  assert.equal(inside(map, [[200, 200], [300, 200], [300, 300]]).indexOf(1), -1);
  assert.equal(inside(map, [[5, 5], [5, 5], [5, 5]]).indexOf(1), -1);
  const many = Array.from({ length: 300000 }, (_, i) => [50 + 60 * Math.cos(i / 47746), 50 + 60 * Math.sin(i / 47746)]);
  assert.equal(inside({ x: Uint16Array.of(50), y: Uint16Array.of(50) }, many)[0], 1); // more corners than arguments
});
