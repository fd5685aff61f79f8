// What is wrong with the server, in the banner above everything.

import { h } from "./dom.js";
import { learnerLink } from "./facts.js";
import * as format from "./format.js";

const MOST_NAMED = 5;

const banner = document.querySelector("#banner");

// Each a list of texts and elements.
export function warnings({ ready, reasons, journal, learners, quarantined, unreadable }) {
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

export function showBanner(found) {
  const lines = found.map((parts) => h("p", {}, ...parts));
  const changed = lines.length !== banner.children.length || lines.some((line, index) => !line.isEqualNode(banner.children[index]));
  if (changed) banner.replaceChildren(...lines);
  banner.hidden = found.length === 0;
}
