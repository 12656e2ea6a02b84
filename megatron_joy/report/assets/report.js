"use strict";
// The page: timeline, data composition, heat maps, tool bar. Needs base.js and chart.js.

// Attempts as bars, checkpoints and events as marks, on the axis of the charts ---------------------------------------
const ENDS = { finished: "✓", stopped: "■", failed: "!", killed: "✕", running: "▸" };
const LANE = 22;
const ATTEMPT_LANE = Math.min(LANE, Math.max(5, 264 / DATA.attempts.length)); // many attempts share the height of twelve

class Timeline extends Frame {
  constructor(panel) {
    const lanes = (DATA.checkpoints.length ? 1 : 0) + (DATA.events.length ? 1 : 0);
    super(panel.querySelector(".plot"), MARGIN.top + DATA.attempts.length * ATTEMPT_LANE + lanes * LANE + MARGIN.bottom + 6);
    this.spill = 7; // marks of the first and last step are as whole as the others
    this.draw();
  }

  at(step, time) { return this.x(view.axis === "time" && time !== null ? time : view.place(step)); }

  lane(attempts, marks, label) {
    const y = MARGIN.top + attempts * ATTEMPT_LANE + marks * LANE;
    if (label) svg("text", { class: "tick end", x: MARGIN.left - 8, y: y + 13 }, this.root, label);
    return y;
  }

  draw() {
    this.begin();
    this.marks = [];
    const count = DATA.attempts.length, every = Math.ceil(16 / ATTEMPT_LANE);
    DATA.attempts.forEach((attempt, i) => {
      const labelled = i % every === 0 && (i === 0 || (count - i) * ATTEMPT_LANE > 14);
      this.attempt(attempt, this.lane(i, 0, labelled ? "attempt " + attempt.number : ""));
    });
    let lane = 0;
    if (DATA.checkpoints.length) this.checkpoints(this.lane(count, lane++, "saved"));
    if (DATA.events.length) this.events(this.lane(count, lane, "events"));
    this.end();
  }

  attempt(attempt, y) {
    const from = Math.max(MARGIN.left, this.at(attempt.start, attempt.start_time)), to = Math.max(from + 2, this.at(attempt.end, attempt.end_time));
    // In time, lost steps are the last part of the bar: as large a share of it as of its steps.
    const lost = (attempt.end - attempt.kept) / Math.max(1, attempt.end - attempt.start);
    const kept = view.axis === "time" ? to - (to - from) * lost : Math.max(from, this.at(attempt.kept, null));
    const roomy = ATTEMPT_LANE > 14, top = y + (roomy ? 3 : 1), height = ATTEMPT_LANE - (roomy ? 9 : 1);
    svg("rect", { class: "bar", x: from, y: top, width: Math.max(1, kept - from), height, rx: roomy ? 2 : 0 }, this.body);
    if (to > kept + 0.5 && attempt.end > attempt.kept) svg("rect", { class: "bar lost", x: kept, y: top, width: to - kept, height }, this.body);
    const inside = to > this.width - MARGIN.right - 14;
    const at = { class: "end-mark " + attempt.outcome + (inside ? " inside" : ""), x: inside ? to - 5 : to + 4, y: y + 14 };
    if (roomy) svg("text", at, this.body, ENDS[attempt.outcome]);
    const again = attempt.end - attempt.kept ? `, ${(attempt.end - attempt.kept).toLocaleString("en-US")} of them run again` : "";
    this.marks.push({ x: from, to, y, height: ATTEMPT_LANE, title: `Attempt ${attempt.number}: ${attempt.outcome}`, rows: [["", "steps", `${attempt.start.toLocaleString("en-US")} to ${attempt.end.toLocaleString("en-US")}${again}`], ["", "lasted", duration(Math.max(0, attempt.end_time - attempt.start_time))]] });
  }

  checkpoints(y) {
    for (const one of DATA.checkpoints) {
      const x = this.at(one.step, one.time);
      svg("path", { class: "saved " + one.state, d: `M${x} ${y + 4}l5 6l-5 6l-5 -6Z` }, this.body);
      const state = { whole: "on disk, whole", incomplete: "on disk, not committed", removed: "written, since removed" }[one.state];
      this.marks.push({ x: x - 5, to: x + 5, y, title: `Checkpoint of step ${one.step.toLocaleString("en-US")}`, rows: [["", "state", state]] });
    }
  }

  events(y) {
    for (const event of DATA.events) {
      const x = this.at(event.step, event.time);
      svg("circle", { class: "event " + event.kind, cx: x, cy: y + 10, r: 4 }, this.body);
      this.marks.push({ x: x - 5, to: x + 5, y, title: `${event.kind} at step ${event.step.toLocaleString("en-US")}`, rows: [["", event.message, ""]] });
    }
  }

  tell(event) {
    const box = this.root.getBoundingClientRect();
    const x = (event.clientX - box.left) * (this.width / box.width), y = (event.clientY - box.top) * (this.width / box.width);
    const here = this.marks.filter((m) => x >= m.x - 2 && x <= m.to + 2 && y >= m.y && y < m.y + (m.height || LANE));
    if (!here.length) return hideTooltip();
    const middle = (m) => Math.abs((m.x + m.to) / 2 - x);
    const mark = here.reduce((a, b) => (middle(b) < middle(a) ? b : a));
    showTooltip(event, mark.title, mark.rows);
  }
}

// Data composition: stacked shares -------------------------------------------------------------------------------------
class Composition extends Frame {
  constructor(panel) {
    super(panel.querySelector(".plot"), 240);
    this.source = DATA.sources;
    this.draw();
  }

  draw() {
    this.begin();
    const { edges, share, names } = this.source, inner = this.height - MARGIN.top - MARGIN.bottom;
    const y = (v) => MARGIN.top + (1 - v) * inner, below = new Array(edges.length - 1).fill(0);
    share.forEach((values, s) => {
      let top = "", bottom = "";
      values.forEach((value, i) => {
        const a = this.x(view.place(edges[i] - 1)).toFixed(1), b = this.x(view.place(edges[i + 1] - 1)).toFixed(1);
        const low = below[i], high = low + (value || 0);
        top += `L${a} ${y(high).toFixed(1)}L${b} ${y(high).toFixed(1)}`;
        bottom = `L${b} ${y(low).toFixed(1)}L${a} ${y(low).toFixed(1)}` + bottom;
        below[i] = high;
      });
      svg("path", { class: "area c" + (s + 1), d: "M" + top.slice(1) + bottom + "Z" }, this.body);
    });
    for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
      svg("text", { class: "tick end", x: MARGIN.left - 8, y: y(tick) + 4 }, this.root, tick * 100 + "%");
    }
    this.restarts();
    this.end();
    this.names = names;
  }

  tell(event, place) {
    const { edges, share, names } = this.source, step = Math.max(edges[0], Math.ceil(view.step(place)));
    let bucket = edges.findIndex((edge) => edge > step) - 1;
    if (bucket < 0) bucket = edges.length - 2;
    const last = edges[bucket + 1] - 1, from = edges[bucket].toLocaleString("en-US");
    const title = last > edges[bucket] ? `Steps ${from} to ${last.toLocaleString("en-US")}` : `Step ${from}`;
    showTooltip(event, title, names.map((name, s) => ["c" + (s + 1), name, ((share[s][bucket] || 0) * 100).toFixed(1) + "%"]).reverse());
  }
}

// Heat maps: the pictures are there already; this adds values under the pointer and follows the zoom ------------------
class Heat {
  constructor(figure) {
    this.image = figure.querySelector("img");
    this.frame = figure.querySelector(".heat-frame");
    this.layer = figure.dataset.layer === undefined ? null : Number(figure.dataset.layer);
    this.ends = figure.querySelectorAll(".heat-x span");
    this.cross = html("div", "heat-cross", this.frame);
    this.frame.addEventListener("pointermove", (e) => this.moved(e));
    this.frame.addEventListener("pointerleave", () => { hideTooltip(); if (this.layer !== null) view.point(null); });
    if (this.layer !== null) view.listeners.push(() => this.follow());
  }

  codes() {
    if (this.pixels === undefined) {
      const canvas = html("canvas");
      canvas.width = this.image.naturalWidth; canvas.height = this.image.naturalHeight;
      const context = canvas.getContext("2d");
      context.drawImage(this.image, 0, 0);
      this.pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    }
    return this.pixels;
  }

  ratio(column, row) {
    const { data, width } = this.codes(), at = 4 * (row * width + column);
    const code = Heat.colours.get((data[at] << 16) | (data[at + 1] << 8) | data[at + 2]);
    if (code === undefined) return "";
    if (code === 0) return "dead (under 0.01×)";
    const { octaves } = DATA.load, value = Math.pow(2, ((code - 1) / 254) * 2 * octaves - octaves);
    const edge = code === 1 ? "at most " : code === 255 ? "at least " : "";
    return edge + value.toFixed(2) + "× its fair share";
  }

  moved(event) {
    const box = this.image.getBoundingClientRect();
    const across = Math.min(0.9999, Math.max(0, (event.clientX - box.left) / box.width));
    const row = Math.floor(Math.min(0.9999, Math.max(0, (event.clientY - box.top) / box.height)) * this.image.naturalHeight);
    const column = Math.floor(across * this.image.naturalWidth), { edges, layers, tail_ratio } = DATA.load;
    if (this.layer === null) {
      showTooltip(event, `Layer ${layers[row]}, expert ${column}`, [["", "load", tail_ratio[row][column].toFixed(2) + "× its fair share"]]);
      return;
    }
    const first = edges[column], last = edges[column + 1] - 1;
    view.point(edges[0] + across * (last >= 0 ? edges[edges.length - 1] - edges[0] : 0));
    const steps = last > first ? `steps ${first.toLocaleString("en-US")} to ${last.toLocaleString("en-US")}` : `step ${first.toLocaleString("en-US")}`;
    showTooltip(event, `Layer ${layers[this.layer]}, expert ${row}, ${steps}`, [["", "load", this.ratio(column, row)]]);
  }

  follow() {
    const { edges } = DATA.load, first = edges[0], span = edges[edges.length - 1] - first;
    const from = Math.max(first, view.from), to = Math.max(from + 1, view.to + 1);
    this.image.style.width = (span / (to - from)) * 100 + "%";
    this.image.style.left = (-(from - first) / (to - from)) * 100 + "%";
    this.ends[0].textContent = "step " + Math.round(from).toLocaleString("en-US");
    this.ends[1].textContent = Math.round(to - 1).toLocaleString("en-US");
    const x = view.hover === null ? -1 : (view.hover - from) / (to - from);
    this.cross.style.display = x >= 0 && x <= 1 ? "block" : "none";
    this.cross.style.left = x * 100 + "%";
  }
}

// The tool bar ----------------------------------------------------------------------------------------------------------
function toolbar() {
  const choices = document.querySelectorAll("[data-axis]");
  for (const button of choices) {
    button.addEventListener("click", () => {
      view.axis = button.dataset.axis;
      for (const other of choices) other.setAttribute("aria-pressed", String(other === button));
      view.draw();
    });
    if (ROWS[button.dataset.axis].every((v) => v === null)) button.disabled = true;
  }
  const smooth = document.getElementById("smooth"), reset = document.getElementById("reset");
  smooth.addEventListener("click", () => {
    view.smooth = !view.smooth;
    smooth.setAttribute("aria-pressed", String(view.smooth));
    view.draw();
  });
  reset.addEventListener("click", () => view.zoom(0, LAST_STEP));
  const range = document.getElementById("range");
  view.listeners.push(() => {
    reset.disabled = !view.zoomed;
    const ends = [view.from, view.to].map((v) => Math.round(v).toLocaleString("en-US"));
    range.textContent = view.zoomed ? `Steps ${ends[0]} to ${ends[1]}` : "Drag across a chart to zoom in";
  });
}

function begin() {
  if (!ROWS.step.length) return;
  document.documentElement.classList.remove("no-script");
  if (DATA.load) Heat.colours = new Map(DATA.load.palette.map((c, i) => [parseInt(c.slice(1), 16), i]));
  for (const spec of DATA.charts) {
    const panel = document.getElementById(spec.id);
    if (panel) new LineChart(panel, spec);
  }
  const timeline = document.getElementById("timeline"), composition = document.getElementById("composition");
  if (timeline) new Timeline(timeline);
  if (composition) new Composition(composition);
  if (DATA.load) for (const figure of document.querySelectorAll("figure.heat")) new Heat(figure);
  toolbar();
  for (const listener of view.listeners) listener();
  addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && view.zoomed) view.zoom(0, LAST_STEP); });
}

begin();
