// What has happened to a learner that does not train, and what to do about it.

import { h } from "./dom.js";
import * as format from "./format.js";

export function quarantineNotice({ id, spec, quarantine }) {
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
