// Small pictures out of the sheets that the page holds.

export class Thumbnails {
  /** side: of a picture in pixels; columns: of a sheet; each: pictures of a sheet; images: which they are, or all. */
  constructor({ side, columns, each, sheets, images }) {
    Object.assign(this, { side, columns, each, sheets, place: null, pictures: [] });
    if (images) this.place = new Map([...images].map((image, place) => [image, place]));
  }

  /** Decode the sheets; one that cannot be is left out. */
  async load() {
    const decoded = (bytes) => createImageBitmap(new Blob([bytes])).catch(() => null);
    this.pictures = await Promise.all(this.sheets.map(decoded));
  }

  /** Draw an image's picture over a whole canvas; false if there is none. */
  draw(canvas, image) {
    const place = this.place ? this.place.get(image) : image;
    const sheet = this.pictures[Math.floor(place / this.each)];
    if (place === undefined || !sheet) return false;
    const within = place % this.each;
    const [left, top] = [(within % this.columns) * this.side, Math.floor(within / this.columns) * this.side];
    canvas.width = canvas.height = this.side;
    canvas.getContext("2d").drawImage(sheet, left, top, this.side, this.side, 0, 0, this.side, this.side);
    return true;
  }
}
