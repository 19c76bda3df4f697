"use strict";
(function () {
  const data = JSON.parse(document.getElementById("rows").textContent);
  const body = document.getElementById("table-body");
  const search = document.getElementById("search");
  const filter = document.getElementById("filter");
  const count = document.getElementById("count");
  const page = 25;
  let start = 0, sorted = null, down = false;

  const prompts = data.rows.length ? data.rows[0].replies.map((_, i) => i) : [];

  function rate(row, i) {
    const reply = row.replies[i];
    return reply ? reply[1] / reply[0] : -1;
  }
  function passes(row) {
    const rates = prompts.map((i) => rate(row, i)).filter((r) => r >= 0);
    if (filter.value === "disagree") return Math.max(...rates) > Math.min(...rates);
    if (filter.value === "wrong") return Math.max(...rates) === 0;
    if (filter.value === "switched") return row.chosen !== null && row.chosen !== data.best;
    return true;
  }
  function holds(row, words) {
    const texts = [row.query, row.query_id, row.answer || ""];
    for (const reply of row.replies) if (reply) texts.push(reply[2]);
    const all = texts.join("\n").toLowerCase();
    return words.every((word) => all.includes(word));
  }
  function element(name, text, kind) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }
  function cell(row, i) {
    const td = element("td", undefined, row.chosen === i ? "chosen" : "");
    const reply = row.replies[i];
    if (!reply) { td.textContent = "not run"; return td; }
    const [runs, right, text] = reply;
    const kind = right === runs ? "right" : right === 0 ? "wrong" : "part";
    const sign = kind === "right" ? "✓ right" : kind === "wrong" ? "✗ wrong" : "± mixed";
    const details = element("details");
    details.append(element("summary", sign + (runs > 1 ? " " + right + "/" + runs : ""), kind));
    const pre = element("pre", text || "(no text in the log)");
    pre.dir = "auto";
    details.append(pre);
    td.append(details);
    return td;
  }
  function draw() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let rows = data.rows.filter((row) => passes(row) && holds(row, words));
    if (sorted !== null) {
      const key = sorted === -1 ? (row) => row.query.toLowerCase() : (row) => rate(row, sorted);
      rows = rows.slice().sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (down ? -1 : 1));
    }
    if (start >= rows.length) start = 0;
    body.textContent = "";
    for (const row of rows.slice(start, start + page)) {
      const tr = element("tr");
      const query = element("td", row.query, "query");
      query.dir = "auto";
      if (row.answer) { query.append(element("div", "answer: " + row.answer, "small")); }
      tr.append(query);
      for (const i of prompts) tr.append(cell(row, i));
      body.append(tr);
    }
    const end = Math.min(start + page, rows.length);
    count.textContent = rows.length ? start + 1 + "–" + end + " of " + rows.length + " queries" : "no query fits";
    document.getElementById("previous").disabled = start === 0;
    document.getElementById("next").disabled = end >= rows.length;
  }
  function move(by) {
    start = Math.max(0, start + by);
    draw();
    const other = document.getElementById(by > 0 ? "previous" : "next");
    if (document.getElementById(by > 0 ? "next" : "previous").disabled) other.focus();
  }
  search.addEventListener("input", () => { start = 0; draw(); });
  filter.addEventListener("change", () => { start = 0; draw(); });
  document.getElementById("previous").addEventListener("click", () => move(-page));
  document.getElementById("next").addEventListener("click", () => move(page));
  for (const button of document.querySelectorAll("th button[data-sort]")) {
    button.addEventListener("click", () => {
      const key = button.dataset.sort === "query" ? -1 : Number(button.dataset.sort);
      down = sorted === key ? !down : key !== -1;
      sorted = key;
      for (const th of document.querySelectorAll("#table th")) th.removeAttribute("aria-sort");
      button.parentElement.setAttribute("aria-sort", down ? "descending" : "ascending");
      start = 0;
      draw();
    });
  }
  draw();
})();
