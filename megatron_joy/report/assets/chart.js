"use strict";
// The frame that all charts share, and the line charts. Needs base.js.

// A frame with axes, zoom by dragging and a cross-hair; what is in it is up to the subclass ---------------------------
class Frame {
  constructor(plot, height) {
    this.plot = plot;
    this.height = height;
    this.drag = null;
    plot.replaceChildren();
    this.root = svg("svg", { class: "live", role: "img", "aria-label": plot.dataset.title }, plot);
    this.root.addEventListener("pointermove", (e) => this.moved(e));
    this.root.addEventListener("pointerleave", () => { if (!this.drag) { view.point(null); hideTooltip(); } });
    this.root.addEventListener("pointerdown", (e) => this.pressed(e));
    this.root.addEventListener("pointerup", (e) => this.released(e));
    this.root.addEventListener("pointercancel", () => { this.drag = null; this.draw(); });
    this.root.addEventListener("dblclick", () => view.zoom(0, LAST_STEP));
    // In the next frame: drawing changes the height, and an observer must not cause what it observes.
    const resized = () => { if (Math.abs(plot.clientWidth - this.width) > 1) this.draw(); };
    new ResizeObserver(() => requestAnimationFrame(resized)).observe(plot);
    view.charts.push(this);
  }

  begin(range) {
    this.width = Math.max(260, this.plot.clientWidth);
    [this.x0, this.x1] = view.window();
    this.inner = this.width - MARGIN.left - MARGIN.right;
    this.range = range;
    this.root.replaceChildren();
    this.root.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    const clip = svg("clipPath", { id: "clip-" + this.plot.id }, svg("defs", {}, this.root));
    const spill = this.spill || 0;
    svg("rect", { x: MARGIN.left - spill, y: 0, width: this.inner + 2 * spill, height: this.height }, clip);
    this.horizontalAxis();
    this.body = svg("g", { "clip-path": `url(#clip-${this.plot.id})` });
  }

  end() {
    this.root.appendChild(this.body);
    this.cursor = svg("g", {}, this.root);
    this.pointed();
  }

  x(place) { return MARGIN.left + ((place - this.x0) / (this.x1 - this.x0)) * this.inner; }
  place(event) {
    const box = this.root.getBoundingClientRect();
    const x = (event.clientX - box.left) * (this.width / box.width);
    return this.x0 + Math.min(1, Math.max(0, (x - MARGIN.left) / this.inner)) * (this.x1 - this.x0);
  }

  horizontalAxis() {
    const axis = AXES[view.axis], y = this.height - 8;
    for (const tick of axis.ticks(this.x0, this.x1, Math.floor(this.inner / 90))) {
      const x = this.x(tick);
      svg("line", { class: "grid faint", x1: x, x2: x, y1: MARGIN.top, y2: this.height - MARGIN.bottom }, this.root);
      svg("text", { class: "tick middle", x, y }, this.root, axis.tick(tick));
    }
    svg("text", { class: "axis-label end", x: MARGIN.left - 24, y }, this.root, axis.label);
  }

  pressed(event) {
    if (event.button !== 0) return;
    this.drag = { from: this.place(event) };
    this.root.setPointerCapture(event.pointerId);
  }

  released(event) {
    const drag = this.drag;
    this.drag = null;
    if (!drag) return;
    const to = this.place(event);
    if (Math.abs(this.x(to) - this.x(drag.from)) > 6) view.zoom(view.step(drag.from), view.step(to));
    else this.pointed();
  }

  moved(event) {
    const place = this.place(event);
    view.point(view.step(place));
    if (this.drag) {
      const a = this.x(this.drag.from), b = this.x(place);
      svg("rect", { class: "brush", x: Math.min(a, b), y: MARGIN.top, width: Math.abs(b - a), height: this.height - MARGIN.top - MARGIN.bottom }, this.cursor);
      hideTooltip();
    } else this.tell(event, place);
  }

  pointed() {
    if (!this.cursor) return;
    this.cursor.replaceChildren();
    if (view.hover === null) return;
    const x = this.x(view.place(view.hover));
    if (x < MARGIN.left - 1 || x > this.width - MARGIN.right + 1) return;
    svg("line", { class: "cross", x1: x, x2: x, y1: MARGIN.top - 4, y2: this.height - MARGIN.bottom }, this.cursor);
    this.dots();
  }

  restarts() {
    const faint = DATA.attempts.length > 20 ? " many" : "";
    let before = -Infinity;
    for (const attempt of DATA.attempts.slice(1)) {
      const x = this.x(view.axis === "time" ? attempt.start_time : view.place(attempt.start));
      if (x - before < 3) continue;
      before = x;
      svg("line", { class: "restart" + faint, x1: x, x2: x, y1: MARGIN.top, y2: this.height - MARGIN.bottom }, this.body);
    }
  }

  dots() {}
  tell() {}
}

// Lines --------------------------------------------------------------------------------------------------------------
class LineChart extends Frame {
  constructor(panel, spec) {
    super(panel.querySelector(".plot"), spec.wide ? 340 : 240);
    this.spec = spec;
    this.lines = spec.lines.filter((line) => DATA.series[line.key]).map((line) => {
      const series = DATA.series[line.key];
      return { ...line, ...series, x: DATA.axes[series.axis], shown: true };
    });
    this.log = spec.log;
    this.legend(panel.querySelector(".legend"));
    this.logButton(panel.querySelector(".panel-tools"));
    this.draw();
  }

  legend(box) {
    box.replaceChildren();
    for (const line of this.lines) {
      const button = html("button", "legend-item", box);
      button.type = "button";
      button.title = "Click to hide or show";
      html("i", "swatch " + line.colour + (line.points ? " dotted" : ""), button);
      html("span", "", button, line.label);
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        line.shown = !line.shown;
        button.setAttribute("aria-pressed", String(line.shown));
        this.draw();
      });
    }
  }

  logButton(box) {
    const button = html("button", "tool", box, "Log scale");
    button.type = "button";
    button.setAttribute("aria-pressed", String(this.log));
    button.addEventListener("click", () => {
      this.log = !this.log;
      button.setAttribute("aria-pressed", String(this.log));
      this.draw();
    });
  }

  draw() {
    this.begin();
    const columns = this.lines.filter((line) => line.shown).map((line) => this.columns(line));
    this.vertical(columns);
    this.restarts();
    for (const column of columns) this.line(column);
    for (const reference of this.spec.references) this.reference(reference);
    if (this.spec.id === "loss") this.broken();
    this.end();
  }

  // The visible points of a line; where there are more than pixels, mean, low and high of each pixel's points.
  columns(line) {
    const xs = line.x[view.axis], good = (v) => v !== null && (!this.log || v > 0);
    let first = nearest(xs, this.x0), last = nearest(xs, this.x1);
    first = Math.max(0, first - 1); last = Math.min(xs.length - 1, last + 1);
    const per = Math.max(1, Math.floor((last - first + 1) / this.inner));
    const out = { line, x: [], mean: [], low: [], high: [], smooth: null };
    for (let i = first, stop; i >= 0 && i <= last; i = stop) {
      let sum = 0, n = 0, low = Infinity, high = -Infinity;
      stop = Math.min(i + per, last + 1);
      // On the time axis nothing happened between two attempts, and no line says otherwise.
      if (view.axis === "time") {
        const attempt = line.x.attempt;
        for (let j = i + 1; j < stop; j++) if (attempt[j] !== attempt[i]) { stop = j; break; }
        if (i > first && attempt[i] !== attempt[i - 1]) { out.x.push(xs[i]); out.mean.push(null); out.low.push(null); out.high.push(null); }
      }
      for (let j = i; j < stop; j++) {
        if (!good(line.mean[j])) continue;
        sum += line.mean[j]; n++;
        const bottom = line.low ? line.low[j] : line.mean[j];
        low = Math.min(low, this.log && bottom <= 0 ? line.mean[j] : bottom);
        high = Math.max(high, line.high ? line.high[j] : line.mean[j]);
      }
      out.x.push(xs[stop - 1]);
      out.mean.push(n ? sum / n : null); out.low.push(n ? low : null); out.high.push(n ? high : null);
    }
    if (view.smooth && !line.points) out.smooth = smoothed(out.mean);
    return out;
  }

  vertical(columns) {
    let low = Infinity, high = -Infinity;
    for (const c of columns) {
      for (const v of c.low) if (v !== null) low = Math.min(low, v);
      for (const v of c.high) if (v !== null) high = Math.max(high, v);
    }
    // The whole run is seen with its references; a part of it needs the height for itself.
    for (const r of view.zoomed ? [] : this.spec.references) {
      if (!this.log || r.value > 0) { low = Math.min(low, r.value); high = Math.max(high, r.value); }
    }
    if (low > high) { low = this.log ? 0.1 : 0; high = 1; }
    if (this.log) {
      if (high / low < 1.2) { low /= 1.1; high *= 1.1; }
      this.bottom = Math.log(low) - 0.02 * Math.log(high / low); this.top = Math.log(high) + 0.02 * Math.log(high / low);
    } else {
      if (this.spec.zero) low = Math.min(0, low);
      const pad = (high - low) * 0.04 || Math.abs(high) * 0.1 || 1;
      this.bottom = this.spec.zero && low === 0 ? 0 : low - pad; this.top = high + pad;
    }
    const lines = Math.floor(this.height / 48);
    let ticks = this.log ? logTicks(Math.exp(this.bottom), Math.exp(this.top)) : linearTicks(this.bottom, this.top, lines);
    if (this.log && ticks.length < 3) ticks = linearTicks(Math.exp(this.bottom), Math.exp(this.top), lines).filter((t) => t > 0);
    const format = FORMATS[this.spec.unit].tick;
    for (const tick of ticks) {
      const y = this.y(tick);
      svg("line", { class: "grid", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: y, y2: y }, this.root);
      svg("text", { class: "tick end", x: MARGIN.left - 8, y: y + 4 }, this.root, format(tick));
    }
  }

  y(value) {
    const at = this.log ? Math.log(value) : value;
    return MARGIN.top + ((this.top - at) / (this.top - this.bottom)) * (this.height - MARGIN.top - MARGIN.bottom);
  }

  path(xs, ys) {
    let d = "", pen = "M";
    for (let i = 0; i < xs.length; i++) {
      if (ys[i] === null) { pen = "M"; continue; }
      d += pen + this.x(xs[i]).toFixed(1) + " " + this.y(ys[i]).toFixed(1);
      pen = "L";
    }
    return d;
  }

  line(column) {
    const { line, x, mean, low, high, smooth } = column;
    if (low.some((v, i) => v !== null && high[i] > v)) {
      for (const [from, to] of runs(mean)) {
        const there = this.path(x.slice(from, to), high.slice(from, to));
        const back = this.path(x.slice(from, to).reverse(), low.slice(from, to).reverse());
        svg("path", { class: "band " + line.colour, d: there + back.replace("M", "L") + "Z" }, this.body);
      }
    }
    svg("path", { class: "line " + line.colour + (smooth ? " raw" : ""), d: this.path(x, mean) }, this.body);
    if (smooth) svg("path", { class: "line " + line.colour, d: this.path(x, smooth) }, this.body);
    for (const [from, to] of runs(mean)) {
      // A single point between gaps has no line to be seen by.
      if (to - from === 1 || (line.points && x.length <= 80)) {
        for (let i = from; i < to; i++) svg("circle", { class: "point " + line.colour, cx: this.x(x[i]), cy: this.y(mean[i]), r: 3 }, this.body);
      }
    }
  }

  reference({ value, label }) {
    const y = this.log && value <= 0 ? -1 : this.y(value);
    if (y < MARGIN.top || y > this.height - MARGIN.bottom) return;
    svg("line", { class: "reference", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: y, y2: y }, this.body);
    svg("text", { class: "reference-label", x: this.width - MARGIN.right, y: y < 30 ? y + 14 : y - 5 }, this.body, label);
  }

  broken() {
    for (const step of DATA.nonfinite) {
      const x = this.x(view.place(step)), y = this.height - MARGIN.bottom;
      svg("path", { class: "broken", d: `M${x - 4} ${y - 9}l8 8m0 -8l-8 8` }, this.body);
    }
  }

  visible() { return this.lines.filter((line) => line.shown); }

  dots() {
    for (const line of this.visible()) {
      const i = nearest(line.x.step, view.hover);
      if (i < 0 || line.mean[i] === null || (this.log && line.mean[i] <= 0)) continue;
      svg("circle", { class: "dot " + line.colour, cx: this.x(line.x[view.axis][i]), cy: this.y(line.mean[i]), r: 4 }, this.cursor);
    }
  }

  tell(event, place) {
    const full = FORMATS[this.spec.unit].full, axis = this.lines.length ? this.lines[0].x : ROWS;
    const index = nearest(axis[view.axis], place);
    if (index < 0) return;
    const rows = this.visible().map((line) => {
      const i = nearest(line.x[view.axis], place), value = line.mean[i];
      if (value === null || value === undefined) return [line.colour, line.label, "not a number"];
      const wide = line.low && line.low[i] !== line.high[i];
      const at = line.x.step[i] !== axis.step[index] ? " at " + line.x.step[i].toLocaleString("en-US") : "";
      return [line.colour, line.label, full(value) + (wide ? ` (${full(line.low[i])} to ${full(line.high[i])})` : "") + at];
    });
    const bucket = axis === ROWS && DATA.rows_per_point > 1 ? ` (mean of about ${DATA.rows_per_point} steps)` : "";
    showTooltip(event, describe(axis, index) + bucket, rows);
  }
}

// Runs of numbers between gaps, as [from, to).
function runs(values) {
  const out = [];
  let from = -1;
  for (let i = 0; i <= values.length; i++) {
    const good = i < values.length && values[i] !== null;
    if (good && from < 0) from = i;
    if (!good && from >= 0) { out.push([from, i]); from = -1; }
  }
  return out;
}

// Mean over a centred window, which unlike an exponential one does not lag; it narrows towards the ends, so that the
// first and last values stay where they are. Twice, for a rounder window.
function smoothed(values) {
  let present = values;
  for (let round = 0; round < 2; round++) {
    const sum = [0], count = [0];
    present.forEach((v, i) => { sum.push(sum[i] + (v === null ? 0 : v)); count.push(count[i] + (v === null ? 0 : 1)); });
    present = present.map((value, i) => {
      const half = Math.min(Math.max(3, Math.round(values.length / 60)), i, values.length - 1 - i);
      return value === null ? null : (sum[i + half + 1] - sum[i - half]) / (count[i + half + 1] - count[i - half]);
    });
  }
  return present;
}
