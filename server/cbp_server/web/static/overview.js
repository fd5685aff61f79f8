// The list of all learners, with figures of the whole server.

import { get } from "./api.js";
import { h, setClass, setText } from "./dom.js";
import { emptyState } from "./empty.js";
import { Rate, dormantShare, effectiveRank, hiddenLayers, learnerLink, showState } from "./facts.js";
import * as format from "./format.js";

const PAGE = 50;
const NOTABLE_DORMANT = 0.3;

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

export class Overview {
  // onMore: called when more learners are to be shown.
  constructor(onMore) {
    this.onMore = onMore;
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
    const { learners, next_page_token: next } = await get(`v1/learners?page_size=${this.limit}`);
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
    this.onMore();
  }
}

// Nothing if all learners are active, as they mostly are.
function statesInWords(states, deleted) {
  const present = Object.entries(states).filter(([, number]) => number > 0);
  const parts = present.every(([state]) => state === "active") ? [] : present.map(([state, number]) => `${format.count(number)} ${state}`);
  if (deleted > 0) parts.push(`${format.count(deleted)} deleted, to be seen with cbp learners list --deleted`);
  return parts.join(" · ");
}
