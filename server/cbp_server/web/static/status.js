// The status page: shows the view that the address names, and asks again every two seconds.

import { HttpError, get } from "./api.js";
import { setClass, setText } from "./dom.js";
import * as format from "./format.js";
import { LearnerView } from "./learner.js";
import { Overview } from "./overview.js";
import { showBanner, warnings } from "./warnings.js";

const POLL_MS = 2000;

const main = document.querySelector("#main");
const engine = document.querySelector("#engine");
const footer = document.querySelector("#footer");

let view = null;
let route = null;
let polling = null;
let lastAnswer = null;

function currentView() {
  if (location.hash === route) return view;
  const first = route === null;
  route = location.hash;
  const id = /^#\/learners\/(.+)$/.exec(route)?.[1];
  view = id === undefined ? new Overview(poll) : new LearnerView(decodeURIComponent(id));
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

async function refresh() {
  const shown = currentView();
  try {
    const server = await get("v1/server");
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
