// The page's scripts, as the modules that they are; all are plain files without imports.

import { readFile } from "node:fs/promises";

const ASSETS = new URL("../../qdv_gpu/report/assets/", import.meta.url);

/** A script's exports. */
export async function part(name) {
  const text = await readFile(new URL(`${name}.js`, ASSETS), "utf8");
  return import(`data:text/javascript,${encodeURIComponent(text)}`);
}

/** Numbers in 0..1 that are the same each time. */
export function random(seed = 1) {
  let state = seed;
  return () => {
    state = (state * 1664525 + 1013904223) % 4294967296;
    return state / 4294967296;
  };
}
