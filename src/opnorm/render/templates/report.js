(() => {
  const table = document.getElementById("weights");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];

  const value = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? parseFloat(cell.dataset.value) : cell.textContent.trim();
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));

  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const first = head.dataset.kind === "number" && column > 0 ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    const sign = order === "ascending" ? 1 : -1;
    heads.forEach((one) => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    body.append(...[...rows].sort((a, b) => sign * compare(value(a, column), value(b, column))));
  }));

  const filter = document.getElementById("filter");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    });
    document.getElementById("shown").textContent = words.length ? `${shown} of ${rows.length}` : "";
  });

  document.querySelectorAll("#points use").forEach((point, index) => {
    const row = rows[index];
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = `${row.cells[1].textContent.trim()}: ${row.cells[4].textContent.trim()}`;
    point.append(title);
    point.addEventListener("click", () => {
      rows.forEach((one) => one.classList.toggle("target", one === row));
      row.hidden = false;
      row.scrollIntoView({ block: "center", behavior: "smooth" });
    });
  });
})();
