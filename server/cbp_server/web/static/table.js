// A table of names and numbers that is changed in place.

import { h, setText } from "./dom.js";
import { NONE } from "./format.js";

export class PlainTable {
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
    const shown = this.columns.map((_, column) => texts.some((row) => row[column] !== NONE));
    entries.forEach(([name], index) => setText(this.body.rows[index].cells[0], name));
    [...this.element.querySelectorAll("tr")].forEach((row, index) => {
      [...row.cells].slice(1).forEach((cell, column) => {
        cell.hidden = !shown[column];
        if (index > 0) setText(cell, texts[index - 1][column]);
      });
    });
  }
}
