
"use strict";
/* The data (reporting/html.py, page_rows.py):
   rows: i index, l language, o original language, m input modality, p prompts, r one entry per run or null.
   A prompt: t pieces [text, is player, begins a message or a recording, seconds of sound], a recordings of its stretches of sound.
   A run's entry: q its prompt, v values of the players, a answer, w answer without the most important player,
   u values before normalizing and e their standard errors, where there are any, x interactions (i index, o order, m each player's
   values with each player, before normalizing, with itself its own),
   b value of no player, g of all, n coalitions evaluated, m answers generated, s seconds,
   t with stop_when: 1 where sampling stopped because standard errors are small enough, 0 where the budget was spent, k recording of a spoken answer.
   Recordings: d seconds, k outline, u WAV file in base64. Answers are positions in `answers`. */
(() => {
const SPANS_PER_PAGE = 1200, MOST_PER_PAGE = 50;
const data = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const state = { run: 0, page: 0, found: [], scale: 1, open: new Set() };

const show = value => {
  if (value === null) return "no value";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size < 0.001 ? value.toExponential(2) : value.toFixed(size < 0.1 ? 4 : 3);
  return value > 0 ? "+" + text : text;
};
const short = value => {
  if (value === null) return "";
  if (value === 0) return "0";
  const text = Math.abs(value) < 0.00005 ? value.toExponential(0) : value.toFixed(Math.abs(value) < 0.01 ? 3 : 2);
  return value > 0 ? "+" + text : text;
};
const number = (value, digits) => value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
const percent = value => value === null ? "–" : number(100 * value, 0) + "%";
const small = value => value === null ? "–" : value === 0 ? "0" : value < 0.001 ? value.toExponential(1) : number(value, value < 1 ? 4 : 2);

/* A table whose columns sort: [title, what is compared, what is shown]. What is null comes last. */
function table(place, columns, items, dress) {
  const head = place.tHead.insertRow();
  const draw = list => {
    const rows = list.map(item => {
      const row = make("tr");
      for (const [, read, say] of columns) row.append(make("td", "", say ? say(read(item)) : read(item)));
      dress(row, item);
      return row;
    });
    place.tBodies[0].replaceChildren(...rows);
  };
  columns.forEach(([title, read], position) => {
    const cell = make("th"), button = make("button", "", title);
    button.type = "button";
    cell.scope = "col";
    cell.append(button);
    head.append(cell);
    button.addEventListener("click", () => {
      const before = cell.getAttribute("aria-sort"), isText = position === 0;
      const order = before ? (before === "ascending" ? "descending" : "ascending") : isText ? "ascending" : "descending";
      for (const other of head.cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      draw([...items].sort((one, two) => {
        const [a, b] = [read(one), read(two)];
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (isText ? a.localeCompare(b, "en", { numeric: true }) : a - b);
      }));
    });
  });
  draw(items);
}

function drawTables() {
  const figures = [["samples", r => r.samples, v => number(v, 0)], ["failed", r => r.failed, v => number(v, 0)],
    ["coalitions / sample", r => r.n_calls, v => number(v, 1)], ["answers generated", r => r.model_calls, v => number(v, 0)],
    ["sure enough", r => r.sure, percent], ["seconds / sample", r => r.seconds, small], ["error", r => r.error, small],
    ["correlation with exact", r => r.correlation, v => number(v, 3)], ["rank correlation", r => r.spearman, v => number(v, 3)],
    ["top 3 shared", r => r.top, percent], ["same first", r => r.same_first, percent],
    ["signs changed", r => r.sign_changes, percent], ["share on text", r => r.frac_text, v => number(v, 3)],
    ["share on audio", r => r.frac_audio, v => number(v, 3)], ["residual, mean", r => r.residual, small],
    ["deletion area", r => r.deletion, v => number(v, 3)], ["insertion area", r => r.insertion, v => number(v, 3)],
    ["random area", r => r.random, v => number(v, 3)]];
  const hears = data.runs.some(run => run.frac_audio);
  const kept = figures.filter(([title, read]) => data.runs.some(run => read(run) !== null) && (hears || !title.startsWith("share")));
  table(get("runs"), [["run", r => r.name], ...kept], data.runs, (row, run) => {
    const position = data.runs.indexOf(run);
    row.dataset.run = position;
    row.classList.toggle("chosen", position === state.run);
    row.addEventListener("click", () => { get("run").value = position; chooseRun(position); });
  });
  data.runs.forEach((run, position) => get("run").append(new Option(run.name, position)));
  if (!data.pairs.length) return;
  get("compared").hidden = false;
  table(get("pairs"), [["runs", p => p.first + " ↔ " + p.second], ["rows", p => p.rows, v => number(v, 0)],
    ["rank correlation", p => p.spearman, v => number(v, 3)], ["correlation", p => p.pearson, v => number(v, 3)],
    ["top " + data.top_k + " shared", p => p.top, percent], ["same first", p => p.same_first, percent],
    ["signs changed", p => p.sign_changes, percent], ["mean |difference|", p => p.difference, small],
    ["same answer", p => p.same_answer, percent], ["not compared", p => p.left_out, v => number(v, 0)]], data.pairs, () => {});
}

const sized = (values, most) => values.reduce((found, value) => Math.max(found, Math.abs(value ?? 0)), most);
const shownRuns = row => get("side").checked ? row.r.filter(Boolean) : [row.r[state.run]];
const largest = row => shownRuns(row).reduce((most, run) => sized(run.v, most), 0);

function textOf(row) {
  return row.text ??= row.p.map(prompt => prompt.t.map(piece => piece[0] ?? "").join("")).join("\n").toLowerCase();
}

function search() {
  const wanted = get("filter").value.trim().toLowerCase(), exact = wanted.match(/^row:\s*(\d+)$/);
  const language = get("language").value, modality = get("modality").value;
  const answers = new Set();
  if (wanted && !exact) lowered.forEach((text, position) => { if (text.includes(wanted)) answers.add(position); });
  const side = get("side").checked;
  state.total = 0;
  state.found = data.rows.filter(row => {
    if (!side && !row.r[state.run]) return false;
    state.total += 1;
    if (language && row.l !== language || modality && row.m !== modality) return false;
    if (!wanted) return true;
    if (exact) return row.i === Number(exact[1]);
    return textOf(row).includes(wanted) || row.l.toLowerCase() === wanted || shownRuns(row).some(run => answers.has(run.a));
  });
  const keys = {
    row: row => row.i, largest: row => -largest(row), players: row => -shownRuns(row)[0].v.length,
    effect: row => { const { b, g } = shownRuns(row)[0]; return b === null || g === null ? Infinity : b - g; },
  };
  const key = keys[get("order").value];
  state.found = state.found.map(row => [key(row), row]).sort((a, b) => a[0] - b[0] || a[1].i - b[1].i).map(pair => pair[1]);
  state.scale = state.found.reduce((most, row) => Math.max(most, largest(row)), 0);
  state.page = 0;
  draw();
}

/* A page takes fewer rows when they are long: a browser lays out some thousand pieces at once. */
function pages() {
  const starts = [0];
  let spans = 0, rows = 0;
  state.found.forEach((row, position) => {
    const more = shownRuns(row).reduce((sum, run) => sum + run.v.length + 1 + (run.x ? run.x.m.length ** 2 : 0), 0);
    if (rows && (rows >= MOST_PER_PAGE || spans + more > SPANS_PER_PAGE)) { starts.push(position); spans = rows = 0; }
    spans += more;
    rows += 1;
  });
  return starts;
}

/* What is known of a player's value before normalizing: how sure it is. */
const sureness = (run, player) => {
  const error = run.e?.[player - 1] ?? null;
  return error === null ? "" : " · before normalizing " + show(run.u[player - 1]) + " ± " + small(error) + " (standard error)";
};

function dress(piece, value, top, scale, place, count, what) {
  const share = scale > 0 ? Math.min(1, Math.abs(value ?? 0) / scale) : 0;
  piece.classList.add("p");
  if (value < 0) piece.classList.add("neg");
  if (top > 0 && Math.abs(value) === top) piece.classList.add("top");
  piece.style.setProperty("--s", (100 * share).toFixed(1) + "%");
  piece.dataset.v = short(value);
  piece.dataset.tip = show(value) + " · player " + place + " of " + count + what;
}

/* What a piece is called in a sentence. */
function nameOf(prompt, player) {
  let place = -1, seconds = 0;
  for (const [text, isPlayer, begins, length] of prompt.t) {
    if (begins) seconds = 0;
    if (isPlayer) place += 1;
    if (isPlayer && place === player) {
      if (text) return "“" + text.trim() + "”";
      return prompt.a ? "segment " + (player + 1) + " (" + seconds.toFixed(2) + "–" + (seconds + length).toFixed(2) + " s)" : "segment " + (player + 1);
    }
    seconds += length ?? 0;
  }
  return "";
}

function drawSound(pieces, recording, run, player, top, scale) {
  const box = make("div", "sounds"), wave = make("div", "wave"), numbers = get("numbers").checked;
  if (numbers) { box.classList.add("values"); wave.classList.add("values"); }
  const known = recording === null || recording === undefined ? null : data.recordings[recording];
  const total = pieces.reduce((sum, piece) => sum + piece[3], 0);
  const gaps = known && Math.abs(total - known.d) > 0.02 * known.d;
  let seconds = 0;
  for (const [text, isPlayer, , length] of pieces) {
    const piece = make("span"), from = seconds;
    piece.style.flexGrow = length;
    seconds += length;
    if (isPlayer) {
      const value = run.v[player++] ?? null, when = known && !gaps ? " · " + from.toFixed(2) + "–" + seconds.toFixed(2) + " s" : "";
      dress(piece, value, top, scale, player, run.v.length, (text ? " · " + text : "") + when + sureness(run, player));
      if (known && !gaps) piece.addEventListener("click", () => play(recording, from, from + length, wave));
    } else piece.className = "rest";
    if (text) piece.append(make("span", "", text));
    wave.append(piece);
  }
  if (known) {
    wave.append(outline(known));
    box.append(playButton(recording, wave));
  }
  box.append(wave);
  if (gaps) box.title = "The segments leave gaps whose places are not recorded: they stand one after the other.";
  return [box, player];
}

function outline(recording) {
  const space = "http:" + "//www.w3.org/2000/svg", svg = document.createElementNS(space, "svg"), path = document.createElementNS(space, "path");
  svg.setAttribute("viewBox", "0 0 " + recording.k.length + " 200");
  svg.setAttribute("preserveAspectRatio", "none");
  path.setAttribute("d", recording.k.map((level, x) => "M" + x + " " + (99 - level) + "h1V" + (101 + level) + "h-1Z").join(""));
  svg.append(path);
  return svg;
}

function playButton(recording, wave) {
  const button = make("button", "play", "▶");
  button.type = "button";
  button.setAttribute("aria-label", "Play or stop");
  button.addEventListener("click", () => {
    if (playing.wave === wave && !player.paused) player.pause();
    else play(recording, 0, Infinity, wave, button);
  });
  return button;
}

const player = get("player"), playing = {};
function play(recording, from, until, wave, button) {
  player.pause();
  const source = "data:audio/wav;base64," + data.recordings[recording].u;
  if (playing.recording !== recording) player.src = source;
  playing.button && (playing.button.textContent = "▶");
  playing.at?.remove();
  Object.assign(playing, { recording, until, wave, button: button ?? wave.parentNode.querySelector("button"), at: make("div", "at") });
  wave.append(playing.at);
  player.currentTime = from;
  player.play().then(follow, () => {});
}
function follow() {
  playing.at.style.left = 100 * Math.min(1, player.currentTime / data.recordings[playing.recording].d) + "%";
  if (player.currentTime >= playing.until) player.pause();
  playing.button.textContent = player.paused ? "▶" : "❚❚";
  if (!player.paused) requestAnimationFrame(follow);
}
player.addEventListener("pause", () => { if (playing.button) playing.button.textContent = "▶"; });

/* Why a run's sampling stopped, as far as `stop_when` decides. */
function stopOf(run, stopAt) {
  if (run.t === undefined) return [];
  const small = "standard errors " + (stopAt === null ? "small enough" : "≤ " + stopAt);
  return [make("span", "", "stopped: " + (run.t ? small : "budget spent"))];
}

function drawPanel(row, run, name, stopAt) {
  const panel = make("div", "panel"), prompt = row.p[run.q], head = make("div", "head");
  if (name !== null) head.append(make("b", "", name));
  head.append(make("span", "", run.v.length + " players"), make("span", "", "v(∅) " + show(run.b) + ", v(N) " + show(run.g)),
    make("span", "", number(run.n, 0) + " coalitions, " + number(run.m, 0) + " generated"),
    ...stopOf(run, stopAt), make("span", "", number(run.s, 2) + " s"));
  panel.append(head);
  const top = sized(run.v, 0), scale = get("shared").checked ? state.scale : top, pieces = prompt.t;
  let line = null, player = 0, stretch = 0;
  for (let at = 0; at < pieces.length; at += 1) {
    const [text, isPlayer, beginsMessage, seconds] = pieces[at];
    if (beginsMessage) line = null;
    if (seconds !== undefined) {
      let end = at + 1;
      while (end < pieces.length && pieces[end][3] !== undefined && !pieces[end][2]) end += 1;
      const [box, next] = drawSound(pieces.slice(at, end), prompt.a?.[stretch], run, player, top, scale);
      panel.append(box);
      [player, stretch, at, line] = [next, stretch + 1, end - 1, null];
      continue;
    }
    if (!line) {
      // Each message has a direction of its own: one may be Arabic, the next English.
      line = make("p", "prompt" + (get("numbers").checked ? " values" : ""));
      line.dir = "auto";
      panel.append(line);
    }
    if (!isPlayer) { line.append(text); continue; }
    const value = run.v[player++] ?? null, blank = text.match(/^\s*/)[0];
    if (blank) line.append(blank);
    const piece = make("span", "", text.slice(blank.length));
    dress(piece, value, top, scale, player, run.v.length, sureness(run, player));
    line.append(piece);
  }
  if (run.x) panel.append(drawInteractions(prompt, run.x));
  panel.append(answer("answer", data.answers[run.a] || "(no text)"));
  if (run.k !== undefined) {
    const box = make("div", "sounds"), wave = make("div", "wave");
    wave.append(outline(data.recordings[run.k]));
    box.append(playButton(run.k, wave), wave);
    panel.append(box);
  }
  if (run.w !== undefined) {
    const name = nameOf(prompt, run.v.findIndex(value => Math.abs(value ?? 0) === top));
    panel.append(answer("without " + name, run.w === run.a ? "the same answer" : data.answers[run.w] || "(no text)", run.w === run.a));
  }
  return panel;
}

/* Each pair of players as a cell, coloured by the pair's interaction; a player's own value is on the diagonal. */
function drawInteractions(prompt, { i: index, o: order, m: matrix }) {
  const box = make("details", "interactions"), scroll = make("div", "scroll"), place = make("table"), players = labelsOf(prompt);
  const top = matrix.reduce((most, values, one) => sized(values.filter((_, other) => other !== one), most), 0);
  const numbers = get("numbers").checked, head = place.createTHead().insertRow(), body = place.createTBody();
  box.open = true;
  box.append(make("summary", "", "interactions of pairs · " + index + (order > 2 ? " of order " + order + ", of which larger sets are not shown" : "")));
  const heading = (player, scope) => {
    const cell = make("th"), label = make("span", players[player].short.length > 3 ? "long" : "", players[player].short);
    cell.scope = scope;
    cell.dataset.tip = players[player].long;
    cell.append(label);
    return cell;
  };
  head.append(make("td"), ...matrix.map((_, player) => heading(player, "col")));
  matrix.forEach((values, one) => {
    const row = body.insertRow();
    row.append(heading(one, "row"));
    values.forEach((value, other) => {
      const cell = row.insertCell(), isOwn = one === other, share = top > 0 && !isOwn ? Math.abs(value ?? 0) / top : 0;
      if (numbers) cell.textContent = short(value);
      cell.className = isOwn ? "own" : value < 0 ? "neg" : "";
      // Pairs that should be equal differ by rounding.
      if (share > 1 - 1e-9) cell.classList.add("top");
      cell.style.setProperty("--s", (100 * share).toFixed(1) + "%");
      cell.dataset.tip = (isOwn ? players[one].long + " alone" : players[one].long + " with " + players[other].long) + ": " + show(value);
    });
  });
  scroll.append(place);
  box.append(scroll);
  return box;
}

/* What each player is called: in a table, and in a sentence. */
function labelsOf(prompt) {
  const found = prompt.t.filter(piece => piece[1]);
  return found.map(([text, , , seconds], player) => ({
    short: (text ?? "").trim() || (seconds === undefined ? "·" : "♪ " + (player + 1)),
    long: nameOf(prompt, player),
  }));
}

function answer(title, text, isSoft) {
  const line = make("p", "answer");
  line.dir = "auto";
  line.append(make("b", "", title), isSoft ? make("span", "soft", text) : text);
  return line;
}

function drawRow(row) {
  const article = make("article"), head = make("div", "head"), side = get("side").checked || state.open.has(row);
  article.dataset.row = row.i;
  head.append(make("b", "", "row " + row.i), make("span", "", row.l));
  if (row.o !== "unknown" && row.o !== row.l) head.append(make("span", "", "from " + row.o));
  if (row.m !== "text") head.append(make("span", "", row.m));
  article.append(head);
  if (data.runs.length > 1 && !get("side").checked) {
    const button = make("button", "more", side ? "this run alone" : "all runs");
    button.type = "button";
    button.addEventListener("click", () => {
      side ? state.open.delete(row) : state.open.add(row);
      article.replaceWith(drawRow(row));
    });
    head.append(button);
  }
  if (!side) { article.append(drawPanel(row, row.r[state.run], null, data.runs[state.run].stop_at)); return article; }
  const panels = make("div", "panels");
  row.r.forEach((run, position) => { if (run) panels.append(drawPanel(row, run, data.runs[position].name, data.runs[position].stop_at)); });
  article.append(panels);
  return article;
}

function draw() {
  player.pause();
  const starts = pages(), start = starts[state.page], end = starts[state.page + 1] ?? state.found.length;
  const list = get("list");
  list.replaceChildren(...state.found.slice(start, end).map(drawRow));
  if (!state.found.length) list.append(make("p", "none", "No sample matches."));
  get("count").textContent = number(state.found.length, 0) + " of " + number(state.total, 0) + " samples";
  get("page").textContent = "page " + (state.page + 1) + " of " + starts.length;
  get("previous").disabled = state.page === 0;
  get("next").disabled = state.page >= starts.length - 1;
  const bound = get("shared").checked ? short(state.scale).replace("+", "") : " the row’s largest";
  get("low").textContent = "−" + bound;
  get("high").textContent = "+" + bound;
  for (const row of get("runs").tBodies[0].rows) row.classList.toggle("chosen", Number(row.dataset.run) === state.run);
}

function chooseRun(position) { state.run = position; search(); }
function turn(step) { state.page += step; draw(); get("list").scrollIntoView(); }

function fillChoices(id, read) {
  const choices = [...new Set(data.rows.map(read))].sort();
  get(id).append(new Option("all", ""), ...choices.map(choice => new Option(choice, choice)));
  get(id).parentNode.hidden = choices.length < 2;
  get(id).addEventListener("change", search);
}

const tip = make("div", "tip");
tip.hidden = true;
document.body.append(tip);
document.addEventListener("mouseover", event => {
  const piece = event.target.closest ? event.target.closest("[data-tip], svg.plot path[aria-label], svg.plot line[aria-label]") : null;
  tip.hidden = !piece;
  if (!piece) return;
  tip.textContent = piece.dataset.tip ?? piece.getAttribute("aria-label");
  const box = piece.getBoundingClientRect();
  tip.style.left = Math.max(scrollX + 8, Math.min(box.left + scrollX, scrollX + innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = box.top + scrollY - tip.offsetHeight - 4 + "px";
});

const lowered = data.answers.map(text => text.toLowerCase());
get("title").textContent = data.title;
document.title = data.title;
get("subtitle").textContent = data.subtitle;
get("notes").replaceChildren(...data.notes.map(note => make("li", "", note)));
get("plots").hidden = !document.querySelector("figure");
for (const label of document.querySelectorAll(".several")) label.hidden = data.runs.length < 2;
get("side").checked = data.side;
drawTables();
fillChoices("language", row => row.l);
fillChoices("modality", row => row.m);
let waiting;
get("filter").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
get("filter").addEventListener("change", () => { clearTimeout(waiting); search(); });
get("run").addEventListener("change", event => chooseRun(Number(event.target.value)));
get("side").addEventListener("change", search);
get("order").addEventListener("change", search);
get("shared").addEventListener("change", draw);
get("numbers").addEventListener("change", draw);
get("previous").addEventListener("click", () => turn(-1));
get("next").addEventListener("click", () => turn(1));
search();
})();
