// One learner in full: facts, charts, layers, producers.

import { get } from "./api.js";
import { LineChart } from "./charts.js";
import { h, setClass, setText } from "./dom.js";
import { Rate, showState } from "./facts.js";
import * as format from "./format.js";
import { quarantineNotice } from "./quarantine.js";
import { PlainTable } from "./table.js";

const HISTORY = 400;

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

// Facts whose texts need the room of two.
const WIDE = new Set(["Methods", "Optimizer", "Resets", "Task", "Checkpoint", "Durability"]);

const DURABILITY = {
  fsync: "fsync: what is acknowledged survives a power cut",
  os: "os: what is acknowledged survives a crash of the server",
  none: "none: what came after the checkpoint can be lost",
};

const byStep = { label: "Step", format: format.short };

export class LearnerView {
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
      learner = await get(`v1/learners/${encodeURIComponent(this.id)}`);
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
      const history = await get(`v1/learners/${encodeURIComponent(this.id)}/plasticity?max_samples=${HISTORY}`);
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
