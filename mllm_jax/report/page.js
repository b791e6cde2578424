"use strict";
// Charts, tables to sort and filter, word maps. Texts enter the page as text alone.

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function dataOf(element) {
  return JSON.parse(element.querySelector("script[type='application/json']").textContent);
}

// Opens what a click stands for: the <details> of a cell, or a place on a page.
function open(id) {
  const target = document.getElementById(id);
  if (!target) return;
  for (let outer = target; outer; outer = outer.parentElement) {
    if (outer.tagName === "DETAILS") outer.open = true;
  }
  target.scrollIntoView({ block: "center" });
  (target.querySelector("summary") || target).focus();
}

// ---- Charts: each panel is a plot of its own, so that a narrow screen stacks them.

const LAYOUT = {
  font: { family: "system-ui, sans-serif", size: 12, color: "#222222" },
  margin: { l: 60, r: 16, t: 40, b: 50 },
  paper_bgcolor: "#ffffff",
  plot_bgcolor: "#ffffff",
  hoverlabel: { namelength: -1 },
  legend: { orientation: "h", y: -0.3, yanchor: "top" },
  hovermode: "closest",
};
const AXIS = { automargin: true, gridcolor: "#e4e4e4", zeroline: false };

function drawPanel(place, panel) {
  const layout = {
    ...LAYOUT,
    ...panel.layout,
    xaxis: { ...AXIS, ...panel.layout.xaxis },
    yaxis: { ...AXIS, ...panel.layout.yaxis },
  };
  const settings = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "sendChartToCloud"],
  };
  Plotly.newPlot(place, panel.data, layout, settings);
  place.on("plotly_click", (event) => {
    if (event.points[0].customdata) open(event.points[0].customdata);
  });
}

function drawChart(chart) {
  const panels = dataOf(chart);
  chart.parentElement.classList.add("drawn");
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      seen.unobserve(entry.target);
      drawPanel(entry.target, entry.target.panel);
    }
  }, { rootMargin: "300px" });
  for (const panel of panels) {
    const place = make("div", { className: "panel", role: "group", ariaLabel: panel.name, panel });
    chart.append(place);
    seen.observe(place);
  }
}

// ---- Tables: a button in each head sorts, a field filters.

function numberOf(text) {
  const number = parseFloat(text.replace(/[,\s]/g, "").replace("\u2212", "-"));
  return Number.isNaN(number) ? -Infinity : number;
}

function sortBy(table, column, head) {
  const body = table.tBodies[0];
  const rising = head.getAttribute("aria-sort") === "descending";
  const isNumber = head.classList.contains("number");
  const key = (row) => row.cells[column].textContent;
  const compare = isNumber
    ? (a, b) => numberOf(key(a)) - numberOf(key(b))
    : (a, b) => key(b).localeCompare(key(a));
  const rows = [...body.rows].sort((a, b) => (rising ? compare(a, b) : compare(b, a)));
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  body.append(...rows);
}

function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make("button", { type: "button" }, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => sortBy(table, column, head));
  });
  const count = make("output", {});
  const field = make("input", { type: "search", placeholder: "e.g. a domain or a layer" });
  const filter = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      const cells = [...row.cells].map((cell) => cell.textContent.toLowerCase());
      row.hidden = !words.every((word) => (/^\d+$/.test(word) ? cells.includes(word) : text.includes(word)));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${table.tBodies[0].rows.length} rows`;
  };
  field.addEventListener("input", filter);
  const label = make("label", {}, `Filter ${table.dataset.name}`, field);
  table.parentElement.before(make("div", { className: "controls" }, label, count));
  table.parentElement.classList.add("tall");
  filter();
}

// ---- Word maps: the words of a lens at each patch, a slider over the layers.

const SHADES = ["#0b2a57", "#1f5f9e", "#4c96c4", "#96c8de", "#d9ecf2"]; // low values are dark

function drawWordMap(map) {
  const data = dataOf(map);
  const slider = map.querySelector("input[type=range]");
  const shading = map.querySelector("select");
  const [frame, cells, reply, layerName, scale] = [".patch", ".cells", ".reply", ".layer", ".scale"].map(
    (name) => map.querySelector(name));
  const buttons = [];
  let current = 0;
  cells.style.gridTemplateColumns = `repeat(${data.columns}, 1fr)`;

  const valueAt = (name, layer, cell) => data.maps[name][Math.min(layer, data.maps[name].length - 1)][cell];
  const wordsAt = (layer, cell) => data.words[layer][cell].map((id) => data.vocabulary[id]);
  const place = (cell) => `row ${Math.floor(cell / data.columns) + 1}, column ${(cell % data.columns) + 1}`;

  function show(cell) {
    current = cell;
    const layer = Number(slider.value);
    Object.assign(frame.style, {
      display: "block",
      left: `${(100 * (cell % data.columns)) / data.columns}%`,
      top: `${(100 * Math.floor(cell / data.columns)) / data.rows}%`,
      width: `${100 / data.columns}%`,
      height: `${100 / data.rows}%`,
    });
    const words = wordsAt(layer, cell).flatMap((word) => [make("code", {}, word), " "]);
    const values = Object.keys(data.maps).map(
      (name) => `${name} ${Number(valueAt(name, layer, cell).toPrecision(3))}`);
    reply.replaceChildren(`Layer ${data.layers[layer]}, ${place(cell)}: `, ...words, `(${values.join(", ")})`);
  }

  function draw() {
    const layer = Number(slider.value);
    const every = data.maps[shading.value].flat();
    const [low, high] = [Math.min(...every), Math.max(...every)];
    layerName.textContent = data.layers[layer];
    slider.setAttribute("aria-valuetext", `layer ${data.layers[layer]}`);
    scale.textContent = `${shading.value}: dark ${Number(low.toPrecision(3))}, light ${Number(high.toPrecision(3))}`;
    buttons.forEach((button, cell) => {
      const share = (valueAt(shading.value, layer, cell) - low) / (high - low || 1);
      const shade = Math.min(SHADES.length - 1, Math.floor(share * SHADES.length));
      const [word] = wordsAt(layer, cell);
      button.textContent = word;
      button.style.background = SHADES[shade];
      button.style.color = shade < 2 ? "#ffffff" : "#222222";
      button.setAttribute("aria-label", `${place(cell)}: ${word}`);
    });
    show(current);
  }

  for (let cell = 0; cell < data.rows * data.columns; cell++) {
    const button = make("button", { type: "button", tabIndex: cell ? -1 : 0 });
    for (const event of ["mouseenter", "focus", "click"]) button.addEventListener(event, () => show(cell));
    buttons.push(button);
  }
  cells.append(...buttons);
  cells.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -data.columns, ArrowDown: data.columns }[event.key];
    const next = buttons[current + step];
    if (!next) return;
    event.preventDefault();
    buttons[current].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  slider.addEventListener("input", draw);
  shading.addEventListener("input", draw);
  draw();
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll(".wordmap").forEach(drawWordMap);
if (window.Plotly) document.querySelectorAll(".chart").forEach(drawChart);
