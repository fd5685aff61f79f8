// Line charts as inline SVG, with a cursor for mouse, touch and arrow keys.

import { h, setText, svg } from "./dom.js";

const HEIGHT = 220;
const MARGIN = { top: 12, right: 14, bottom: 26, left: 52 };

// Round numbers that cover low to high in about `wanted` steps.
function ticks(low, high, wanted) {
  const span = high - low || Math.abs(high) || 1;
  const raw = span / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index += 1) found.push(index * step);
  return found;
}

export class LineChart {
  // title, about: texts; x: {label, format, whole}; y: {format, tick}; from: highest beginning of the y axis, to: its end; dots: marks each point.
  constructor({ title, about, x, y, from, to, dots = false }) {
    Object.assign(this, { title, x, y, from, to, dots });
    this.series = [];
    this.cursor = null;
    this.legend = h("ul", { class: "legend" });
    this.plot = svg("svg", {
      class: "plot",
      height: HEIGHT,
      role: "img",
      tabindex: 0,
      onpointermove: (event) => this.point(event),
      onpointerleave: () => this.setCursor(null),
      onkeydown: (event) => this.key(event),
      onblur: () => this.setCursor(null),
    });
    this.reading = h("p", { class: "reading", role: "status" });
    this.empty = h("p", { class: "quiet chart-empty" }, "No samples yet.");
    this.element = h(
      "figure",
      { class: "chart" },
      h("figcaption", {}, h("h3", {}, title), h("p", { class: "quiet" }, about)),
      this.legend,
      this.empty,
      h("div", { class: "plot-frame" }, this.plot, this.reading),
    );
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  // series: [{name, points: [{x, y, label}]}], points in the order of x; a y of null is a gap.
  update(series) {
    this.series = series
      .map(({ name, points }) => ({ name, points: points.filter((point) => point.y !== null && point.y !== undefined) }))
      .filter(({ points }) => points.length > 0);
    const names = this.series.map(({ name }) => name);
    if (names.join("\n") !== this.names) {
      this.names = names.join("\n");
      const entries = names.length > 1 ? names.map((name, index) => h("li", { class: `series-${index % 8}` }, name)) : [];
      this.legend.replaceChildren(...entries);
    }
    this.empty.hidden = this.series.length > 0;
    this.plot.parentElement.hidden = this.series.length === 0;
    this.draw();
  }

  draw() {
    const width = this.plot.clientWidth;
    if (width === 0 || this.series.length === 0) return;
    const all = this.series.flatMap(({ points }) => points);
    const xs = [...new Set(all.map((point) => point.x))].sort((a, b) => a - b);
    const ys = all.map((point) => point.y);
    let low = Math.min(this.from ?? Infinity, ...ys);
    let high = Math.max(...ys);
    if (this.to !== undefined) high = this.to;
    if (high - low < 1e-12) high = low + (Math.abs(low) || 1);
    const marks = ticks(low, high, 4);
    const step = marks.length > 1 ? marks[1] - marks[0] : 1;
    low = Math.floor(low / step + 1e-9) * step;
    high = Math.ceil(high / step - 1e-9) * step;
    const [first, last] = [xs[0], xs.at(-1)];
    const innerWidth = width - MARGIN.left - MARGIN.right;
    const innerHeight = HEIGHT - MARGIN.top - MARGIN.bottom;
    this.xs = xs;
    this.scaleX = (x) => MARGIN.left + (last === first ? innerWidth / 2 : ((x - first) / (last - first)) * innerWidth);
    this.scaleY = (y) => MARGIN.top + (1 - (y - low) / (high - low)) * innerHeight;

    const grid = ticks(low, high, 4).flatMap((y) => [
      svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: this.scaleY(y), y2: this.scaleY(y) }),
      svg("text", { class: "tick end", x: MARGIN.left - 8, y: this.scaleY(y) + 4 }, this.y.tick(y)),
    ]);
    const xMarks = last === first ? [first] : ticks(first, last, Math.max(2, Math.floor(innerWidth / 110)));
    const axis = xMarks
      .filter((x) => !this.x.whole || Number.isInteger(x))
      .map((x) => svg("text", { class: `tick ${this.scaleX(x) > width - 30 ? "last" : "middle"}`, x: Math.min(this.scaleX(x), width - 2), y: HEIGHT - 8 }, this.x.format(x)));
    const lines = this.series.map(({ points }, index) =>
      svg(
        "g",
        { class: `series-${index % 8}` },
        svg("path", { class: "line", d: points.map((p, i) => `${i ? "L" : "M"}${this.scaleX(p.x)} ${this.scaleY(p.y)}`).join("") }),
        ...(this.dots || points.length === 1
          ? points.map((p) => svg("circle", { class: "dot", cx: this.scaleX(p.x), cy: this.scaleY(p.y), r: 2.5 }))
          : []),
      ),
    );
    this.hair = svg("g", { class: "hair" });
    this.plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.plot.setAttribute("aria-label", this.summary());
    const name = svg("text", { class: "tick end", x: MARGIN.left - 8, y: HEIGHT - 8 }, this.x.label.toLowerCase());
    this.plot.replaceChildren(name, ...grid, ...axis, ...lines, this.hair);
    this.drawCursor();
  }

  summary() {
    const newest = this.series.map(({ name, points }) => `${name} ${this.y.format(points.at(-1).y)}`);
    return `${this.title}. Newest: ${newest.join(", ")}. Arrow keys read earlier values.`;
  }

  point(event) {
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    const distance = (index) => Math.abs(this.scaleX(this.xs[index]) - x);
    this.setCursor(this.xs.reduce((best, _, index) => (distance(index) < distance(best) ? index : best), 0));
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") this.setCursor(null);
    if (move === undefined) return;
    event.preventDefault();
    this.setCursor(Math.min(this.xs.length - 1, Math.max(0, (this.cursor ?? this.xs.length) + move)));
  }

  setCursor(index) {
    this.cursor = index;
    this.drawCursor();
  }

  drawCursor() {
    if (this.cursor === null || this.cursor >= this.xs.length) {
      this.hair?.replaceChildren();
      setText(this.reading, "");
      return;
    }
    const x = this.xs[this.cursor];
    const found = this.series.map(({ name, points }, index) => ({ name, index, point: points.find((p) => p.x === x) }));
    const here = found.filter(({ point }) => point !== undefined);
    const at = this.scaleX(x);
    this.hair.replaceChildren(
      svg("line", { x1: at, x2: at, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }),
      ...here.map(({ index, point }) =>
        svg("circle", { class: `dot series-${index % 8}`, cx: at, cy: this.scaleY(point.y), r: 4 }),
      ),
    );
    const head = here[0]?.point.label ?? `${this.x.label} ${this.x.format(x)}`;
    const values = here.map(({ name, point }) =>
      this.series.length > 1 ? `${name} ${this.y.format(point.y)}` : this.y.format(point.y),
    );
    setText(this.reading, `${head}: ${values.join(" · ")}`);
  }
}
