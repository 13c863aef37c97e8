"use strict";
// Every text of the run reaches the page as a text node: nothing here parses markup.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  Object.assign(made, properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function figure(value, digits = 4) {
  if (value === null) return "–";
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits }).replace("-", "−");
}

// Theme and runs ------------------------------------------------------------------------------------------------------

const THEMES = { "light dark": "Theme: as the system", light: "Theme: light", dark: "Theme: dark" };

find("theme").addEventListener("click", (event) => {
  const names = Object.keys(THEMES);
  const now = document.documentElement.style.colorScheme || names[0];
  const next = names[(names.indexOf(now) + 1) % names.length];
  document.documentElement.style.colorScheme = next;
  event.target.textContent = THEMES[next];
});

const isShown = (run) => !document.body.classList.contains(`hide-run${run}`);

document.querySelectorAll("input[data-run]").forEach((box) => {
  const show = () => document.body.classList.toggle(`hide-run${box.dataset.run}`, !box.checked);
  box.addEventListener("change", show);
  show();  // A browser may remember what was ticked.
});

// Crosshairs ----------------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function nearest(values, wanted) {
  let best = 0;
  for (let index = 1; index < values.length; index++)
    if (Math.abs(values[index] - wanted) < Math.abs(values[best] - wanted)) best = index;
  return best;
}

class Crosshair {
  constructor(home, chart) {
    this.chart = chart;
    this.readout = home.querySelector(".readout");
    this.svg = home.querySelector(".plot svg");
    this.marks = chart.panels.map(() => this.svg.appendChild(document.createElementNS(SVG, "path")));
    this.marks.forEach((mark) => mark.setAttribute("class", "cross"));
    const plot = home.querySelector(".plot");
    plot.addEventListener("pointermove", (event) => this.point(event));
    plot.addEventListener("pointerdown", (event) => this.point(event));
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") this.clear(); });
    document.addEventListener("pointerdown", (event) => { if (!plot.contains(event.target)) this.clear(); });
    plot.addEventListener("blur", () => this.clear());
    plot.addEventListener("keydown", (event) => this.key(event));
    const all = chart.panels.flatMap((panel) => panel.lines.flatMap((line) => (chart.path ? line.steps : line.x)));
    this.stops = [...new Set(all)].sort((a, b) => a - b);
    this.stop = this.stops.length;
  }

  clear() {
    this.readout.replaceChildren();
    this.marks.forEach((mark) => mark.removeAttribute("d"));
  }

  point(event) {
    const place = this.svg.getBoundingClientRect();
    const scale = this.svg.viewBox.baseVal.width / place.width;
    const [x, y] = [(event.clientX - place.left) * scale, (event.clientY - place.top) * scale];
    const [left, , right] = this.chart.panels[0].box;
    const [low, high] = this.chart.panels[0].x;
    if (this.chart.path) this.showPoint(x, y);
    else this.showStep(low + ((x - left) / (right - left)) * (high - low));
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -this.stops.length, End: this.stops.length };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.stop = Math.min(this.stops.length - 1, Math.max(0, this.stop + moves[event.key]));
    this.showStep(this.stops[this.stop]);
  }

  at(panel, x, y) {
    const [left, top, right, bottom] = panel.box;
    return [
      left + ((x - panel.x[0]) / (panel.x[1] - panel.x[0])) * (right - left),
      bottom - ((y - panel.y[0]) / (panel.y[1] - panel.y[0])) * (bottom - top),
    ];
  }

  showStep(wanted) {
    const step = this.stops[nearest(this.stops, wanted)];
    const parts = [element("b", {}, `step ${figure(step, 6)}`)];
    this.chart.panels.forEach((panel, index) => {
      let x = step;
      for (const line of panel.lines.filter((line) => isShown(line.run))) {
        const at = nearest(this.chart.path ? line.steps : line.x, step);
        if (this.chart.path) x = line.x[at];
        const where = this.chart.panels.length > 1 ? `${panel.label}, ` : "";
        parts.push(this.said(line, `${where}${line.name} ${figure(line.y[at])}`
          + (this.chart.path ? ` at KL ${figure(line.x[at])}` : "")));
      }
      const [place] = this.at(panel, x, panel.y[0]);
      this.marks[index].setAttribute("d", `M ${place} ${panel.box[1]} V ${panel.box[3]}`);
    });
    this.readout.replaceChildren(...parts.flatMap((part) => [part, " "]));
  }

  showPoint(x, y) {
    let best = null;
    for (const panel of this.chart.panels)
      for (const line of panel.lines.filter((line) => isShown(line.run)))
        line.x.forEach((value, index) => {
          const [left, top] = this.at(panel, value, line.y[index]);
          const distance = Math.hypot(left - x, top - y);
          if (!best || distance < best.distance) best = { distance, line, index, left, top };
        });
    if (!best) return;
    const { line, index, left, top } = best;
    this.marks[0].setAttribute("d", `M ${left - 5} ${top} h 10 M ${left} ${top - 5} v 10`);
    const text = `${line.name} ${figure(line.y[index])} at KL ${figure(line.x[index])}`;
    this.readout.replaceChildren(element("b", {}, `step ${figure(line.steps[index], 6)}`), " ", this.said(line, text));
  }

  said(line, text) {
    const swatch = element("i", { className: "swatch" });
    swatch.style.cssText = `display: inline-block; vertical-align: middle; color: var(--c${line.colour})`;
    const run = data.runs.length > 1 ? `run ${line.run + 1}: ` : "";
    return element("span", {}, swatch, ` ${run}${text}`);
  }
}

for (const [key, chart] of Object.entries(data.charts))
  if (chart.panels.some((panel) => panel.lines.length)) new Crosshair(find(`chart-${key}`), chart);

// Completions ---------------------------------------------------------------------------------------------------------

const { texts, rows } = data.completions;
const SOURCES = ["held-out prompts", "training"];
const PAGE = 20;
const text = (place) => (place === null ? null : texts[place]);
const gap = (row) =>
  rows.reward[row] === null || rows.greedyReward[row] === null ? null : rows.reward[row] - rows.greedyReward[row];
const promptKey = (row) => `${rows.source[row]} ${rows.prompt[row]} ${rows.index[row]}`;

/** How much the reward of each row's prompt changed from its first to its last step. */
const changes = (() => {
  const ends = new Map();
  rows.step.forEach((step, row) => {
    if (rows.reward[row] === null) return;
    const key = `${rows.run[row]} ${promptKey(row)}`;
    const known = ends.get(key) || ends.set(key, { first: row, last: row }).get(key);
    if (step < rows.step[known.first]) known.first = row;
    if (step > rows.step[known.last]) known.last = row;
  });
  return rows.step.map((_, row) => {
    const known = ends.get(`${rows.run[row]} ${promptKey(row)}`);
    return known && known.first !== known.last ? Math.abs(rows.reward[known.last] - rows.reward[known.first]) : null;
  });
})();

const MEASURES = {
  reward: (row) => rows.reward[row],
  gap,
  gold: (row) => rows.gold[row],
  length: (row) => rows.length[row],
  change: (row) => changes[row],
  step: (row) => rows.step[row],
};

const controls = { source: find("source"), run: find("run"), step: find("step"), search: find("search"), sort: find("sort") };
let page = 0;
let chosen = [];

function stepsOf(source, run) {
  const own = rows.step.filter((_, row) => rows.source[row] === source && (run === null || rows.run[row] === run));
  return [...new Set(own)].sort((a, b) => a - b);
}

/** The step of each run that is nearest to the wanted one: runs may be of different lengths. */
function nearestSteps(source, run, wanted) {
  const own = data.runs.map((_, index) => [index, stepsOf(source, index)]);
  const known = own.filter(([index, steps]) => steps.length && (run === null || index === run));
  return new Map(known.map(([index, steps]) => [index, steps[nearest(steps, wanted)]]));
}

function told(steps) {
  const [first] = steps.values();
  if (first === undefined) return "all steps";
  if ([...steps.values()].every((step) => step === first)) return `step ${first.toLocaleString("en")}`;
  return [...steps].map(([run, step]) => `step ${step.toLocaleString("en")} (run ${run + 1})`).join(", ");
}

/** Leaves out the orders for which no such completion has a value: not every method draws greedy ones in training. */
function offer(isChosen) {
  const own = [...rows.step.keys()].filter(isChosen);
  const has = (order) => own.some((row) => MEASURES[order.split(" ")[0]](row) !== null);
  for (const option of controls.sort.options) option.hidden = option.disabled = !has(option.value);
  document.querySelectorAll("button[data-sort]").forEach((button) => { button.disabled = !has(button.dataset.sort); });
  if (controls.sort.selectedOptions[0].disabled) controls.sort.value = "reward down";
}

function choose() {
  const source = Number(controls.source.value);
  const run = controls.run.value === "all" ? null : Number(controls.run.value);
  const wanted = controls.search.value.trim().toLowerCase();
  const steps = controls.step.value === "" ? new Map() : nearestSteps(source, run, Number(controls.step.value));
  offer((row) => rows.source[row] === source && (run === null || rows.run[row] === run));
  const [name, direction] = controls.sort.value.split(" ");
  const sign = direction === "up" ? 1 : -1;
  const has = (place) => place !== null && texts[place].toLowerCase().includes(wanted);
  chosen = [...rows.step.keys()].filter(
    (row) =>
      rows.source[row] === source &&
      (run === null || rows.run[row] === run) &&
      (!steps.size || rows.step[row] === steps.get(rows.run[row])) &&
      (!wanted || has(rows.prompt[row]) || has(rows.text[row]) || has(rows.greedy[row])),
  );
  const value = MEASURES[name];
  chosen.sort((a, b) => {
    const [left, right] = [value(a), value(b)];
    if (left === null || right === null) return (left === null) - (right === null) || a - b;
    return sign * (left - right) || a - b;
  });
  find("found").textContent = `${chosen.length.toLocaleString("en")} completion${chosen.length === 1 ? "" : "s"}`
    + ` of ${told(steps)}`;
  page = 0;
  list(wanted);
}

function list(wanted = controls.search.value.trim().toLowerCase()) {
  const shown = chosen.slice(page * PAGE, (page + 1) * PAGE);
  find("completions-list").replaceChildren(...shown.map((row) => card(row, wanted)));
  const pages = Math.max(1, Math.ceil(chosen.length / PAGE));
  find("page").textContent = `page ${page + 1} of ${pages}`;
  find("previous").disabled = page === 0;
  find("next").disabled = page + 1 >= pages;
}

function card(row, wanted) {
  const button = element("button", { type: "button" }, "Across steps");
  button.addEventListener("click", () => compare(row));
  const said = element("dl", { className: "said" });
  for (const [name, place] of [["prompt", rows.prompt[row]], ["sampled", rows.text[row]], ["greedy", rows.greedy[row]]])
    if (place !== null)
      said.append(element("dt", {}, name), element("dd", { dir: "auto", tabIndex: 0 }, ...marked(text(place), wanted)));
  return element("article", { className: "completion" }, element("header", {}, ...measured(row), button), said);
}

function measured(row) {
  const pair = (name, value) => (value === null ? null : element("span", {}, `${name} `, element("b", {}, figure(value))));
  const run = data.runs.length > 1 ? `run ${rows.run[row] + 1}, ` : "";
  return [
    element("span", {}, `${run}step ${figure(rows.step[row], 7)}, prompt ${rows.index[row] ?? "–"}`),
    pair("reward", rows.reward[row]),
    pair("greedy", rows.greedyReward[row]),
    pair("gap", gap(row)),
    pair("gold", rows.gold[row]),
    pair("tokens", rows.length[row]),
    rows.truncated[row] ? element("span", {}, "truncated") : null,
  ];
}

function marked(whole, wanted) {
  if (!wanted) return [whole];
  const parts = [];
  const lower = whole.toLowerCase();
  // Some letters change their length with their case: places would then be wrong.
  if (lower.length !== whole.length) return [whole];
  let from = 0;
  for (let at = lower.indexOf(wanted); at !== -1; at = lower.indexOf(wanted, from)) {
    parts.push(whole.slice(from, at), element("mark", {}, whole.slice(at, at + wanted.length)));
    from = at + wanted.length;
  }
  return [...parts, whole.slice(from)];
}

for (const control of Object.values(controls)) control.addEventListener("input", choose);
find("previous").addEventListener("click", () => { page -= 1; list(); });
find("next").addEventListener("click", () => { page += 1; list(); });
document.querySelectorAll("button[data-sort]").forEach((button) =>
  button.addEventListener("click", () => {
    const steps = stepsOf(Number(controls.source.value), controls.run.value === "all" ? null : Number(controls.run.value));
    controls.sort.value = button.dataset.sort;
    controls.search.value = "";
    controls.step.value = steps.length ? steps[steps.length - 1] : "";
    choose();
  }),
);

// One prompt across steps ---------------------------------------------------------------------------------------------

const dialog = find("across");
let compared = 0;

function compare(row) {
  compared = row;
  across();
  dialog.showModal();
}

function across() {
  const key = promptKey(compared);
  const own = [...rows.step.keys()].filter((row) => promptKey(row) === key);
  own.sort((a, b) => rows.run[a] - rows.run[b] || rows.step[a] - rows.step[b] || a - b);
  const column = rows[find("which").value];
  const versions = own.map((row) => {
    const steps = own.filter((other) => rows.run[other] === rows.run[row] && rows.step[other] < rows.step[row]);
    const before = steps.filter((other) => rows.step[other] === rows.step[steps[steps.length - 1]]);
    const base = { before: before[0], first: steps[0], nothing: undefined }[find("against").value];
    const now = text(column[row]) ?? "";
    const parts = base === undefined ? [now] : difference(text(column[base]) ?? "", now);
    const said = element("div", { className: "version", dir: "auto" }, ...parts);
    return element("article", { className: "completion" }, element("header", {}, ...measured(row)), said);
  });
  find("across-prompt").textContent = text(rows.prompt[compared]) ?? "";
  find("across-list").replaceChildren(...versions);
}

find("which").addEventListener("input", across);
find("against").addEventListener("input", across);
find("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

const WORDS = /\s*(?:[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Thai}]|[\p{L}\p{M}\p{N}_'’]+|\S)|\s+$/gu;
const MOST_CELLS = 4e6;

/** What changed from one text to the other, word by word: text, <del> and <ins>. */
function difference(before, now) {
  const [a, b] = [before.match(WORDS) || [], now.match(WORDS) || []];
  const same = (i, j) => a[i].trim() === b[j].trim();
  let start = 0;
  while (start < a.length && start < b.length && same(start, start)) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && same(a.length - 1 - end, b.length - 1 - end)) end++;
  const [n, m] = [a.length - end - start, b.length - end - start];
  const edits = b.slice(0, start).map((word) => ["=", word]);
  const keep = (i, j) => {
    // A text's first word has no space before it; behind one that is gone, it needs the space it had.
    const afterGone = edits.length && edits[edits.length - 1][0] === "-" && !/^\s/.test(b[j]);
    edits.push(["=", afterGone ? a[i] : b[j]]);
  };
  if (n * m > MOST_CELLS) {
    edits.push(...a.slice(start, start + n).map((word) => ["-", word]), ...b.slice(start, start + m).map((word) => ["+", word]));
  } else {
    // longest[i][j]: the most words that a from i and b from j have in common, in order.
    const longest = new Uint16Array((n + 1) * (m + 1));
    for (let i = n - 1; i >= 0; i--)
      for (let j = m - 1; j >= 0; j--)
        longest[i * (m + 1) + j] = same(start + i, start + j)
          ? longest[(i + 1) * (m + 1) + j + 1] + 1
          : Math.max(longest[(i + 1) * (m + 1) + j], longest[i * (m + 1) + j + 1]);
    let [i, j] = [0, 0];
    while (i < n || j < m) {
      if (i < n && j < m && same(start + i, start + j)) keep(start + i++, start + j++);
      else if (j === m || (i < n && longest[(i + 1) * (m + 1) + j] >= longest[i * (m + 1) + j + 1]))
        edits.push(["-", a[start + i++]]);
      else edits.push(["+", b[start + j++]]);
    }
  }
  for (let left = end; left > 0; left--) keep(a.length - left, b.length - left);
  const parts = [];
  for (const [kind, word] of edits) {
    const last = parts[parts.length - 1];
    if (last && last.kind === kind) last.words += word;
    else parts.push({ kind, words: word });
  }
  return parts.map(({ kind, words }) => (kind === "=" ? words : element(kind === "+" ? "ins" : "del", {}, words)));
}

if (rows.step.length) find("best").click();
