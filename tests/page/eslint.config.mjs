import js from "@eslint/js";

const names = (text) => Object.fromEntries(text.split(" ").map((name) => [name, "readonly"]));
const LANGUAGE = "Blob Buffer Response atob DecompressionStream TextDecoder URL URLSearchParams setTimeout console";
const PAGE = "window document location history innerWidth innerHeight scrollX scrollY requestAnimationFrame ResizeObserver createImageBitmap";

export default [
  { ignores: ["node_modules/**"] },
  js.configs.recommended,
  { languageOptions: { ecmaVersion: 2023, sourceType: "module", globals: names(`${LANGUAGE} ${PAGE}`) } },
];
