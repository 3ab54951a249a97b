// Lines over time, as SVG. A gap in the values is a gap in the line.

import { draw, make } from "./dom.js";

const WIDTH = 300;
const HEIGHT = 90;

// `lines`: [name, values with null where there is none, class]. `tell` writes a value.
export function chart(title, lines, tell) {
  const top = niceTop(Math.max(0, ...lines.flatMap(([, values]) => values.filter((v) => v !== null))));
  const paths = lines.map(([, values, kind]) =>
    draw("path", { class: `line ${kind}`, d: path(values, top), "vector-effect": "non-scaling-stroke" }));
  const last = lines.map(([name, values]) => `${name} ${tell(lastOf(values))}`).join(", ");
  const grid = [0.5, 1].map((share) =>
    draw("path", { class: "grid", d: `M0 ${y(share, 1)}H${WIDTH}`, "vector-effect": "non-scaling-stroke" }));
  return make(
    "figure",
    {},
    make("figcaption", {}, make("b", {}, title), lines.length > 1
      ? make("span", { class: "legend" }, lines.map(([name, , kind]) => make("span", { class: kind }, name)))
      : null, make("span", { class: "top" }, tell(top))),
    draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
      "aria-label": `${title}: lately ${last}` }, grid, paths),
  );
}

const y = (value, top) => (HEIGHT - 2 - ((HEIGHT - 4) * value) / (top || 1)).toFixed(1);

function path(values, top) {
  let d = "";
  let isDown = false;
  values.forEach((value, i) => {
    if (value === null) {
      isDown = false;
      return;
    }
    const x = ((WIDTH * i) / Math.max(1, values.length - 1)).toFixed(1);
    const isAlone = !isDown && (values[i + 1] ?? null) === null;
    d += `${isDown ? "L" : "M"}${x} ${y(value, top)}${isAlone ? "h1" : ""}`;
    isDown = true;
  });
  return d || "M0 0";
}

function lastOf(values) {
  for (let i = values.length - 1; i >= 0; i -= 1) if (values[i] !== null) return values[i];
  return null;
}

function niceTop(value) {
  if (!value) return 1;
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * size).find((step) => step >= value);
}
