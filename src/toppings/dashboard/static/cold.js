// Cold starts, each with where its layers were computed and when their copies landed.

import { draw, make, table } from "./dom.js";
import { bytes, clock, count, ms } from "./format.js";

export function coldStart(each) {
  const layers = each.places.map((place, i) => ({ number: i, place, copy: each.copies[i], work: each.workers[i] }));
  const cells = layers.map((layer) => make("i", { class: COMPUTED[layer.place] }));
  const parts = [
    ["in the queue", each.queue_ms],
    ["read from disk", each.read_ms],
    ["copied to the device", each.copy_ms],
    ["of both waited for", each.exposed_ms],
    ["computed", each.compute_ms],
  ].filter(([, value]) => value);
  const who = [`request ${each.request_id}`, each.tenant ? `of ${each.tenant}` : "", `${count(each.num_prompt_tokens)} tokens`,
    `rank ${each.rank}`, bytes(each.num_bytes)].filter(Boolean).join(", ");
  const columns = [
    ["Layer", (row) => String(row.number)],
    ["Computed", (row) => PLACES_OF_COMPUTING[row.place]],
    ["Copy landed after", (row) => (row.copy ? ms(row.copy[1]) : "not by the first token"), "number"],
    ["Workers done after", (row) => (row.work ? ms(row.work[1]) : "–"), "number"],
  ];
  return make(
    "details",
    {},
    make("summary", {}, make("time", {}, clock(each.at)), ` ${each.adapter} from ${each.tier}, first token after ${ms(each.first_token_ms)} `,
      make("span", { class: "cells", role: "img", "aria-label": told(layers) }, cells)),
    make("p", { class: "note" }, who),
    make("p", {}, parts.map(([name, value]) => `${ms(value)} ${name}`).join(", ")),
    timeline(layers, each.first_token_ms),
    make("div", { class: "wide" }, table("Layers", columns, layers, "Its layers are not told.")),
  );
}

const COMPUTED = { device: "dev", cpu: "cpu", both: "dev half", none: "" };
const PLACES_OF_COMPUTING = { device: "on the device", cpu: "by CPU workers", both: "on both", none: "nothing to compute" };

function told(layers) {
  const counts = Object.entries(PLACES_OF_COMPUTING).map(([place, name]) => [layers.filter((layer) => layer.place === place).length, name]);
  return counts.filter(([n]) => n).map(([n, name]) => `${n} layers ${name}`).join(", ");
}

// One line a layer, from the request's arrival to its first token: its copy, and the workers' time.
function timeline(layers, end) {
  const width = 600;
  const height = 8;
  const x = (value) => (width * Math.min(1, Math.max(0, value / end))).toFixed(1);
  const bars = layers.flatMap((layer, i) => ["copy", "work"].filter((kind) => layer[kind]).map((kind) =>
    draw("rect", { class: kind, x: x(layer[kind][0]), y: height * i + (kind === "work" ? 4 : 1), height: 3,
      width: Math.max(1, x(layer[kind][1]) - x(layer[kind][0])) })));
  if (!bars.length || !(end > 0)) return null;
  return make("figure", { class: "timeline" }, make("figcaption", {}, make("span", { class: "copy" }, "copy to the device"),
    make("span", { class: "work" }, "CPU workers"), make("span", { class: "top" }, `${ms(end)} to the first token, a line a layer`)),
    draw("svg", { viewBox: `0 0 ${width} ${height * layers.length}`, preserveAspectRatio: "none", "aria-hidden": "true" }, bars));
}
