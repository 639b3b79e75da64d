"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const CONTEXT = 3;
const state = { pass: firstPass(), segment: -1, site: "", all: false, time: false, match: -1 };
const measured = data.segments.some((s) => s.cost);

function firstPass() {
  const steered = data.passes.findIndex((p) => p.name === "steer" && p.any);
  return steered >= 0 ? steered : Math.max(0, data.passes.length - 1);
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") element.addEventListener("click", value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function bytes(count) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (count < 1024 || unit === "GiB") return `${count < 10 && unit !== "B" ? count.toFixed(1) : Math.round(count)} ${unit}`;
    count /= 1024;
  }
}

function seconds(value) {
  return value < 1 ? `${(value * 1e3).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(2)} s`;
}

// -- what is said once ---------------------------------------------------------------------------

function showHeader() {
  const [rows, query] = data.shape;
  at("model").textContent = data.model;
  const shape = rows ? `${rows} row${rows > 1 ? "s" : ""} x ${query} token${query > 1 ? "s" : ""}, ` : "";
  const versions = Object.entries(data.versions).map((pair) => pair.join(" ")).join(", ");
  at("about").textContent = `${shape}${data.variant}, ${data.segments.length} segments; ${versions}`;
  at("names").append(...data.sites.filter(([name]) => !name.includes(":")).map(([name]) => make("option", { value: name })));
  at("by-time").disabled = !measured;
  at("by-time").title = measured ? "" : "not measured: djinn-fx inspect --measure";
}

// -- passes --------------------------------------------------------------------------------------

function showPasses() {
  at("passes").replaceChildren(...data.passes.map((pass, index) => {
    const counts = [["plus", "+", pass.made], ["minus", "−", pass.removed], ["tilde", "~", pass.changed]]
      .filter(([, , count]) => count).flatMap(([kind, sign, count]) => [make("span", { class: kind }, `${sign}${count}`), " "]);
    return make("button", { type: "button", "aria-current": index === state.pass, title: pass.said, on: () => choosePass(index) },
      make("b", {}, pass.name), make("span", { class: "time" }, seconds(pass.seconds)),
      make("span", { class: "counts" }, ...(counts.length ? counts : [pass.any ? "segments described" : "no change"])));
  }));
  if (data.failure) {
    at("passes").append(make("div", { class: "failed" }, `${data.failure.name} failed: ${data.failure.message}\n${data.failure.folder}`));
  }
}

function choosePass(index) {
  if (index < 0 || index >= data.passes.length) return;
  state.pass = index;
  showPasses();
  showDiff();
  at("passes").querySelector("[aria-current=true]").scrollIntoView({ block: "nearest" });
}

// -- diff ----------------------------------------------------------------------------------------

function showDiff() {
  const pass = data.passes[state.pass];
  if (!pass) return;
  const toggle = make("button", { type: "button", "aria-pressed": state.all, on: () => { state.all = !state.all; showDiff(); } }, "all lines");
  at("head").replaceChildren(make("h2", {}, `${state.pass}: ${pass.name}`), make("span", {}, pass.said),
    make("span", { class: "verdict" }, pass.verdict), toggle);
  const one = pass.before <= 1;
  const rows = make("div", { class: one ? "rows one" : "rows" });
  for (const [mark, text, count] of pass.inputs) {
    pair(rows, mark === "+" ? null : `input ${text}${count > 1 ? ` × ${count}` : ""}`, mark === "+" ? `input ${text}${count > 1 ? ` × ${count}` : ""}` : null,
      mark === "+" ? "made" : "removed");
  }
  for (const block of pass.blocks) showBlock(rows, block, one);
  at("diff").replaceChildren(rows);
  mark();
}

function showBlock(rows, block, one) {
  const plain = (line) => line.t === "same";
  const lines = block.lines;
  const near = new Set();
  lines.forEach((line, index) => {
    const far = line.t === "segment" || line.t === "yield" ? 1 : CONTEXT;
    if (!plain(line)) for (let i = index - far; i <= index + far; i++) near.add(i);
  });
  let module = null;
  let hidden = [];
  const flush = () => {
    if (!hidden.length) return;
    const kept = hidden;
    const button = make("button", { type: "button" }, `⋯ ${kept.length} unchanged line${kept.length > 1 ? "s" : ""}`);
    const place = make("div", { class: "wide" }, button);
    place.dataset.sites = JSON.stringify(kept.flatMap((line) => line.s || []));
    place.block = block;
    const open = () => {
      const inner = document.createElement("div");
      let own = null;
      for (const line of kept) own = showLine(inner, line, own, block);
      place.replaceWith(...inner.childNodes);
    };
    place.open = open;
    button.addEventListener("click", open);
    rows.append(place);
    hidden = [];
    module = null;
  };
  lines.forEach((line, index) => {
    if (plain(line) && !state.all && !one && !near.has(index)) { hidden.push(line); return; }
    flush();
    module = showLine(rows, line, module, block);
  });
  flush();
  if (block.fold) rows.append(make("div", { class: "wide fold" }, block.fold));
}

function showLine(rows, line, module, block) {
  if (line.t === "segment" || line.t === "yield") {
    const said = make("div", { class: `wide ${line.t}` }, line.r);
    for (const value of line.v || []) said.append(make("div", { class: "remark" }, `    ${value}`));
    said.dataset.segment = line.n;
    rows.append(said);
    return null;
  }
  if (line.m && line.m !== module) rows.append(make("div", { class: "wide module" }, `# ${line.m}`));
  const left = line.l === undefined && line.t !== "made" ? line.r : line.l;
  const leftRemark = line.lr === undefined && line.t !== "made" ? line.rr : line.lr;
  const kind = line.t === "same" ? "" : line.t;
  pair(rows, left, line.r, kind, leftRemark, line.rr, line.s, block);
  return line.m || module;
}

function pair(rows, left, right, kind, leftRemark, rightRemark, sites, block) {
  for (const [side, code, said] of [["l", left, leftRemark], ["r", right, rightRemark]]) {
    const empty = code === undefined || code === null;
    const cell = make("div", { class: `${side} ${empty ? "none" : kind}` });
    if (!empty) {
      cell.append(code);
      if (said) cell.append(make("span", { class: "remark" }, `   ${said.replace(/\[[^\]]*\]/, (form) => form.replaceAll(" ", "\u00a0"))}`));
      if (sites) { cell.title = sites.join("\n"); cell.sites = sites; cell.block = block; }
    }
    rows.append(cell);
  }
}

// -- search --------------------------------------------------------------------------------------

// A name as it is in a layer that is `far` layers further on.
function shifted(name, prefix, far) {
  if (name.startsWith(`${prefix}.`)) {
    return name.replace(/\.(\d+)/, (whole, number, place) => (place === prefix.length ? `.${Number(number) + far}` : whole));
  }
  const match = /^([a-z_]\w*)\.(\d+)$/.exec(name);
  return match ? `${match[1]}.${Number(match[2]) + far}` : name;
}

function stands(sites, block, wanted) {
  if (!sites) return false;
  if (sites.includes(wanted)) return true;
  return Boolean(block && block.equals && block.equals.some((layer) =>
    sites.some((name) => shifted(name, block.prefix, layer - block.layer) === wanted)));
}

function matches() {
  const wanted = at("search").value.trim();
  if (!wanted) return [];
  const exact = data.sites.filter(([name]) => name === wanted);
  return exact.length ? exact : data.sites.filter(([name]) => name.includes(wanted));
}

function search(step) {
  const found = matches();
  if (!found.length) {
    state.site = "";
    at("found").textContent = at("search").value.trim() ? "no such site" : "";
    mark();
    return;
  }
  state.match = (state.match + step + found.length) % found.length;
  const [name, segment] = found[state.match];
  state.site = name;
  if (segment >= 0) chooseSegment(segment, false);
  const shown = mark();
  at("found").textContent = `${name} (${state.match + 1} of ${found.length})${shown}`;
}

function mark() {
  for (const old of at("diff").querySelectorAll(".marked")) old.classList.remove("marked");
  if (!state.site) return "";
  for (const place of [...at("diff").querySelectorAll(".wide[data-sites]")]) {
    if (stands(JSON.parse(place.dataset.sites), place.block, state.site)) place.open();
  }
  const cells = [...at("diff").querySelectorAll(".rows > div")].filter((cell) => stands(cell.sites, cell.block, state.site));
  for (const cell of cells) cell.classList.add("marked");
  if (cells.length) cells[cells.length - 1].scrollIntoView({ block: "center" });
  if (!cells.length) return ": not in this pass";
  return cells.some((cell) => cell.sites.includes(state.site)) ? "" : `: shown by its equal in layer ${cells[0].block.layer}`;
}

// -- segments ------------------------------------------------------------------------------------

function columns() {
  const found = [
    ["#", (s, i) => i], ["ends at", (s) => s.site || "—", "t"], ["layer", (s) => s.layer ?? ""], ["nodes", (s) => s.nodes],
    ["weights", (s) => bytes(s.weight_bytes)], ["live", (s) => bytes(s.bytes)],
  ];
  if (measured) {
    found.push(["µs", (s) => s.cost.microseconds.toFixed(1)], ["kernels", (s) => s.cost.kernels],
      ["lost", (s) => (s.cost.fusions_lost === null ? "" : `${s.cost.at_most ? "≤ " : ""}${s.cost.fusions_lost}`)],
      ["arming", (s) => (s.cost.arming === null ? "" : s.cost.arming.toFixed(1))]);
  }
  return found;
}

function showTable() {
  const shown = columns();
  const head = make("tr", {}, make("th", { title: "compile class: segments of one colour share a compilation" }), ...shown.map(([name, , kind]) => make("th", { class: kind }, name)));
  const rows = data.segments.map((segment, index) => make("tr", { "data-index": index, on: () => chooseSegment(index, true) },
    make("td", {}, make("span", { class: "chip", style: `background: var(--c${segment.class % 8})`, title: `compile class ${segment.class}` })),
    ...shown.map(([, value, kind]) => make("td", { class: kind }, String(value(segment, index))))));
  const terms = "lost: fusions lost at the cut behind it; arming: microseconds of its site's tables";
  at("table").replaceChildren(make("table", { title: measured ? terms : null }, make("thead", {}, head), make("tbody", {}, ...rows)));
}

function chooseSegment(index, jump) {
  if (index < 0 || index >= data.segments.length) return;
  state.segment = index;
  for (const row of at("table").querySelectorAll("tr[data-index]")) row.classList.toggle("chosen", Number(row.dataset.index) === index);
  for (const band of at("strip").querySelectorAll("rect")) band.classList.toggle("chosen", Number(band.dataset.index) === index);
  at("table").querySelector(".chosen").scrollIntoView({ block: "nearest" });
  const segment = data.segments[index];
  if (jump) {
    const place = [...at("diff").querySelectorAll(".segment")].find((each) => each.dataset.segment === segment.name);
    if (place) place.scrollIntoView({ block: "start" });
  }
  const where = segment.site ? `ends at ${segment.site}` : "ends the program";
  const same = data.segments.filter((other) => other.class === segment.class).length;
  const shares = same > 1 ? `shares its compilation with ${same - 1} other${same > 2 ? "s" : ""}` : "compiled for itself";
  const steered = [segment.edited ? "edited" : "", segment.tapped ? "tapped" : ""].filter(Boolean).join(" and ");
  at("detail").replaceChildren(...[
    make("h3", {}, `${segment.name} ${where}`),
    make("div", {}, `${segment.weights} weights (${bytes(segment.weight_bytes)}); class ${segment.class}, ${shares}${steered ? `; its site can be ${steered}` : ""}`),
    make("div", {}, segment.live.length ? `alive behind it: ${bytes(segment.bytes)}` : "nothing is alive behind it"),
    segment.cost && segment.cost.arming !== null ? make("div", {}, `arming its site costs ${segment.cost.arming.toFixed(1)} µs; fusions lost at the cut: ${segment.cost.at_most ? "at most " : ""}${segment.cost.fusions_lost ?? 0}`) : null,
    make("ul", {}, ...segment.live.map((value) => make("li", {}, value))),
    segment.code ? make("details", {}, make("summary", {}, "Inductor's code"), make("pre", {}, segment.code)) : null,
  ].filter(Boolean));
}

// -- strip ---------------------------------------------------------------------------------------

function draw(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function showStrip() {
  at("by-nodes").setAttribute("aria-pressed", !state.time);
  at("by-time").setAttribute("aria-pressed", state.time);
  const width = Math.max(300, at("strip").clientWidth - 28);
  const svg = draw("svg", { viewBox: `0 0 ${width} 84`, role: "img", "aria-label": "segments in execution order" });
  const sizes = data.segments.map((s) => (state.time && s.cost ? s.cost.microseconds : s.nodes) || 0.01);
  const total = sizes.reduce((sum, size) => sum + size, 0);
  let x = 0;
  let last = -100;
  data.segments.forEach((segment, index) => {
    const size = (sizes[index] / total) * width;
    const band = draw("rect", { x, y: 16, width: size, height: 34, rx: 2, fill: `var(--c${segment.class % 8})` });
    band.dataset.index = index;
    const amount = state.time && segment.cost ? `${segment.cost.microseconds.toFixed(1)} µs` : `${segment.nodes} nodes`;
    band.append(draw("title", {}, `${segment.name}: ${amount}, ${segment.site ? `cut at ${segment.site}, ` : ""}${segment.bytes} bytes live`));
    band.addEventListener("click", () => chooseSegment(index, true));
    svg.append(band);
    const name = segment.layer !== null && segment.layer !== undefined ? String(segment.layer) : "tail";
    if (size > 7 * name.length) svg.append(draw("text", { x: x + size / 2, y: 37, class: "in" }, name));
    x += size;
    if (index < data.segments.length - 1) {
      svg.append(draw("line", { x1: x, x2: x, y1: 13, y2: 54 }));
      const label = bytes(segment.bytes);
      if (x - last > label.length * 6 + 8 && x > label.length * 3) {
        const place = Math.min(x, width - label.length * 3);
        svg.append(draw("text", { x: place, y: 10 }, label));
        last = place;
      }
      if (segment.edited) svg.append(draw("path", { d: `M ${x - 4} 62 l 4 -7 l 4 7 z`, class: "edited" }));
      if (segment.tapped) svg.append(draw("circle", { cx: x, cy: 68, r: 2.6, class: "tapped" }));
    }
  });
  const legend = "number: layer · colour: compile class · above a cut: bytes alive behind it · ▲ edited · ○ tapped";
  svg.append(draw("text", { x: 0, y: 81, class: "legend" }, legend));
  at("strip").replaceChildren(svg);
  if (state.segment >= 0) svg.querySelectorAll("rect")[state.segment].classList.add("chosen");
}

function setTime(time) {
  if (time && !measured) return;
  state.time = time;
  showStrip();
}

// -- keys ----------------------------------------------------------------------------------------

function escape() {
  if (at("help").open) { at("help").close(); return; }
  at("search").value = "";
  at("search").blur();
  state.site = "";
  state.match = -1;
  at("found").textContent = "";
  mark();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") { escape(); event.preventDefault(); return; }
  if (event.target === at("search")) {
    if (event.key === "Enter") search(state.site ? 1 : 0);
    return;
  }
  const acts = {
    ArrowUp: () => choosePass(state.pass - 1), ArrowDown: () => choosePass(state.pass + 1),
    ArrowLeft: () => chooseSegment(Math.max(0, state.segment - 1), true), ArrowRight: () => chooseSegment(state.segment + 1, true),
    "/": () => { at("search").focus(); at("search").select(); },
    "?": () => at("help").showModal(),
    a: () => { state.all = !state.all; showDiff(); },
    w: () => setTime(!state.time),
  };
  if (at("help").open || !acts[event.key]) return;
  event.preventDefault();
  acts[event.key]();
});
at("search").addEventListener("input", () => { state.match = 0; search(0); });
at("by-nodes").addEventListener("click", () => setTime(false));
at("by-time").addEventListener("click", () => setTime(true));
at("help-button").addEventListener("click", () => at("help").showModal());
window.addEventListener("resize", showStrip);

showHeader();
showPasses();
showStrip();
showTable();
showDiff();
document.body.classList.toggle("measured", measured);
document.body.dataset.ready = "true";
