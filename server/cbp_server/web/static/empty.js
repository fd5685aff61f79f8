// What stands in place of a list without learners: how to make one.

import { h, setText } from "./dom.js";

export function emptyState() {
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
