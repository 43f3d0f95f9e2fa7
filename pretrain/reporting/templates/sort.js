
// A click on the name of a column sorts its table by it, the best, the largest or A first; another turns that round.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const column = button.parentNode, table = column.closest("table"), body = table.tBodies[0];
    const turned = { ascending: "descending", descending: "ascending" }[column.getAttribute("aria-sort")];
    const order = turned ?? column.dataset.first;
    const value = row => row.cells[column.cellIndex].dataset.value;
    const compare = (a, b) => column.dataset.words ? a.localeCompare(b) : a - b;
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === "" || b === "") return (a === "") - (b === "");  // what was not recorded stays last
      return order === "ascending" ? compare(a, b) : compare(b, a);
    });
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    column.setAttribute("aria-sort", order);
    body.append(...rows);
  });
}
