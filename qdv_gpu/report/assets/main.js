// The page comes alive: what the reader does changes `state`, and `refresh` shows it.

import { address, csv, facts, hits, kinds, listed, NOTHING, restored, shown } from "./choice.js";
import { built, unpack } from "./data.js";
import { inside, neighbors, step } from "./geometry.js";
import { pixel } from "./paint.js";
import { Panel } from "./panel.js";
import { Thumbnails } from "./thumbnails.js";

const GALLERY = 96; // pictures at most
const get = (id) => document.getElementById(id);

/** A new element with text. */
function make(name, text = "", parent = null) {
  const element = document.createElement(name);
  element.textContent = text;
  parent?.append(element);
  return element;
}

/** The maps, linked. */
export async function maps(text) {
  const model = built(await unpack(text));
  const pictures = model.thumbnails && new Thumbnails(model.thumbnails);
  const panels = [...document.querySelectorAll(".maps .panel")].map((figure, i) => new Panel(figure, model.panels[i]));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const state = restored(model, location.hash.slice(1));
  let [kept, selected, hovered, over, tool, drag, wanted, walked] = [null, null, -1, 0, "box", null, false, 0];

  const colours = (night) => {
    const own = night ? model.colours.dark : model.colours.light;
    const paper = night ? "#14171c" : "#ffffff";
    return { colours: own.map((one) => pixel(one)), faint: own.map((one) => pixel(one, paper, 0.16)), names: own, ink: night ? "#ffffff" : "#000000" };
  };
  let palette = colours(dark.matches);

  /** Draw once the browser is ready for it, however often it is asked for. */
  function draw() {
    if (wanted) return;
    wanted = true;
    requestAnimationFrame(() => {
      wanted = false;
      drawn();
    });
  }

  function drawn() {
    const style = { shown: kept, selected, groups: model.labels, ...palette };
    panels.forEach((panel) => panel.draw(style));
    mark();
  }

  const pointed = () => (hovered >= 0 ? hovered : state.point);

  function mark() {
    const point = pointed();
    const ink = palette.ink;
    panels.forEach((panel, i) => {
      const own = state.region?.panel === i && panel.map === panel.maps[state.region.map];
      const region = own ? state.region.polygon : null;
      const others = point < 0 ? [] : neighbors(panel.map, point, model.k);
      panel.mark({ point, others, region, ink });
    });
  }

  /** Filters, region and map have changed. */
  function choose({ list = true } = {}) {
    kept = shown(model, state);
    selected = state.region && inside(panels[state.region.panel].maps[state.region.map], state.region.polygon);
    const images = listed(kept, selected);
    const of = `of ${model.files.length.toLocaleString("en")} images`;
    const what = selected ? "selected" : images.length < model.files.length ? "shown" : "";
    get("count").textContent = what ? `${images.length.toLocaleString("en")} ${of} ${what}` : `all ${of.slice(3)}`;
    if (list) fill(images);
    draw();
  }

  function fill(images) {
    const gallery = get("gallery");
    gallery.replaceChildren();
    get("names").value = get("list").open ? images.map((i) => model.files[i]).join("\n") : "";
    for (const i of pictures ? images : []) {
      if (gallery.childElementCount === GALLERY) break;
      const canvas = document.createElement("canvas");
      if (!pictures.draw(canvas, i)) continue;
      const button = make("button", "", gallery);
      button.append(canvas);
      button.title = facts(model, i).map(([, value]) => value).join(" · ");
      button.setAttribute("aria-label", button.title);
      button.onclick = () => point(i);
    }
    const rest = images.length - gallery.childElementCount;
    get("more").textContent = pictures && rest ? `${gallery.childElementCount ? "and " : ""}${rest.toLocaleString("en")} more` : "";
  }

  function remember() {
    const said = address(state);
    history.replaceState(null, "", said ? `#${said}` : location.pathname + location.search);
  }

  /** Fix on an image. */
  function point(i) {
    state.point = i;
    hovered = -1;
    show();
    mark();
    get("said").textContent = i < 0 ? "" : [...facts(model, i), ...hits(model, i)].flat().join(", ");
    remember();
  }

  /** The card of the image that is pointed at. */
  function show(event = null) {
    const [card, i] = [get("card"), pointed()];
    card.hidden = i < 0;
    if (i < 0) return;
    get("picture").hidden = !pictures?.draw(get("picture"), i);
    const list = get("facts");
    list.replaceChildren();
    for (const [words, value] of [...facts(model, i), ...hits(model, i)]) {
      make("dt", words, list);
      make("dd", value, list);
    }
    if (!event) {
      const panel = panels[over];
      const box = panel.canvas.getBoundingClientRect();
      const [x, y] = panel.pixelOf([panel.map.x[i], panel.map.y[i]]);
      event = { clientX: box.left + x / panel.ratio, clientY: box.top + y / panel.ratio };
    }
    const [width, height] = [card.offsetWidth, card.offsetHeight];
    const left = event.clientX + 18 + width < innerWidth ? event.clientX + 18 : event.clientX - 18 - width;
    const [across, down] = [document.documentElement.clientWidth - width - 4, innerHeight - height - 4];
    card.style.left = `${Math.max(4, Math.min(left, across)) + scrollX}px`;
    card.style.top = `${Math.max(4, Math.min(event.clientY + 12, down)) + scrollY}px`;
  }

  function reset() {
    Object.assign(state, NOTHING, { map: state.map });
    hovered = -1;
    controls();
    show();
    get("said").textContent = "";
    changed();
  }

  function changed(options) {
    choose(options);
    remember();
  }

  // ---- the controls, which say what the state is ----

  function controls() {
    get("search").value = state.text;
    get("show").value = state.show;
    get("layer").value = state.panel;
    get("below").value = Math.min(state.below, 1.01);
    get("limit").textContent = state.below <= 1 ? state.below.toFixed(2) : "any";
    document.querySelectorAll("#classes button").forEach((button, i) => {
      button.setAttribute("aria-pressed", state.classes.includes(i));
      button.querySelector("i").style.background = palette.names[i];
    });
    if (get("map")) get("map").value = state.map + 1;
    if (get("seed")) get("seed").textContent = `map ${state.map + 1} of ${get("map").max}`;
  }

  /** Of the classes' buttons one at a time is a stop of the Tab key: of hundreds, one has to be passed. */
  function walk(number) {
    get("classes").children[walked].tabIndex = -1;
    get("classes").children[number].tabIndex = 0;
    walked = number;
  }

  function flip(number) {
    const classes = new Set(state.classes);
    if (!classes.delete(number)) classes.add(number);
    state.classes = [...classes].sort((a, b) => a - b);
    controls();
    changed();
  }

  function build() {
    for (const [value, words] of kinds(model)) make("option", words, get("show")).value = value;
    model.panels.forEach((panel, i) => {
      make("option", `${model.networks[panel.network].name} ${panel.layer}`, get("layer")).value = i;
    });
    model.classes.forEach((name, i) => {
      const button = make("button", "", get("classes"));
      make("i", "", button);
      make("span", name, button);
      button.title = name;
      button.tabIndex = i ? -1 : 0;
      button.onclick = () => flip(i);
      button.onfocus = () => walk(i);
    });
    get("classes").onkeydown = (event) => {
      const next = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!next) return;
      event.preventDefault();
      get("classes").children[walked + next]?.focus();
    };
    get("search").oninput = (event) => ((state.text = event.target.value), changed());
    get("show").onchange = (event) => ((state.show = event.target.value), changed());
    get("layer").onchange = (event) => ((state.panel = Number(event.target.value)), changed());
    get("below").oninput = (event) => ((state.below = Number(event.target.value)), controls(), changed());
    get("reset").onclick = reset;
    get("list").ontoggle = () => fill(listed(kept, selected));
    get("copy").onclick = () => {
      get("list").open = true;
      fill(listed(kept, selected));
      get("names").select();
      document.execCommand("copy"); // which works in a file, where navigator.clipboard may not
    };
    get("save").onclick = () => {
      const link = make("a");
      link.href = URL.createObjectURL(new Blob([csv(model, listed(kept, selected))], { type: "text/csv" }));
      link.download = "images.csv";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000); // a browser may read it later
    };
    document.querySelectorAll("[name=tool]").forEach((one) => {
      one.onchange = () => {
        tool = one.value;
        document.querySelector(".maps").dataset.tool = tool;
      };
    });
    if (get("map")) {
      get("map").oninput = (event) => {
        state.map = Number(event.target.value) - 1;
        panels.forEach((panel) => panel.turn(state.map));
        controls();
        changed();
        show();
      };
    }
    panels.forEach(listen);
  }

  // ---- a pointer in a panel ----

  function listen(panel, number) {
    const { canvas } = panel;
    const fingers = new Map();
    const between = ([[ax, ay], [bx, by]]) => [Math.hypot(ax - bx, ay - by), (ax + bx) / 2, (ay + by) / 2];
    const polygon = () => {
      const [[ax, ay], [bx, by]] = [drag.path[0], drag.path.at(-1)];
      return drag.kind === "lasso" ? drag.path : [[ax, ay], [bx, ay], [bx, by], [ax, by]];
    };
    canvas.onpointerdown = (event) => {
      if (event.button > 1) return;
      fingers.set(event.pointerId, panel.at(event));
      const kind = event.button === 1 ? "pan" : event.shiftKey ? "lasso" : tool;
      if (fingers.size === 2) return; // the second finger of two
      drag = { kind, from: panel.at(event), last: panel.at(event), path: [panel.inMap(panel.at(event))], moved: false };
      canvas.setPointerCapture(event.pointerId);
      over = number;
    };
    canvas.onpointermove = (event) => {
      const at = panel.at(event);
      if (!drag) {
        over = number;
        const found = panel.pick(at, kept);
        if (found !== hovered || found >= 0) {
          hovered = found;
          show(found >= 0 ? event : null);
          mark();
        }
        return;
      }
      const before = fingers.size === 2 && between([...fingers.values()]);
      fingers.set(event.pointerId, at);
      if (before && drag.kind === "pan") {
        const [apart, x, y] = between([...fingers.values()]);
        panel.pan(x - before[1], y - before[2]);
        panel.zoom(apart / before[0], x, y);
        drag.moved = true;
        draw();
        return;
      }
      drag.moved ||= Math.hypot(at[0] - drag.from[0], at[1] - drag.from[1]) > 3 * panel.ratio;
      if (!drag.moved) return;
      hovered = -1;
      if (drag.kind === "pan") {
        panel.pan(at[0] - drag.last[0], at[1] - drag.last[1]);
        draw();
      } else {
        drag.path.push(panel.inMap(at));
        state.region = { panel: number, map: panel.maps.indexOf(panel.map), polygon: polygon() };
        choose({ list: false });
      }
      drag.last = at;
    };
    canvas.onpointerup = (event) => {
      fingers.delete(event.pointerId);
      if (fingers.size) {
        drag.last = [...fingers.values()][0];
        return;
      }
      const { moved, kind } = drag ?? {};
      drag = null;
      if (moved && kind !== "pan") changed();
      if (moved === false) point(panel.pick(panel.at(event), kept));
    };
    canvas.onpointercancel = (event) => {
      fingers.delete(event.pointerId);
      if (drag?.moved) changed();
      drag = null;
    };
    canvas.onpointerleave = () => {
      hovered = -1;
      show();
      mark();
    };
    canvas.onfocus = () => (over = number);
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && tool !== "pan") return; // the page scrolls
      event.preventDefault();
      panel.zoom(Math.exp(-event.deltaY / 300), ...panel.at(event));
      draw();
    });
    canvas.ondblclick = () => {
      panel.look(panel.least);
      draw();
    };
  }

  const ARROWS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  document.addEventListener("keydown", (event) => {
    const { target } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || target.closest("dialog")) return;
    if (event.key !== "Escape" && target.matches("input:not([type=radio]), select, textarea")) return;
    const arrow = ARROWS[event.key];
    if (event.key === "Escape") reset();
    else if (model.labels && /^[1-9]$/.test(event.key) && Number(event.key) <= model.classes.length) flip(Number(event.key) - 1);
    else if (target === panels[over].canvas && (event.key === "+" || event.key === "-")) {
      panels[over].zoom(event.key === "+" ? 1.3 : 1 / 1.3, panels[over].size / 2, panels[over].size / 2);
      draw();
    } else if (arrow && target === panels[over].canvas) {
      const { map } = panels[over];
      const next = state.point < 0 ? kept.indexOf(1) : step(map, kept, state.point, ...arrow);
      if (next >= 0) point(next);
    } else return;
    event.preventDefault();
  });

  const resized = new ResizeObserver(() => {
    const sizes = panels.map((panel) => panel.fit());
    if (sizes.some(Boolean)) draw();
  });
  const turned = (night) => {
    palette = colours(night);
    controls();
    drawn();
  };
  dark.addEventListener("change", () => turned(dark.matches));
  window.addEventListener("beforeprint", () => turned(false)); // paper is white
  window.addEventListener("afterprint", () => turned(dark.matches));
  window.addEventListener("hashchange", () => {
    Object.assign(state, NOTHING, restored(model, location.hash.slice(1)));
    panels.forEach((panel) => panel.turn(state.map));
    controls();
    choose();
    show();
  });
  build();
  panels.forEach((panel) => {
    panel.fit();
    panel.turn(state.map);
    resized.observe(panel.canvas);
  });
  controls();
  choose();
  if (state.point >= 0) show();
  document.body.dataset.ready = "maps";
  await pictures?.load();
  if (pictures) choose();
  show();
  document.body.dataset.ready = "pictures";
}

/** Pictures grow on a click. */
export function enlarging() {
  const dialog = get("large");
  document.querySelectorAll(".picture").forEach((button) => {
    button.onclick = () => {
      dialog.querySelector("img").src = button.querySelector("img").src;
      dialog.querySelector("img").alt = button.querySelector("img").alt;
      dialog.showModal();
    };
  });
  dialog.onclick = () => dialog.close();
}

enlarging();
if (get("data")) {
  maps(get("data").textContent).catch((error) => {
    get("count").textContent = `The maps cannot be shown (${error.message}); the tables can.`;
    throw error;
  });
}
