// The status page: a list of learners, and one learner in full. Asks the HTTP API again every two seconds.

import { LineChart } from "/static/charts.js";
import { h, setClass, setText } from "/static/dom.js";
import * as format from "/static/format.js";

const POLL_MS = 2000;
const TIMEOUT_MS = 5000;
const PAGE = 50;
const HISTORY = 400;
const NOTABLE_DORMANT = 0.3;
const MOST_NAMED = 5;

const main = document.querySelector("#main");
const banner = document.querySelector("#banner");
const engine = document.querySelector("#engine");
const footer = document.querySelector("#footer");

class HttpError extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function get(path) {
  const response = await fetch(path, { signal: AbortSignal.timeout(TIMEOUT_MS), headers: { Accept: "application/json" } });
  const body = await response.json();
  if (!response.ok) throw new HttpError(response.status, body.detail ?? response.statusText);
  return body;
}

// Change per second over the last few polls.
class Rate {
  constructor() {
    this.seen = [];
  }

  add(value) {
    const now = performance.now();
    if (this.seen.length > 0 && value < this.seen.at(-1).value) this.seen = [];
    this.seen.push({ now, value });
    if (this.seen.length > 6) this.seen.shift();
    const [first, last] = [this.seen[0], this.seen.at(-1)];
    return last.now > first.now ? (1000 * (last.value - first.value)) / (last.now - first.now) : null;
  }
}

const hiddenLayers = (learner) => (learner.plasticity?.layers ?? []).filter(({ layer }) => layer !== "output");

function dormantShare(learner) {
  const layers = hiddenLayers(learner).filter((layer) => layer.dormant_fraction !== null);
  const units = layers.reduce((sum, layer) => sum + layer.units, 0);
  return units ? layers.reduce((sum, layer) => sum + layer.units * layer.dormant_fraction, 0) / units : null;
}

function effectiveRank(learner) {
  const last = hiddenLayers(learner).at(-1);
  return last?.effective_rank == null ? "–" : `${format.decimal(last.effective_rank)} / ${last.units}`;
}

// What each state but active looks like, and means. That a learner waits for somebody matters more than where it is.
const STATES = {
  unavailable: { look: "bad", about: "The engine process is down, or restoring it." },
  evicted: { look: "away", about: "Idle, and out of memory. Its first use brings it back." },
  quarantined: { look: "notable", about: "It could not learn a batch. It predicts, and trains once it is resumed." },
};

function showState(element, learner) {
  const state = learner.quarantine ? "quarantined" : learner.state;
  setText(element, state);
  element.title = STATES[state]?.about ?? "";
  for (const { look } of Object.values(STATES)) setClass(element, look, STATES[state]?.look === look);
}

const learnerLink = (id) => h("a", { href: `#/learners/${encodeURIComponent(id)}` }, id);

// --- all learners ---------------------------------------------------------------------------------------------

const COLUMNS = [
  { key: "state", label: "State" },
  { key: "network", label: "Network", title: "Inputs, hidden layers, outputs, activation" },
  { key: "resets", label: "Resets", title: "Layers whose low-utility units are replaced" },
  { key: "steps", label: "Steps", number: true },
  { key: "rate", label: "Examples/s", number: true, title: "Over the last ten seconds" },
  { key: "loss", label: "Loss", number: true, title: "Average of predictions made before each update" },
  { key: "accuracy", label: "Accuracy", number: true, title: "Average of predictions made before each update" },
  { key: "task", label: "Task", title: "The label of the newest batches" },
  { key: "dormant", label: "Dormant", number: true, title: "Share of all hidden units" },
  { key: "weight", label: "Mean |w|", number: true, title: "First hidden layer" },
  { key: "rank", label: "Eff. rank", number: true, title: "Effective rank of the last hidden layer, of its units" },
];

class LearnerRow {
  constructor(id) {
    this.rate = new Rate();
    this.cells = Object.fromEntries(
      COLUMNS.map(({ key, label, number }) => [key, h("td", { class: number ? "number" : key, "data-label": label })]),
    );
    this.cells.state.append(h("span", { class: "state" }));
    const link = learnerLink(id);
    this.element = h(
      "tr",
      { onclick: (event) => event.target.closest("a") || getSelection().toString() || (location.hash = link.hash) },
      h("th", { scope: "row" }, link),
      ...Object.values(this.cells),
    );
  }

  update(learner) {
    const { spec, progress } = learner;
    const dormant = dormantShare(learner);
    showState(this.cells.state.firstChild, learner);
    const texts = {
      network: format.network(spec),
      resets: format.resets(spec),
      steps: format.count(progress.step),
      rate: format.rate(this.rate.add(progress.examples)),
      loss: format.decimal(progress.loss),
      accuracy: format.percent(progress.accuracy),
      task: progress.tasks.at(-1)?.task || "–",
      dormant: format.percent(dormant),
      weight: format.decimal(hiddenLayers(learner)[0]?.mean_abs_weight),
      rank: effectiveRank(learner),
    };
    for (const [key, text] of Object.entries(texts)) setText(this.cells[key], text);
    this.cells.task.title = texts.task;
    setClass(this.cells.dormant, "notable", dormant >= NOTABLE_DORMANT);
  }
}

class Overview {
  constructor() {
    this.limit = PAGE;
    this.rows = new Map();
    this.stepRate = new Rate();
    this.exampleRate = new Rate();
    this.figures = Object.fromEntries(
      ["Learners", "Steps/s", "Examples/s", "Queued batches", "Train streams"].map((label) => [label, h("dd")]),
    );
    this.summary = h(
      "dl",
      { class: "figures" },
      ...Object.entries(this.figures).map(([label, value]) => h("div", {}, h("dt", {}, label), value)),
    );
    this.states = h("p", { class: "states quiet" });
    this.body = h("tbody");
    this.more = h("button", { type: "button", class: "more", onclick: () => this.showMore() }, "Show more");
    this.table = h(
      "div",
      { class: "table-frame", role: "region", "aria-label": "Learners", tabindex: 0 },
      h(
        "table",
        { class: "learners" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("th", { scope: "col" }, "Learner"),
            ...COLUMNS.map(({ key, label, number, title }) => h("th", { scope: "col", class: number ? "number" : key, title }, label)),
          ),
        ),
        this.body,
      ),
    );
    this.empty = emptyState();
    this.element = h(
      "div",
      {},
      h("h1", {}, "Learners"),
      this.summary,
      this.states,
      this.table,
      this.more,
      this.empty,
    );
  }

  async refresh(server) {
    const { learners, next_page_token: next } = await get(`/v1/learners?page_size=${this.limit}`);
    const { deleted, ...states } = server.learners;
    const total = Object.values(states).reduce((sum, number) => sum + number, 0);
    const figures = {
      Learners: format.count(total),
      "Steps/s": format.rate(this.stepRate.add(server.steps)),
      "Examples/s": format.rate(this.exampleRate.add(server.examples)),
      "Queued batches": format.count(server.queued_batches),
      "Train streams": format.count(server.open_streams),
    };
    for (const [label, text] of Object.entries(figures)) setText(this.figures[label], text);
    setText(this.states, statesInWords(states, deleted));
    this.empty.hidden = learners.length > 0;
    this.summary.hidden = learners.length === 0;
    this.table.hidden = learners.length === 0;
    this.more.hidden = next === "";
    setText(this.more, `Show more (${format.count(total - learners.length)} not shown)`);

    const rows = new Map(learners.map(({ uid, id }) => [uid, this.rows.get(uid) ?? new LearnerRow(id)]));
    if ([...rows.keys()].join() !== [...this.rows.keys()].join()) {
      this.body.replaceChildren(...[...rows.values()].map(({ element }) => element));
    }
    this.rows = rows;
    for (const learner of learners) rows.get(learner.uid).update(learner);
    return "cbp server";
  }

  showMore() {
    this.limit = Math.min(1000, this.limit + PAGE);
    poll();
  }
}

// Nothing if all learners are active, as they mostly are.
function statesInWords(states, deleted) {
  const present = Object.entries(states).filter(([, number]) => number > 0);
  const parts = present.every(([state]) => state === "active") ? [] : present.map(([state, number]) => `${format.count(number)} ${state}`);
  if (deleted > 0) parts.push(`${format.count(deleted)} deleted, to be seen with cbp learners list --deleted`);
  return parts.join(" · ");
}

function emptyState() {
  const code = [
    "from cbp_client import Client",
    "",
    `with Client("${location.hostname || "localhost"}:50051") as client:`,
    "    learner = client.create_learner(",
    '        "clicks",',
    '        network={"kind": "mlp", "in_features": 64, "hidden": [100, 100], "out_features": 10},',
    '        loss="cross_entropy",',
    '        optimizer={"kind": "sgd", "lr": 0.01},',
    "    )",
    '    with learner.stream("web-1") as stream:',
    "        for features, targets in batches:",
    "            stream.send(features, targets)",
  ].join("\n");
  const copy = h("button", { type: "button" }, "Copy");
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code);
    setText(copy, "Copied");
  });
  return h(
    "section",
    { class: "empty", hidden: true },
    h("h2", {}, "No learners yet"),
    h("p", {}, "A learner appears here as soon as a client creates one. In Python, with ", h("code", {}, "pip install cbp-client"), ":"),
    h("div", { class: "snippet" }, h("pre", { tabindex: 0 }, h("code", {}, code)), navigator.clipboard ? copy : null),
    h("p", {}, "Or watch three learners at once: ", h("code", {}, "cbp demo"), "."),
  );
}

// --- one learner ----------------------------------------------------------------------------------------------

const LAYER_COLUMNS = [
  ["Units", (layer) => format.count(layer.units)],
  ["Replaced", (layer) => format.count(layer.replacements)],
  ["Dormant", (layer) => format.percent(layer.dormant_fraction)],
  ["Dead", (layer) => format.percent(layer.dead_fraction)],
  ["Saturated", (layer) => format.percent(layer.saturated_fraction)],
  ["Eff. rank", (layer) => format.decimal(layer.effective_rank)],
  ["Stable rank", (layer) => format.decimal(layer.stable_rank)],
  ["srank", (layer) => format.count(layer.srank)],
  ["Grad. rank", (layer) => format.decimal(layer.gradient_rank)],
  ["Mean |w|", (layer) => format.decimal(layer.mean_abs_weight)],
  ["Weight norm", (layer) => format.decimal(layer.weight_norm)],
  ["From start", (layer) => format.decimal(layer.distance_from_init)],
  ["Feature norm", (layer) => format.decimal(layer.feature_norm)],
  ["Grad. norm", (layer) => format.decimal(layer.gradient_norm)],
  ["Median age", (layer) => format.count(layer.age_quantiles.find(({ quantile }) => quantile === 0.5)?.value)],
];

const PRODUCER_COLUMNS = [
  ["Epoch", (producer) => format.count(producer.epoch)],
  ["Applied", (producer) => format.count(producer.applied_sequence)],
  ["On disk", (producer) => format.count(producer.durable_sequence)],
];

class PlainTable {
  constructor(caption, first, columns) {
    this.columns = columns;
    this.body = h("tbody");
    this.element = h(
      "section",
      {},
      h("h2", {}, caption),
      h(
        "div",
        { class: "table-frame", role: "region", "aria-label": caption, tabindex: 0 },
        h(
          "table",
          {},
          h("thead", {}, h("tr", {}, h("th", { scope: "col" }, first), ...columns.map(([label]) => h("th", { scope: "col", class: "number" }, label)))),
          this.body,
        ),
      ),
    );
  }

  // entries: [[name, value]]. A column in which nobody has anything is not shown.
  update(entries) {
    this.element.hidden = entries.length === 0;
    while (this.body.rows.length > entries.length) this.body.lastChild.remove();
    while (this.body.rows.length < entries.length) {
      this.body.append(h("tr", {}, h("th", { scope: "row" }), ...this.columns.map(() => h("td", { class: "number" }))));
    }
    const texts = entries.map(([, value]) => this.columns.map(([, show]) => show(value)));
    const shown = this.columns.map((_, column) => texts.some((row) => row[column] !== format.NONE));
    entries.forEach(([name], index) => setText(this.body.rows[index].cells[0], name));
    [...this.element.querySelectorAll("tr")].forEach((row, index) => {
      [...row.cells].slice(1).forEach((cell, column) => {
        cell.hidden = !shown[column];
        if (index > 0) setText(cell, texts[index - 1][column]);
      });
    });
  }
}

// Facts whose texts need the room of two.
const WIDE = new Set(["Methods", "Optimizer", "Resets", "Task", "Checkpoint", "Durability"]);

const DURABILITY = {
  fsync: "fsync: what is acknowledged survives a power cut",
  os: "os: what is acknowledged survives a crash of the server",
  none: "none: what came after the checkpoint can be lost",
};

const byStep = { label: "Step", format: format.short };

class LearnerView {
  constructor(id) {
    this.id = id;
    this.rate = new Rate();
    this.state = h("span", { class: "state" });
    this.notice = h("section", { class: "notice", "aria-label": "What this learner's state means", hidden: true });
    this.facts = new Map();
    this.list = h("dl", { class: "facts" });
    this.tasks = null;
    this.charts = {
      mean_abs_weight: new LineChart({
        title: "Mean |w|",
        about: "Incoming weights of each layer. Steady growth is a sign of plasticity loss.",
        x: byStep,
        y: { format: format.decimal, tick: format.plain },
        from: 0,
      }),
      dormant_fraction: new LineChart({
        title: "Dormant units",
        about: "Share of each hidden layer's units that hardly respond to anything.",
        x: byStep,
        y: { format: format.percent, tick: format.plainPercent },
        from: 0,
      }),
      effective_rank: new LineChart({
        title: "Effective rank",
        about: "How many directions each hidden layer's activations span.",
        x: byStep,
        y: { format: format.decimal, tick: format.plain },
        from: 0,
      }),
    };
    this.trainability = new LineChart({
      title: "Trainability",
      about: "How well a copy learns a fresh random task, relative to the first network. Falling is plasticity loss.",
      x: byStep,
      y: { format: format.percent, tick: format.plainPercent },
      from: 0,
      dots: true,
    });
    this.layers = new PlainTable("Layers, newest sample", "Layer", LAYER_COLUMNS);
    this.producers = new PlainTable("Producers", "Producer", PRODUCER_COLUMNS);
    this.chartGrid = h("div", { class: "charts" });
    this.element = h(
      "div",
      {},
      h("p", { class: "crumb" }, h("a", { href: "#/" }, "Learners")),
      h("h1", {}, id, this.state),
      this.notice,
      this.list,
      this.chartGrid,
      this.layers.element,
      this.producers.element,
    );
  }

  async refresh() {
    let learner;
    try {
      learner = await get(`/v1/learners/${encodeURIComponent(this.id)}`);
    } catch (error) {
      if (error.status !== 404) throw error;
      this.element.replaceChildren(
        h("p", { class: "crumb" }, h("a", { href: "#/" }, "Learners")),
        h("h1", {}, "No such learner"),
        h("p", {}, `There is no learner ${this.id}. It may have been deleted.`),
      );
      return "No such learner · cbp server";
    }
    if (this.tasks === null) this.addCharts(learner);
    showState(this.state, learner);
    this.showNotice(learner);
    this.showFacts(learner);
    this.showTasks(learner.progress);
    this.layers.update((learner.plasticity?.layers ?? []).map((layer) => [layer.layer, layer]));
    this.producers.update(learner.producers.map((producer) => [producer.producer, producer]));
    const newest = learner.plasticity && `${learner.uid} ${learner.plasticity.step}`;
    if (newest !== this.newest) {
      const history = await get(`/v1/learners/${encodeURIComponent(this.id)}/plasticity?max_samples=${HISTORY}`);
      this.showHistory(history.samples);
      this.newest = newest;
    }
    return `${this.id} · cbp server`;
  }

  addCharts(learner) {
    this.measure = learner.spec.loss.kind === "cross_entropy" || learner.progress.accuracy !== null ? "accuracy" : "loss";
    const about = "Mean over each task, every example predicted before it was learnt. Falling from task to task is plasticity loss.";
    this.tasks = new LineChart({
      title: this.measure === "accuracy" ? "Accuracy by task" : "Loss by task",
      about: this.measure === "accuracy" ? about : about.replace("Falling", "Rising"),
      x: { label: "Task", format: format.count, whole: true },
      y:
        this.measure === "accuracy"
          ? { format: format.percent, tick: format.plainPercent }
          : { format: format.decimal, tick: format.plain },
      dots: true,
    });
    this.trainability.element.hidden = true;
    this.chartGrid.append(
      this.tasks.element,
      ...Object.values(this.charts).map(({ element }) => element),
      this.trainability.element,
    );
  }

  showNotice(learner) {
    const key = JSON.stringify([learner.state, learner.quarantine]);
    if (key === this.noticeKey) return;
    this.noticeKey = key;
    this.notice.hidden = !learner.quarantine && learner.state !== "evicted";
    setClass(this.notice, "notable", learner.quarantine);
    this.notice.replaceChildren(...(learner.quarantine ? quarantineNotice(learner) : [h("p", {}, EVICTED)]));
  }

  showFacts(learner) {
    const { spec, progress, checkpoint } = learner;
    const behind = learner.journal_position - (checkpoint?.journal_position ?? 0);
    const replaced = Object.values(progress.replacements).reduce((sum, number) => sum + number, 0);
    const age = checkpoint && (Date.now() - new Date(checkpoint.time)) / 1000;
    const facts = {
      Network: format.network(spec),
      Loss: spec.loss.kind.replaceAll("_", " "),
      Optimizer: format.optimizer(spec),
      "Batch size": spec.batch_size === 0 ? "each message" : format.count(spec.batch_size),
      ...(spec.precision !== "float32" && { Precision: spec.precision }),
      Resets: format.resetsInFull(spec),
      ...(spec.methods?.length && { Methods: format.methods(spec) }),
      Steps: format.count(progress.step),
      Examples: format.count(progress.examples),
      "Examples/s": format.rate(this.rate.add(progress.examples)),
      "Average loss": format.decimal(progress.loss),
      "Average accuracy": format.percent(progress.accuracy),
      Task: progress.tasks.at(-1)?.task ? `${progress.tasks.at(-1).task} (number ${format.count(progress.task_count)})` : "–",
      "Units replaced": format.count(replaced),
      "Queued batches": format.count(learner.queued_batches),
      Checkpoint: checkpoint
        ? `step ${format.count(checkpoint.step)}, ${format.duration(age)} ago, ${format.bytes(checkpoint.size_bytes)}`
        : "none yet",
      Durability: DURABILITY[learner.durability],
      Engine: learner.engine,
      Journal: `${format.count(learner.journal_position)}${behind > 0 ? `, ${format.count(behind)} behind the checkpoint` : ""}`,
    };
    for (const [label, text] of Object.entries(facts)) {
      if (!this.facts.has(label)) {
        const value = h("dd");
        this.facts.set(label, value);
        this.list.append(h("div", { class: WIDE.has(label) ? "wide" : undefined }, h("dt", {}, label), value));
      }
      setText(this.facts.get(label), text);
    }
  }

  showTasks({ tasks, task_count: total }) {
    const points = tasks.map((task, index) => ({
      x: total - tasks.length + index + 1,
      y: task[this.measure],
      label: task.task || `task ${total - tasks.length + index + 1}`,
    }));
    const key = JSON.stringify(points);
    if (key === this.taskKey) return;
    this.taskKey = key;
    this.tasks.update([{ name: this.measure, points }]);
  }

  showHistory(samples) {
    const names = samples.at(-1)?.layers.map(({ layer }) => layer) ?? [];
    for (const [metric, chart] of Object.entries(this.charts)) {
      chart.update(
        names.map((name, index) => ({
          name,
          points: samples.map((sample) => ({ x: sample.step, y: sample.layers[index]?.[metric] })),
        })),
      );
    }
    const known = samples.map(({ trainability }) => trainability).filter((test) => test && test.score !== null);
    const tests = new Map(known.map(({ step, score }) => [step, score]));
    this.trainability.element.hidden = tests.size === 0;
    this.trainability.update([{ name: "score", points: [...tests].map(([x, y]) => ({ x, y })) }]);
  }
}

const EVICTED =
  "Idle, and out of memory. Nothing is lost: the first batch or prediction brings it back, as it was. Until then the " +
  "numbers are those that it left with.";

// What happened, and what to do about it.
function quarantineNotice({ id, spec, quarantine }) {
  const { producer, sequence, journal_position: position, reason, quarantine_time: time } = quarantine;
  const where = position > 0 ? `, at position ${format.count(position)} of the journal` : "";
  const choice = (command, meaning) => [h("dt", {}, h("code", {}, command)), h("dd", {}, meaning)];
  const lower = Number((spec.optimizer.lr / 10).toPrecision(2));
  const ways = [
    choice(`cbp learners resume ${id} --lr ${lower}`, "goes on at that batch, with a smaller learning rate"),
    position > 0
      ? choice(`cbp learners resume ${id} --skip-batch`, "leaves that batch out")
      : choice(`cbp learners resume ${id}`, "goes on; its client sends the batch again, or leaves it out"),
    choice(`cbp learners restore ${id} --checkpoint NUMBER`, "goes back to an earlier state, and does not learn again what came after"),
  ];
  return [
    h("h2", {}, "It does not train: a batch could not be learnt"),
    h("p", { class: "reason" }, reason),
    h(
      "p",
      {},
      `Batch ${format.count(sequence)} of producer ${producer}${where}, on ${format.moment(new Date(time))}. `,
      position > 0
        ? "The learner is as it was before that batch, and predicts. Nothing that was acknowledged is lost. Resume it:"
        : "The learner is as its newest checkpoint has it, and predicts. Resume it:",
    ),
    h("dl", { class: "ways" }, ...ways.flat()),
  ];
}

// --- the page -------------------------------------------------------------------------------------------------

let view = null;
let route = null;
let polling = null;
let lastAnswer = null;

function currentView() {
  if (location.hash === route) return view;
  const first = route === null;
  route = location.hash;
  const id = /^#\/learners\/(.+)$/.exec(route)?.[1];
  view = id === undefined ? new Overview() : new LearnerView(decodeURIComponent(id));
  if (!first) main.focus();
  return view;
}

function showServer(server) {
  const up = (new Date(server.time) - new Date(server.start_time)) / 1000;
  const texts = [server.engine.up ? "Engine up" : "Engine down", server.engine.device, `running ${format.duration(up)}`, `v${server.version}`];
  if (server.engine.restarts > 0) texts.splice(1, 0, format.plural(server.engine.restarts, "restart"));
  setText(engine, texts.join(" · "));
  setClass(engine, "bad", !server.engine.up);
  setText(footer, `torch ${server.torch_version} · engine memory ${format.bytes(server.engine.resident_bytes)} · as of ${format.clock(new Date())}`);
}

// Each a list of texts and elements.
function warnings({ ready, reasons, journal, learners, quarantined, unreadable }) {
  const found = Object.entries(unreadable).map(([id, reason]) => [`Learner ${id} could not be restored: ${reason}.`]);
  if (quarantined.length > 0) found.unshift(quarantineWarning(quarantined, learners.quarantined));
  if (!journal.up) {
    found.unshift([`Nothing is accepted: the journal cannot be written since ${format.moment(new Date(journal.since))}: ${journal.reason}.`]);
  }
  if (!ready) found.unshift([`Not ready: ${reasons.join("; ")}.`]);
  return found;
}

function quarantineWarning(ids, number) {
  const named = ids.slice(0, MOST_NAMED);
  const unnamed = Math.max(number, ids.length) - named.length;
  const names = named.flatMap((id, index) => (index === 0 ? [learnerLink(id)] : [", ", learnerLink(id)]));
  if (unnamed > 0) names.push(` and ${format.count(unnamed)} more`);
  return ["Quarantined, and waiting to be resumed: ", ...names, "."];
}

function showBanner(found) {
  const lines = found.map((parts) => h("p", {}, ...parts));
  const changed = lines.length !== banner.children.length || lines.some((line, index) => !line.isEqualNode(banner.children[index]));
  if (changed) banner.replaceChildren(...lines);
  banner.hidden = found.length === 0;
}

async function refresh() {
  const shown = currentView();
  try {
    const server = await get("/v1/server");
    showServer(server);
    const title = await shown.refresh(server);
    if (shown !== currentView()) return;
    if (shown.element.parentElement !== main) main.replaceChildren(shown.element);
    document.title = title;
    lastAnswer = new Date();
    showBanner(warnings(server));
  } catch (error) {
    const since = lastAnswer ? ` What you see is from ${format.clock(lastAnswer)}.` : "";
    const what = error instanceof HttpError ? `The server answered ${error.status}: ${error.message}.` : "The server does not answer.";
    showBanner([[`${what}${since} Trying again every ${POLL_MS / 1000} seconds.`]]);
    if (!(error instanceof HttpError)) {
      setText(engine, "Not reachable");
      setClass(engine, "bad", true);
    }
  }
}

// One request round at a time; asking during one starts the next as soon as it ends.
async function poll() {
  clearTimeout(polling);
  if (poll.busy) {
    poll.again = true;
    return;
  }
  poll.busy = true;
  do {
    poll.again = false;
    await refresh();
  } while (poll.again);
  poll.busy = false;
  if (!document.hidden) polling = setTimeout(poll, POLL_MS);
}

addEventListener("hashchange", (event) => {
  // The skip link's target is no view.
  if (location.hash === "#main") history.replaceState(null, "", new URL(event.oldURL).hash || "#/");
  else poll();
});
document.addEventListener("visibilitychange", () => document.hidden || poll());
poll();
