// The page's data: one JSON text and many typed arrays, deflated, in base64.

const KINDS = { u1: Uint8Array, u2: Uint16Array, f4: Float32Array };

/** Decode what `packed.py` wrote: {about, arrays}. */
export async function unpack(text) {
  const letters = atob(text);
  const deflated = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) deflated[i] = letters.charCodeAt(i);
  const stream = new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate"));
  return read(await new Response(stream).arrayBuffer());
}

/** The length of the JSON in four bytes, the JSON, and behind it the arrays that it lists as [kind, offset, length]. */
export function read(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const about = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = about.arrays.map(([kind, offset, size]) => new KINDS[kind](buffer, 4 + length + offset, size));
  return { about, arrays };
}

/** What the page is of, with the arrays in place of their numbers. */
export function built({ about, arrays }) {
  const own = (number) => (number === null ? null : arrays[number]);
  return {
    ...about,
    labels: own(about.labels),
    networks: about.networks.map((one) => ({
      ...one,
      predictions: own(one.predictions),
      probabilities: own(one.probabilities),
    })),
    panels: about.panels.map((one) => ({
      ...one,
      hits: own(one.hits),
      maps: one.maps.map(([x, y]) => ({ x: arrays[x], y: arrays[y] })),
    })),
    thumbnails: about.thumbnails && {
      ...about.thumbnails,
      sheets: about.thumbnails.sheets.map(own),
      images: own(about.thumbnails.images),
    },
  };
}
