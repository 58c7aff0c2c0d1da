// Points of a map: coordinates are uint16, drawn by a view {scale, left, top}: pixel = coordinate * scale + left or top.

export const SPAN = 65535;

/** The view that shows a whole map in a square of `size` pixels. */
export function fitted(size, margin = 8) {
  return { scale: (size - 2 * margin) / SPAN, left: margin, top: margin };
}

/** A view `factor` times as large, in which what is at the pixel (px, py) stays there; never smaller than `least`. */
export function zoomed(view, factor, px, py, least) {
  const scale = Math.min(Math.max(view.scale * factor, least.scale), least.scale * 200);
  if (scale === least.scale) return { ...least };
  const grown = scale / view.scale;
  return { scale, left: px - (px - view.left) * grown, top: py - (py - view.top) * grown };
}

/** Where each point is in a square of `size` pixels: row * size + column, or -1 outside of it. */
export function places({ x, y }, view, size) {
  const found = new Int32Array(x.length);
  for (let i = 0; i < x.length; i++) {
    const column = Math.round(x[i] * view.scale + view.left);
    const row = Math.round(y[i] * view.scale + view.top);
    found[i] = column >= 0 && row >= 0 && column < size && row < size ? row * size + column : -1;
  }
  return found;
}

/** The shown point nearest to the pixel (px, py), at most `radius` pixels away, or -1. */
export function pick({ x, y }, view, shown, px, py, radius) {
  let best = radius * radius;
  let found = -1;
  for (let i = 0; i < x.length; i++) {
    if (!shown[i]) continue;
    const dx = x[i] * view.scale + view.left - px;
    const dy = y[i] * view.scale + view.top - py;
    const distance = dx * dx + dy * dy;
    if (distance < best || (distance === best && found < 0)) {
      best = distance;
      found = i;
    }
  }
  return found;
}

/** The k nearest points of a point in a map, by distance and then by number. */
export function neighbors({ x, y }, point, k) {
  const best = [];
  for (let i = 0; i < x.length; i++) {
    if (i === point) continue;
    const distance = (x[i] - x[point]) ** 2 + (y[i] - y[point]) ** 2;
    if (best.length === k && distance >= best[k - 1][0]) continue;
    let place = best.length;
    while (place > 0 && best[place - 1][0] > distance) place--;
    best.splice(place, 0, [distance, i]);
    best.length = Math.min(best.length, k);
  }
  return best.map(([, i]) => i);
}

/** The nearest shown point in a direction, (1, 0) being right and (0, 1) down, within 45 degrees of it; or -1. */
export function step({ x, y }, shown, point, dx, dy) {
  let best = Infinity;
  let found = -1;
  for (let i = 0; i < x.length; i++) {
    if (i === point || !shown[i]) continue;
    const ahead = (x[i] - x[point]) * dx + (y[i] - y[point]) * dy;
    const beside = Math.abs((x[i] - x[point]) * dy) + Math.abs((y[i] - y[point]) * dx);
    const distance = ahead * ahead + beside * beside;
    if (ahead > 0 && beside <= ahead && distance < best) {
      best = distance;
      found = i;
    }
  }
  return found;
}

/** Which points are inside a polygon [[x, y], ...] in the coordinates of the map: 1 or 0 for each, by even and odd. */
export function inside({ x, y }, polygon) {
  const found = new Uint8Array(x.length);
  const left = polygon.reduce((least, corner) => Math.min(least, corner[0]), Infinity);
  const right = polygon.reduce((most, corner) => Math.max(most, corner[0]), -Infinity);
  for (let i = 0; i < x.length; i++) {
    if (x[i] < left || x[i] > right) continue;
    let odd = 0;
    for (let a = 0, b = polygon.length - 1; a < polygon.length; b = a++) {
      const [ax, ay] = polygon[a];
      const [bx, by] = polygon[b];
      if (ay > y[i] !== by > y[i] && x[i] < ((bx - ax) * (y[i] - ay)) / (by - ay) + ax) odd ^= 1;
    }
    found[i] = odd;
  }
  return found;
}
