// The page: follows the feed and shows what has changed.

import { byId, setText, show } from "./dom.js";
import { Feed, Refused, ask, dropKey, keepKey, readKey } from "./feed.js";
import { showAdapters, showNow, showPlaces, views } from "./views.js";

const PAGE_ROWS = 50;
const HIDDEN_MS = 2e4;

const known = {};
const found = { isSearch: false, find: "", offset: 0 };
const isRouter = () => known.about?.kind === "router";

const feed = new Feed("dashboard/events", {
  state: (word) => {
    setText(byId("link"), word);
    byId("link").className = "lost";
  },
  refused: askForKey,
  sections: take,
});

function take(changed) {
  Object.assign(known, changed);
  show(byId("ask"), false);
  show(byId("main"), true);
  show(byId("forget"), Boolean(readKey()));
  setText(byId("link"), "live");
  byId("link").className = "live";
  for (const [name, value] of Object.entries(changed)) views[name]?.(value);
  if (known.now && ["state", "now", "latency", "cache", "workers"].some((name) => name in changed)) showNow(known);
  if (changed.adapters) {
    showPlaces(changed.adapters, isRouter());
    if (!found.isSearch) showBusiest();
  }
}

// --- the key ---

function askForKey(error) {
  const isMissing = error.status === 401 && !readKey();
  setText(byId("refused"), isMissing ? "" : error.message);
  if (error.status === 401) dropKey();
  setText(byId("link"), error.status === 403 ? "this key may not look" : "a key is needed");
  byId("link").className = "lost";
  show(byId("ask"), true);
  show(byId("main"), false);
  show(byId("forget"), Boolean(readKey()));
  byId("key").focus();
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(byId("key").value.trim());
  byId("key").value = "";
  feed.start();
});

byId("forget").addEventListener("click", () => {
  feed.stop();
  dropKey();
  location.reload();
});

// --- pausing: a page that nobody sees asks for nothing ---

let isPaused = false;
let hiding = 0;

byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", String(isPaused));
  setText(byId("pause"), isPaused ? "Go on" : "Pause");
  if (isPaused) {
    feed.stop();
    setText(byId("link"), "paused");
    byId("link").className = "";
  } else {
    feed.start();
  }
});

document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(() => feed.stop(), HIDDEN_MS);
  else if (!isPaused && !feed.isRunning && byId("ask").hidden) feed.start();
});

// --- adapters: the busiest as they change, or a page of those that were looked for ---

function showBusiest() {
  show(byId("clear"), false);
  show(byId("before"), false);
  show(byId("after"), false);
  setText(byId("found"), "");
  showAdapters(known.adapters.rows, isRouter(), "Adapters with requests, loads or hits");
}

async function search() {
  found.isSearch = true;
  show(byId("clear"), true);
  const query = new URLSearchParams({ find: found.find, offset: found.offset, limit: PAGE_ROWS });
  try {
    const page = await (await ask(`dashboard/adapters?${query}`)).json();
    const last = found.offset + page.rows.length;
    setText(byId("found"), page.rows.length ? `${found.offset + 1} to ${last} of ${page.num_found}` : "none");
    show(byId("before"), found.offset > 0);
    show(byId("after"), last < page.num_found);
    showAdapters(page.rows, isRouter(), "Adapters by name");
  } catch (error) {
    setText(byId("found"), error instanceof Refused ? error.message : "the server cannot be reached");
  }
}

byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  Object.assign(found, { find: byId("find").value.trim(), offset: 0 });
  search();
});
byId("clear").addEventListener("click", () => {
  found.isSearch = false;
  byId("find").value = "";
  showBusiest();
});
for (const [id, step] of [["before", -PAGE_ROWS], ["after", PAGE_ROWS]]) {
  byId(id).addEventListener("click", () => {
    found.offset = Math.max(0, found.offset + step);
    search();
  });
}

feed.start();
