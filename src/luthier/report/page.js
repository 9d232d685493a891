'use strict';
// Sorts tables and filters the browser of rows. The page is whole without it.
for (const table of document.querySelectorAll('table.sorts')) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') === 'ascending';
      heads.forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const key = row => {
        const cell = row.cells[column], value = cell.dataset.v;
        return value === undefined ? cell.textContent : Number(value);
      };
      const rows = [...body.rows].map(row => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (a === '' || b === '') return (a === '') - (b === '');  // nothing stands last, whatever the order
        const both = typeof a === 'number' && typeof b === 'number';
        const order = both ? a - b : String(a).localeCompare(String(b));
        return down ? -order : order;
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
const rows = document.querySelector('#rows table');
if (rows) {
  const made = (tag, facts) => Object.assign(document.createElement(tag), facts);
  const words = made('input', {type: 'search', id: 'words'});
  const which = made('select', {id: 'which'});
  which.append(made('option', {value: '', textContent: 'any run'}));
  const runs = JSON.parse(document.querySelector('#numbers').textContent).runs;
  const wrong = row => row.dataset.w.split(' ');
  const used = new Set([...rows.tBodies[0].rows].flatMap(wrong));
  runs.forEach((run, i) => {
    if (used.has(String(i))) which.append(made('option', {value: String(i), textContent: run.name}));
  });
  const count = made('output', {});
  const tools = made('div', {className: 'tools'});
  const labelled = (text, field) => { const label = made('label', {textContent: text + ' '}); label.append(field); return label; };
  tools.append(labelled('Rows with the words', words), labelled('answered wrongly by', which), count);
  document.querySelector('#rows .scroll').before(tools);
  const filter = () => {
    const wanted = words.value.toLowerCase();
    let shown = 0;
    for (const row of rows.tBodies[0].rows) {
      const fits = row.textContent.toLowerCase().includes(wanted)
        && (!which.value || wrong(row).includes(which.value));
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown + ' rows';
  };
  words.addEventListener('input', filter);
  which.addEventListener('change', filter);
  filter();
}
