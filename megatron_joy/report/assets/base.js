"use strict";
// What the charts of a run report are made of: numbers as text, ticks, the shared horizontal axis, the tooltip.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG_NAMESPACE = document.querySelector("svg").namespaceURI;
const MARGIN = { left: 64, right: 16, top: 14, bottom: 28 };
const UNITS = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];

function svg(name, attributes, parent, text) {
  const node = document.createElementNS(SVG_NAMESPACE, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

function html(name, className, parent, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

// Numbers as people read them --------------------------------------------------------------------------------------
function significant(value, digits = 3) {
  if (value === 0) return "0";
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(value))));
  return value.toFixed(Math.min(decimals, 12));
}

function short(value) {
  for (const [size, unit] of UNITS) {
    if (Math.abs(value) >= size * 0.9995) return String(Number(significant(value / size))) + unit;
  }
  return String(Number(value.toPrecision(3)));
}

function general(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e5 ? String(Number(value.toPrecision(3))) : value.toExponential(2).replace(/\.?0+e/, "e");
}

function duration(seconds) {
  if (seconds < 60) return String(Number(seconds.toFixed(1))) + " s";
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return Math.floor(seconds / 60) + " min " + Math.round(seconds % 60) + " s";
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? hours + " h " + (minutes % 60) + " min" : Math.floor(hours / 24) + " d " + (hours % 24) + " h";
}

const FORMATS = {
  loss: { tick: (v) => String(Number(v.toPrecision(3))), full: (v) => v.toFixed(4) },
  general: { tick: general, full: (v) => (Math.abs(v) >= 1e-2 && Math.abs(v) < 1e5 ? significant(v, 4) : v.toExponential(3)) },
  count: { tick: short, full: (v) => short(v) },
  ratio: { tick: (v) => String(Number(v.toPrecision(3))) + "×", full: (v) => v.toFixed(2) + "×" },
};

// Ticks ------------------------------------------------------------------------------------------------------------
function linearTicks(low, high, wanted, bases = [1, 2, 5, 10]) {
  const raw = (high - low) / Math.max(1, wanted);
  if (!(raw > 0) || !isFinite(raw)) return [low];
  const power = Math.pow(10, Math.floor(Math.log10(raw)));
  const step = bases.map((m) => m * power).find((s) => s >= raw * 0.999);
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n <= Math.floor(high / step + 1e-9); n++) ticks.push(n * step + 0); // + 0: never minus zero
  return ticks;
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const factors = last - first > 4 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let d = first; d <= last; d++) {
    for (const m of factors) if (m * Math.pow(10, d) >= low && m * Math.pow(10, d) <= high) ticks.push(m * Math.pow(10, d));
  }
  return ticks;
}

const TIME_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];

function timeTicks(low, high, wanted) {
  const raw = (high - low) / Math.max(1, wanted);
  let step = TIME_STEPS.find((s) => s >= raw);
  if (!step) step = 86400 * Math.ceil(raw / 86400);
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) ticks.push(n * step);
  return ticks;
}

function timeTick(seconds) {
  if (seconds === 0) return "0";
  if (seconds % 86400 === 0) return seconds / 86400 + " d";
  if (seconds % 3600 === 0) return seconds / 3600 + " h";
  if (seconds >= 3600) return Math.floor(seconds / 3600) + ":" + String(Math.round((seconds % 3600) / 60)).padStart(2, "0") + " h";
  return seconds % 60 === 0 ? seconds / 60 + " min" : seconds < 60 ? seconds + " s" : duration(seconds);
}

// The horizontal axis: steps, tokens or time, and a window on it, shared by everything --------------------------------
const AXES = {
  step: { label: "step", ticks: (a, b, n) => linearTicks(a, b, Math.min(n, b - a)), tick: (v) => (v < 1e4 ? v.toLocaleString("en-US") : short(v)) },
  tokens: { label: "tokens", ticks: linearTicks, tick: short },
  time: { label: "time", ticks: timeTicks, tick: timeTick },
};
const ROWS = DATA.axes.rows;
const LAST_STEP = Math.max(1, ...ROWS.step.slice(-1), ...DATA.attempts.map((a) => a.end));

function interpolate(xs, ys, x) {
  if (!xs.length) return x;
  if (x <= xs[0]) return xs[0] > 0 ? (ys[0] * x) / xs[0] : ys[0];
  let low = 0, high = xs.length - 1;
  if (x >= xs[high]) {
    const before = Math.max(0, high - 1);
    const slope = xs[high] > xs[before] ? (ys[high] - ys[before]) / (xs[high] - xs[before]) : 0;
    return ys[high] + slope * (x - xs[high]);
  }
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle; else high = middle;
  }
  const share = xs[high] > xs[low] ? (x - xs[low]) / (xs[high] - xs[low]) : 0;
  return ys[low] + share * (ys[high] - ys[low]);
}

const view = {
  axis: "step", from: 0, to: LAST_STEP, smooth: false, hover: null, charts: [], listeners: [],
  // A step's place on the present axis, and back.
  place(step) { return this.axis === "step" ? step : Math.max(0, interpolate(ROWS.step, ROWS[this.axis], step)); },
  step(place) { return this.axis === "step" ? place : Math.max(0, interpolate(ROWS[this.axis], ROWS.step, place)); },
  get zoomed() { return this.from > 0 || this.to < LAST_STEP; },
  window() {
    let to = this.place(this.to);
    if (this.axis === "time" && !this.zoomed) to = Math.max(to, ...DATA.attempts.map((a) => a.end_time || 0));
    const from = this.from > 0 ? this.place(this.from) : 0;
    return [from, to > from ? to : from + 1];
  },
  zoom(from, to) {
    this.from = Math.max(0, Math.min(from, to));
    this.to = Math.min(LAST_STEP, Math.max(from, to));
    if (this.to - this.from < 2) { this.from = Math.max(0, this.from - 1); this.to = Math.min(LAST_STEP, this.from + 2); }
    this.draw();
  },
  draw() { for (const chart of this.charts) chart.draw(); for (const listener of this.listeners) listener(); },
  point(step) { this.hover = step; for (const chart of this.charts) chart.pointed(); for (const one of this.listeners) one(); },
};

const tooltip = html("div", "tooltip", document.body);

function showTooltip(event, title, rows) {
  tooltip.replaceChildren();
  html("div", "tooltip-title", tooltip, title);
  for (const [colour, label, value] of rows) {
    const row = html("div", "tooltip-row", tooltip);
    html("i", "swatch " + colour, row);
    html("span", "", row, label);
    html("b", "", row, value);
  }
  tooltip.classList.add("shown");
  const width = tooltip.offsetWidth, height = tooltip.offsetHeight;
  let left = event.clientX + 16, top = event.clientY + 16;
  if (left + width > innerWidth - 8) left = event.clientX - width - 16;
  if (top + height > innerHeight - 8) top = event.clientY - height - 16;
  tooltip.style.left = Math.max(8, left) + "px";
  tooltip.style.top = Math.max(8, top) + "px";
}

function hideTooltip() { tooltip.classList.remove("shown"); }

function nearest(xs, x) {
  if (!xs.length) return -1;
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle; else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

function describe(axis, index) {
  const when = axis.time[index] === null ? "" : " · " + duration(Math.max(0, axis.time[index]));
  const attempt = DATA.attempts.length > 1 ? " · attempt " + axis.attempt[index] : "";
  const tokens = axis.tokens[index] === null ? "" : " · " + short(axis.tokens[index]) + " tokens";
  return "Step " + axis.step[index].toLocaleString("en-US") + tokens + when + attempt;
}
