// Figures with something to move. The page holds what each position of the slider shows, as JSON
// that the chapter's own cell has stored (teleport/book/interactive.py); here it is only drawn.
const WIDTH = 420, HEIGHT = 300;
const BOX = { left: 56, top: 12, width: 352, height: 240 };

function make(name, attributes = {}, ...parts) {
  const svg = ["svg", "path", "circle", "line", "text", "rect"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name)
                   : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...parts);
  return made;
}

// The points that are seen at a position, as pairs.
function seen(curve, position) {
  let [x, y] = [curve.x, curve.y];
  if (curve.shown === "own") [x, y] = [x[position], y[position]];
  const many = curve.shown === "first" ? curve.counts[position] : x.length;
  return x.slice(0, many).map((value, i) => [value, y[i]]);
}

class Axis {
  constructor(values, limits, log, length) {
    this.to = log ? Math.log10 : (value) => value;
    let [low, high] = limits || [Math.min(...values), Math.max(...values)];
    [low, high] = [this.to(low), this.to(high)];
    const air = limits ? 0 : 0.04 * (high - low || 1);
    Object.assign(this, { low: low - air, high: high + air, log, length });
  }
  at(value) { return this.length * (this.to(value) - this.low) / (this.high - this.low); }
  widen(span) {
    const middle = (this.low + this.high) / 2;
    [this.low, this.high] = [middle - span / 2, middle + span / 2];
  }
  ticks() {
    const span = this.high - this.low;
    if (this.log && span < 1.5) {
      const all = [1, 2, 5].flatMap((m) => [-2, -1, 0, 1, 2, 3].map((e) => m * 10 ** e));
      return all.filter((v) => this.to(v) >= this.low && this.to(v) <= this.high);
    }
    const rough = span / 5, power = 10 ** Math.floor(Math.log10(rough));
    let step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
    if (this.log) step = Math.max(1, Math.round(step));
    const found = [];
    for (let n = Math.ceil(this.low / step); n * step <= this.high; n++) found.push(n * step);
    return found.map((v) => (this.log ? 10 ** v : Number(v.toPrecision(6))));
  }
}

function label(value) {
  const big = value !== 0 && (Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3);
  return big ? value.toExponential(0).replace("+", "") : String(+value.toPrecision(4));
}

class PanelView {
  constructor(panel) {
    this.panel = panel;
    const all = panel.curves.flatMap((c) => (c.shown === "own" ? c.x : [0]).flatMap((_, i) =>
      seen({ ...c, shown: c.shown === "first" ? "all" : c.shown }, i)));
    this.x = new Axis(all.map((p) => p[0]), panel.xlim, panel.log.includes("x"), BOX.width);
    this.y = new Axis(all.map((p) => p[1]), panel.ylim, panel.log.includes("y"), BOX.height);
    if (panel.equal) {
      const unit = Math.max((this.x.high - this.x.low) / BOX.width, (this.y.high - this.y.low) / BOX.height);
      this.x.widen(unit * BOX.width);
      this.y.widen(unit * BOX.height);
    }
    const name = `${panel.title}: ${panel.y || panel.title} over ${panel.x}`;
    this.inner = make("svg", { x: BOX.left, y: BOX.top, width: BOX.width, height: BOX.height });
    this.svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": name },
      make("rect", { x: BOX.left, y: BOX.top, width: BOX.width, height: BOX.height, class: "frame" }),
      ...this.axes(), this.inner);
    this.element = make("div", { class: "panel" }, make("div", { class: "title" }, panel.title),
      this.svg, this.legend());
  }
  axes() {
    const bottom = BOX.top + BOX.height, parts = [];
    for (const v of this.x.ticks()) {
      const x = BOX.left + this.x.at(v);
      parts.push(make("line", { x1: x, x2: x, y1: bottom, y2: bottom + 4, class: "frame" }),
        make("text", { x, y: bottom + 17, "text-anchor": "middle" }, label(v)));
    }
    for (const v of this.y.ticks()) {
      const y = bottom - this.y.at(v);
      parts.push(make("line", { x1: BOX.left - 4, x2: BOX.left, y1: y, y2: y, class: "frame" }),
        make("text", { x: BOX.left - 7, y: y + 4, "text-anchor": "end" }, label(v)));
    }
    const middle = BOX.top + BOX.height / 2;
    parts.push(make("text", { x: BOX.left + BOX.width / 2, y: HEIGHT - 8, "text-anchor": "middle" }, this.panel.x),
      make("text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(12 ${middle}) rotate(-90)` }, this.panel.y));
    return parts;
  }
  legend() {
    const row = make("div", { class: "legend" });
    for (const c of this.panel.curves.filter((curve) => curve.name)) {
      const sample = c.style === "o" ? make("circle", { cx: 12, cy: 5, r: 3, class: `dot c${c.color}` })
        : make("path", { d: "M0 5H24", class: `line c${c.color}${c.style === "--" ? " dashed" : ""}` });
      row.append(make("span", {}, make("svg", { width: 26, height: 10, "aria-hidden": "true" }, sample), ` ${c.name}`));
    }
    return row;
  }
  draw(position) {
    const place = ([x, y]) => [this.x.at(x).toFixed(1), (BOX.height - this.y.at(y)).toFixed(1)];
    this.inner.replaceChildren(...this.panel.curves.flatMap((c) => {
      const points = seen(c, position).map(place), parts = [];
      if (c.style === "o") {
        parts.push(...points.map(([cx, cy]) => make("circle", { cx, cy, r: 3, class: `dot c${c.color}` })));
      } else if (points.length) {
        parts.push(make("path", { d: `M${points.map((p) => p.join(" ")).join("L")}`,
          class: `line c${c.color}${c.style === "--" ? " dashed" : ""}` }));
      }
      if (c.shown === "mark") {
        const [cx, cy] = points[position];
        parts.push(make("circle", { cx, cy, r: 6, class: `ring c${c.color}` }));
      }
      return parts;
    }));
  }
}

function show(root) {
  const data = JSON.parse(root.querySelector("script").textContent);
  const views = data.panels.map((panel) => new PanelView(panel)), last = data.positions.length - 1;
  const slider = make("input", { type: "range", min: 0, max: last, step: 1, value: data.at });
  const said = make("output", { "aria-live": "polite" }), play = make("button", { type: "button" }, "Play");
  let timer = 0;
  const move = () => {
    const i = Number(slider.value);
    views.forEach((view) => view.draw(i));
    slider.setAttribute("aria-valuetext", data.positions[i]);
    said.textContent = `${data.control} ${data.positions[i]}: ${data.says[i]}`;
  };
  const to = (i) => { slider.value = i; move(); };
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return to(Number(slider.value) < last ? last : 0);
    if (Number(slider.value) === last) to(0);
    play.textContent = "Stop";
    timer = setInterval(() => {
      to(Number(slider.value) + 1);
      if (Number(slider.value) === last) stop();
    }, Math.min(600, 6000 / last));
  });
  slider.addEventListener("input", () => { stop(); move(); });
  root.append(make("div", { class: "panels" }, ...views.map((view) => view.element)),
    make("div", { class: "controls" }, make("label", {}, data.control, slider), play), said);
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", `Figure to move: ${data.control}`);
  root.closest(".cell_output")?.querySelector("img")?.classList.add("still");
  move();
}

document.querySelectorAll(".interactive-figure").forEach(show);
