// One map on two canvases: its points, and above them what is pointed at.

import { fitted, pick, places, zoomed } from "./geometry.js";
import { paint } from "./paint.js";

export class Panel {
  /** figure: the element with the two canvases; maps: [{x, y}, ...], one for each seed. */
  constructor(figure, { maps }) {
    [this.canvas, this.over] = figure.querySelectorAll("canvas");
    this.figure = figure;
    this.maps = maps;
    this.number = 0;
    this.size = 0;
  }

  get map() {
    return this.maps[Math.min(this.number, this.maps.length - 1)];
  }

  /** Fit the canvases to their place in the page; true if that changed. */
  fit() {
    this.ratio = Math.min(window.devicePixelRatio || 1, 2);
    const size = Math.max(1, Math.round(this.canvas.clientWidth * this.ratio));
    if (size === this.size) return false;
    for (const one of [this.canvas, this.over]) one.width = one.height = size;
    this.size = size;
    this.image = this.canvas.getContext("2d").createImageData(size, size);
    this.pixels = new Uint32Array(this.image.data.buffer);
    this.least = fitted(size, 8 * this.ratio);
    this.look(this.least);
    return true;
  }

  look(view) {
    this.view = view;
    this.places = null;
  }

  zoom(factor, px, py) {
    this.look(zoomed(this.view, factor, px, py, this.least));
  }

  pan(dx, dy) {
    this.look({ ...this.view, left: this.view.left + dx, top: this.view.top + dy });
  }

  turn(number) {
    this.number = number;
    this.places = null;
  }

  draw(style) {
    this.places ??= places(this.map, this.view, this.size);
    const radius = Math.round((this.map.x.length > 15000 ? 0.5 : this.map.x.length > 3000 ? 1 : 2) * this.ratio);
    paint(this.pixels, this.size, this.places, { ...style, radius });
    this.canvas.getContext("2d").putImageData(this.image, 0, 0);
  }

  /** A pixel of a pointer's event. */
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * this.ratio, (event.clientY - box.top) * this.ratio];
  }

  /** The pixel as a place in the map's coordinates. */
  inMap([px, py]) {
    return [(px - this.view.left) / this.view.scale, (py - this.view.top) / this.view.scale];
  }

  pixelOf([x, y]) {
    return [x * this.view.scale + this.view.left, y * this.view.scale + this.view.top];
  }

  pick([px, py], shown) {
    return pick(this.map, this.view, shown, px, py, 10 * this.ratio);
  }

  /** Ring a point, draw lines to others, and outline a region. */
  mark({ point, others, region, ink }) {
    const pen = this.over.getContext("2d");
    pen.clearRect(0, 0, this.size, this.size);
    pen.strokeStyle = ink;
    const at = (i) => this.pixelOf([this.map.x[i], this.map.y[i]]);
    if (region) {
      pen.setLineDash([4 * this.ratio, 3 * this.ratio]);
      pen.lineWidth = this.ratio;
      pen.beginPath();
      for (const corner of region) pen.lineTo(...this.pixelOf(corner));
      pen.closePath();
      pen.stroke();
      pen.setLineDash([]);
    }
    if (point < 0) return;
    pen.lineWidth = this.ratio;
    for (const other of others) {
      pen.beginPath();
      pen.moveTo(...at(point));
      pen.lineTo(...at(other));
      pen.stroke();
    }
    pen.lineWidth = 2 * this.ratio;
    pen.beginPath();
    pen.arc(...at(point), 6 * this.ratio, 0, 2 * Math.PI);
    pen.stroke();
  }
}
