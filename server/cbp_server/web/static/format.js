// Numbers and specs as people read them.

export const NONE = "–";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

export function count(value) {
  if (!known(value)) return NONE;
  return Math.abs(value) < 1e8 ? whole.format(value) : compact.format(value);
}

export const short = (value) => (known(value) ? compact.format(value) : NONE);

export const percent = (value) => (known(value) ? `${(100 * value).toFixed(1)} %` : NONE);

export function decimal(value, digits = 3) {
  if (!known(value)) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) return value.toExponential(1);
  return value.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
}

// For an axis: no digits that say nothing.
export const plain = (value) => String(Number(value.toPrecision(6)));
export const plainPercent = (value) => `${plain(100 * value)} %`;

export function rate(value) {
  if (!known(value)) return NONE;
  return value < 10 && value > 0 ? value.toFixed(1) : count(value);
}

export function bytes(value) {
  if (!known(value) || value === 0) return NONE;
  const power = Math.min(4, Math.floor(Math.log2(value) / 10));
  return `${(value / 1024 ** power).toFixed(power > 0 ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.floor(seconds))} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}

export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

export const clock = (date) => date.toLocaleTimeString("en-GB");

export const moment = (date) => date.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });

export function network(spec) {
  if (spec.network.kind !== "mlp") return otherNetwork(spec.network);
  const { in_features: inputs, hidden = [], out_features: outputs, activation } = spec.network;
  const equal = hidden.length > 1 && hidden.every((width) => width === hidden[0]);
  const widths = equal ? [`${hidden.length}×${hidden[0]}`] : hidden;
  return `${[inputs, ...widths, outputs].join("–")} ${activation}`;
}

function otherNetwork({ kind, name = kind, shape, activation, out_features: outputs, ...sizes }) {
  const fields = "in_channels" in sizes ? ["in_channels", "height", "width"] : ["length", "in_features"];
  const inputs = shape ?? fields.map((field) => sizes[field]).filter(Boolean);
  return [name, `${inputs.join("×")} to ${outputs}`, activation].filter(Boolean).join(" ");
}

export function resets(spec) {
  const { layers } = spec.resets;
  if (layers === "none" || layers.length === 0) return "none";
  return Array.isArray(layers) ? layers.join(", ") : layers;
}

export function resetsInFull(spec) {
  if (resets(spec) === "none") return spec.methods?.length ? "none" : "none (plain backprop)";
  const { replacement_rate: share, maturity_threshold: maturity, utility } = spec.resets;
  const where = { all: "all layers", first: "first layer" }[resets(spec)] ?? resets(spec);
  return `${where}, rate ${share}, mature after ${count(maturity)} steps, by ${utility.replaceAll("_", " ")}`;
}

export function methods(spec) {
  const shown = (spec.methods ?? []).map(({ kind, ...settings }) => {
    const entries = Object.entries(settings).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`);
    return [kind.replaceAll("_", " "), ...entries].join(", ");
  });
  return shown.join("; ");
}

export function optimizer(spec) {
  const { kind, lr, momentum } = spec.optimizer;
  return `${kind}, learning rate ${lr}${momentum ? `, momentum ${momentum}` : ""}`;
}
