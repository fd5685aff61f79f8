// What the list and the page of one learner both say of a learner.

import { h, setClass, setText } from "./dom.js";
import * as format from "./format.js";

// Change per second over the last few polls.
export class Rate {
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

export const hiddenLayers = (learner) => (learner.plasticity?.layers ?? []).filter(({ layer }) => layer !== "output");

export function dormantShare(learner) {
  const layers = hiddenLayers(learner).filter((layer) => layer.dormant_fraction !== null);
  const units = layers.reduce((sum, layer) => sum + layer.units, 0);
  return units ? layers.reduce((sum, layer) => sum + layer.units * layer.dormant_fraction, 0) / units : null;
}

export function effectiveRank(learner) {
  const last = hiddenLayers(learner).at(-1);
  return last?.effective_rank == null ? "–" : `${format.decimal(last.effective_rank)} / ${last.units}`;
}

// What each state but active looks like, and means. That a learner waits for somebody matters more than where it is.
const STATES = {
  unavailable: { look: "bad", about: "The engine process is down, or restoring it." },
  evicted: { look: "away", about: "Idle, and out of memory. Its first use brings it back." },
  quarantined: { look: "notable", about: "It could not learn a batch. It predicts, and trains once it is resumed." },
};

export function showState(element, learner) {
  const state = learner.quarantine ? "quarantined" : learner.state;
  setText(element, state);
  element.title = STATES[state]?.about ?? "";
  for (const { look } of Object.values(STATES)) setClass(element, look, STATES[state]?.look === look);
}

export const learnerLink = (id) => h("a", { href: `#/learners/${encodeURIComponent(id)}` }, id);
