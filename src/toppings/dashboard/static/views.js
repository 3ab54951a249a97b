// Each section of what the server tells, shown.

import { chart } from "./charts.js";
import { coldStart } from "./cold.js";
import { byId, keep, make, setText, show, table } from "./dom.js";
import { bytes, clock, count, ms, percent, short } from "./format.js";

const PLACES = [
  ["device", "on the device"],
  ["loading", "on the way to the device"],
  ["host", "in host memory"],
  ["reading", "being read from disk"],
  ["disk", "on disk"],
];
const PLACE_NAMES = Object.fromEntries(PLACES);
const MAX_CELLS = 64;

export const views = {
  about(about) {
    const isRouter = about.kind === "router";
    const told = isRouter ? `router ${about.version}, policy ${about.policy}` : `${about.model}, mode ${about.mode}, ${about.version}`;
    const link = about.link_gbps ? `, emulated link of ${about.link_gbps} GB/s` : "";
    const placement = isRouter && about.placement !== "none" ? `, placement ${about.placement}` : "";
    setText(byId("about"), told + placement + link);
    document.title = `${isRouter ? "Router" : about.model} – Toppings`;
    show(byId("servers-part"), isRouter);
    show(byId("decisions-part"), isRouter);
    setText(byId("rule"), isRouter ? `${about.policy}: ${about.rule}` : "");
  },

  history(history) {
    const pair = (name) => [["p50", history[`${name}_p50_ms`], "p50"], ["p99", history[`${name}_p99_ms`], "p99"]];
    byId("history").replaceChildren(
      chart("Tokens/s", [["tokens/s", history.tokens_per_s, "p50"]], short),
      chart("Requests/s", [["requests/s", history.requests_per_s, "p50"]], short),
      chart("TTFT", pair("ttft"), ms),
      chart("TPT", pair("tpt"), ms),
    );
  },

  queue(queue) {
    const tenants = Object.entries(queue.tenants).filter(([name]) => name);
    setText(byId("tenants"), tenants.map(([name, number]) => `${name}: ${count(number)}`).join(", "));
    const more = queue.num_more ? [make("p", { class: "note" }, `and ${count(queue.num_more)} more`)] : [];
    const columns = [
      ["Tenant", (row) => row.tenant || "–"],
      ["Model", (row) => row.model || "being looked for"],
      ["Waiting", (row) => count(row.waiting), "number"],
      ["Running", (row) => count(row.running), "number"],
    ];
    byId("queue").replaceChildren(table("Open requests", columns, queue.rows, "None is open."), ...more);
  },

  decisions(decisions) {
    if (!decisions) return;
    const parent = byId("decisions");
    if (!decisions.length) {
      parent.replaceChildren(make("p", { class: "note", "data-key": "" }, "Those that come while this page is open are shown."));
      return;
    }
    keep(parent, decisions, (each) => each.number, decision);
  },

  cold(cold) {
    show(byId("cold-part"), true);
    setText(byId("cold-legend"), `${count(cold.num)} since the server's start. One cell a layer, by where its adapter's part was computed: green on the device, amber by CPU workers, half and half where both did. Opened, each tells when its layers had landed.`);
    keep(byId("cold"), cold.latest, (each) => each.number, coldStart);
  },

  servers(servers) {
    if (!servers) return;
    const columns = [
      ["Server", (row) => row.id],
      ["State", (row) => make("span", { class: `state ${row.state}` }, row.state)],
      ["Kind", (row) => row.kind],
      ["Running", (row) => count(row.running), "number"],
      ["Waiting", (row) => count(row.waiting), "number"],
      ["From here", (row) => count(row.in_flight), "number"],
      ["Cache in use", (row) => (row.kv_total ? percent(row.kv_used, row.kv_total) : "not told"), "number"],
      ["On device", (row) => count(row.on_device), "number"],
      ["On host", (row) => count(row.on_host), "number"],
    ];
    const more = servers.num_more ? [make("p", { class: "note" }, `and ${count(servers.num_more)} more`)] : [];
    byId("servers").replaceChildren(table("The router's servers", columns, servers.rows, "There is no server."), ...more);
  },
};

// --- now ---

// From several sections, since a person looks at them together.
export function showNow({ state, now, latency, cache, workers }) {
  const tiles = [
    ["State", state.word, state.reason || (now.engine_age_s ? `the engine's figures are ${now.engine_age_s} s old` : "")],
    ["Open requests", count(now.open), `${count(now.running)} running, ${count(now.waiting)} waiting`],
    ["Tokens/s", short(now.tokens_per_s), `prompts ${short(now.prompt_tokens_per_s)}`],
    ["Requests/s", short(now.requests_per_s), outcomes(now.ended)],
    ["TTFT, p50", ms(latency.ttft.p50_ms), `p99 ${ms(latency.ttft.p99_ms)}, of ${count(latency.ttft.num)} in a minute`],
    ["TPT, p50", ms(latency.tpt.p50_ms), `p99 ${ms(latency.tpt.p99_ms)}, of ${count(latency.tpt.num)} in a minute`],
  ];
  if (cache) {
    tiles.push(["KV cache in use", percent(cache.used, cache.total), `${short(cache.used)} of ${short(cache.total)} tokens`]);
    tiles.push(["Prompt tokens in the cache", percent(cache.found, cache.prompt_tokens), `${short(cache.found)} of ${short(cache.prompt_tokens)}`]);
  }
  if (workers) {
    tiles.push(["CPU workers", count(workers.alive), `${count(workers.restarts)} restarted, ${count(workers.recomputed_slices)} slices done again`]);
    tiles.push(["Cold parts by CPU", percent(workers.cpu_products, workers.cold_products), `${short(workers.cpu_products)} of ${short(workers.cold_products)} products`]);
  }
  const parent = byId("now");
  keep(parent, tiles, ([name]) => name, ([name]) => make("div", {}, make("dt", {}, name), make("dd", {}), make("dd", { class: "more" })));
  tiles.forEach(([, value, more], i) => {
    const [, dd, small] = parent.children[i].children;
    setText(dd, value);
    setText(small, more);
  });
}

const outcomes = (ended) =>
  Object.entries(ended).filter(([, n]) => n).map(([name, n]) => `${count(n)} ${name.replaceAll("_", " ")}`).join(", ") || "none has ended";

// --- adapters ---

export function showPlaces(adapters, isRouter) {
  if (isRouter) {
    const told = `${count(adapters.registered)} known; ${count(adapters.device)} copies on devices, ${count(adapters.host)} in host memory`;
    byId("places").replaceChildren(make("p", { class: "note" }, told));
    return;
  }
  const rest = adapters.registered - PLACES.slice(0, 4).reduce((sum, [place]) => sum + (adapters[place] ?? 0), 0);
  const counts = { ...adapters, disk: Math.max(0, rest) };
  const shown = PLACES.filter(([place]) => counts[place]);
  const total = shown.reduce((sum, [place]) => sum + counts[place], 0);
  const bar = make("div", { class: "bar", role: "img", "aria-label": shown.map(([place, name]) => `${count(counts[place])} ${name}`).join(", ") });
  for (const [place] of shown) {
    const part = make("span", { class: `place ${place}` });
    part.style.flexGrow = String(Math.max(counts[place], total / 100));
    bar.append(part);
  }
  const legend = shown.map(([place, name]) => make("li", { class: `place ${place}` }, `${count(counts[place])} ${name}`));
  const memory = [["device", "device pool"], ["host", "host store"]].filter(([tier]) => adapters[`${tier}_bytes`]).map(([tier, name]) => {
    const [used, all] = adapters[`${tier}_bytes`];
    return `${name}: ${bytes(used)} of ${bytes(all)}`;
  });
  byId("places").replaceChildren(bar, make("ul", { class: "legend" }, legend), make("p", { class: "note" }, memory.join(" · ")));
}

// Rows of a server (place and layers) or of a router (which servers have it).
export function showAdapters(rows, isRouter, caption) {
  const where = isRouter
    ? [["On device", (row) => row.device.join(", ") || "–"], ["On host", (row) => row.host.join(", ") || "–"], ["Requests", (row) => count(row.requests), "number"]]
    : [
        ["Where", (row) => make("span", { class: `place ${row.place}` }, PLACE_NAMES[row.place])],
        ["Layers on the device", layers],
        ["Running", (row) => count(row.running), "number"],
        ["Waiting", (row) => count(row.waiting), "number"],
        ["Hits", (row) => count(row.hits), "number"],
      ];
  const mark = (is_so, word, title) => (is_so ? make("span", { class: "mark", title }, ` ${word}`) : null);
  const name = (row) => [
    row.name,
    mark(row.is_pinned, "pinned", "pinned"),
    mark(row.is_folded, "folded", "folded into the base model's weights"),
  ];
  byId("adapters").replaceChildren(table(caption, [["Adapter", name], ...where], rows, "There is none."));
}

function layers(row) {
  if (!row.num_layers) return "–";
  const cells = Math.min(row.num_layers, MAX_CELLS);
  const full = Math.floor((row.layers * cells) / row.num_layers);
  return make("span", { class: "cells", role: "img", "aria-label": `${row.layers} of ${row.num_layers} layers` },
    Array.from({ length: cells }, (_, i) => make("i", { class: i < full ? "full" : "" })));
}

// --- decisions ---

function decision(each) {
  const columns = [
    ["Server", (row) => (row.is_chosen ? make("b", {}, row.id) : row.id)],
    ["Could take it", (row) => row.why_not || "yes"],
    ["Requests there", (row) => count(row.requests), "number"],
    ["Adapter", (row) => row.place || "–"],
    ["Load", (row) => ms(row.load_ms), "number"],
    ["Step with it", (row) => ms(row.step_ms), "number"],
  ];
  return make(
    "details",
    {},
    make("summary", {}, make("time", {}, clock(each.at)), ` ${each.model || "base model"} → `, make("b", {}, each.server),
      make("span", { class: "note" }, ` ${each.why}`)),
    make("p", { class: "note" }, [`request ${each.request_id}`, each.tenant ? `of ${each.tenant}` : "", `${count(each.prompt_tokens)} tokens`].filter(Boolean).join(", ")),
    make("div", { class: "wide" }, table("What was known of the servers", columns, each.servers, "Nothing.")),
  );
}
