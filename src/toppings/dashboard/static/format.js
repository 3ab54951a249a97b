// Numbers as people read them.

export const count = (value) => Math.round(value ?? 0).toLocaleString("en");

export function short(value) {
  if (value === null || value === undefined) return "–";
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (Math.abs(value) >= size) return `${digits(value / (unit === "k" ? 1e3 : size))}${unit}`;
  }
  return digits(value);
}

const digits = (value) => (Math.abs(value) >= 100 ? Math.round(value).toString() : Number(value.toPrecision(3)).toString());

export function ms(value) {
  if (value === null || value === undefined) return "–";
  return value >= 1e3 ? `${digits(value / 1e3)} s` : `${digits(value)} ms`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  for (; value >= 1024 && i < units.length - 1; i += 1) value /= 1024;
  return `${digits(value)} ${units[i]}`;
}

export const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");

export const clock = (seconds) => new Date(1e3 * seconds).toLocaleTimeString("en-GB");
