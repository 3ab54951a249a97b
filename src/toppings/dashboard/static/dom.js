// Elements from plain values. Texts are only ever set as text, never read as markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined).map(asNode));
  return node;
}

const asNode = (child) => (child instanceof Node ? child : document.createTextNode(String(child)));

export const make = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);

export const draw = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

export function show(node, isShown) {
  node.hidden = !isShown;
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// A table whose rows are made anew: columns are [heading, cell of a row, class].
export function table(caption, columns, rows, nothing) {
  if (!rows.length) return make("p", { class: "note" }, nothing);
  return make(
    "table",
    {},
    make("caption", {}, caption),
    make("thead", {}, make("tr", {}, columns.map(([heading, , kind]) => make("th", { scope: "col", class: kind }, heading)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, columns.map(([, cell, kind], i) =>
      make(i ? "td" : "th", { class: kind, ...(i ? {} : { scope: "row" }) }, cell(row)))))),
  );
}

// Children of `parent`, one for each item, by `key`: one that is there already stays, open or with the focus.
export function keep(parent, items, key, build) {
  const known = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  const nodes = items.map((item) => {
    const name = String(key(item));
    const node = known.get(name) ?? build(item);
    node.dataset.key = name;
    return node;
  });
  const wanted = new Set(nodes);
  for (const node of [...parent.children]) if (!wanted.has(node)) node.remove();
  nodes.forEach((node, i) => {
    if (parent.children[i] !== node) parent.insertBefore(node, parent.children[i] ?? null);
  });
}
