// Points into pixels, without a canvas.

/** "#rrggbb" as the pixel of a little-endian ImageData, over `paper` where it is only `share` opaque. */
export function pixel(colour, paper = "#ffffff", share = 1) {
  const parts = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  const [own, under] = [parts(colour), parts(paper)];
  const [red, green, blue] = own.map((one, i) => Math.round(one * share + under[i] * (1 - share)));
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

/**
 * Draw points as squares of 2 * radius + 1 pixels: those shown but not selected first, faint, then the selected.
 * pixels: Uint32Array [size * size]; places: as `geometry.places` gives them; shown, selected: 1 or 0 for each, selected
 * null if all are; groups: the number of each point's colour, or null.
 */
export function paint(pixels, size, places, { shown, selected, groups, colours, faint, radius }) {
  pixels.fill(0);
  const draw = (place, colour) => {
    const row = (place / size) | 0;
    const column = place - row * size;
    const left = Math.max(column - radius, 0);
    const right = Math.min(column + radius, size - 1);
    const bottom = Math.min(row + radius, size - 1);
    for (let r = Math.max(row - radius, 0); r <= bottom; r++) {
      const end = r * size + right;
      for (let at = r * size + left; at <= end; at++) pixels[at] = colour; // for a few pixels quicker than fill
    }
  };
  if (selected) {
    for (let i = 0; i < places.length; i++) {
      if (places[i] >= 0 && shown[i] && !selected[i]) draw(places[i], faint[groups ? groups[i] : 0]);
    }
  }
  for (let i = 0; i < places.length; i++) {
    if (places[i] >= 0 && shown[i] && (!selected || selected[i])) draw(places[i], colours[groups ? groups[i] : 0]);
  }
}
