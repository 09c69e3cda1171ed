"use strict";
// Text of models and prompts comes in by textContent and createTextNode alone, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const MASK = "\u00b7", SPECIAL = "\u25ab";
  const SPEEDS = [1, 2, 4, 8, 16, 32, 64];
  const view = { race: 0, step: 0, timer: null, panels: [] };

  const make = (name, parent, text, kind) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    if (parent) parent.append(element);
    return element;
  };

  // What a trace says of the canvas after its k-th forward; `dllm_jax/viewer/trace.py` has the same rules.
  const textOf = (trace, token) => (trace.specials.includes(token) ? SPECIAL : trace.pieceById[token] ?? `<${token}>`);
  const finalText = (trace, place) => (trace.specials.includes(trace.tokens[place]) ? SPECIAL : trace.pieces[place]);
  const stepOf = (trace, k) => trace.steps[k - 1] ?? {};
  const endOf = (trace, k) => (k < trace.steps.length ? trace.steps[k].end : trace.lastEnd);
  const blockOf = (trace, k) => {
    if (k > trace.nfe) return [0, 0];
    const [first, behind] = stepOf(trace, Math.max(k, 1)).block ?? [0, trace.tokens.length];
    return [first, Math.min(behind, k ? endOf(trace, k - 1) : trace.tokens.length)];
  };

  function cellsOf(trace, k) {
    const step = stepOf(trace, k), phase = trace.phases[k - 1] ?? {};
    const end = endOf(trace, k), [first, behind] = blockOf(trace, k);
    const slot = new Map((step.open ?? []).map((place, i) => [place, i]));
    const seeds = new Set(phase.seeds), clusters = phase.clusters_after ?? [];
    const opens = new Set(clusters.map((each) => each[0])), closes = new Set(clusters.map((each) => each[1]));
    const gone = new Map((step.retracted ?? []).map(([place, token]) => [place, token]));
    const later = new Map(trace.lost.filter((what) => what[2] <= k).map(([place, token, since]) => [place, [token, since]]));
    for (const one of trace.steps.slice(k).reverse()) {
      for (const [place, token, since] of one.retracted ?? []) if (since <= k) later.set(place, [token, since]);
    }
    return trace.tokens.map((token, place) => {
      const committed = trace.commitStep[place], i = slot.get(place);
      const cell = {
        place, state: "masked", token: null, text: finalText(trace, place), confidence: null, since: 0,
        open: place >= first && place < behind, seed: seeds.has(place), opens: opens.has(place), closes: closes.has(place),
        filter: i === undefined || !step.filter ? null : step.filter[i],
        draft: i === undefined ? null : { token: step.draft[i], confidence: step.confidence[i] },
      };
      if (place >= end) {
        cell.state = "cut";
      } else if (committed > 0 && committed <= k) {
        Object.assign(cell, { token, since: committed, confidence: trace.confidence[place] });
        cell.state = committed === k ? "now" : "earlier";
      } else if (later.has(place)) {
        const [held, since] = later.get(place);
        Object.assign(cell, { token: held, since, text: textOf(trace, held), state: since === k ? "now" : "earlier" });
      } else if (gone.has(place)) {
        Object.assign(cell, { state: "retracted", text: textOf(trace, gone.get(place)) });
      } else if (trace.policy === "apd" && cell.draft) {
        Object.assign(cell, { state: "rejected", text: textOf(trace, cell.draft.token) });
      }
      return cell;
    });
  }

  const isMask = (cell) => ["masked", "rejected", "retracted"].includes(cell.state);

  function countsOf(trace, k) {
    const cells = cellsOf(trace, k);
    const written = cells.filter((cell) => cell.state === "now" || cell.state === "earlier").length;
    const sure = trace.confidence.filter((_, place) => k && trace.commitStep[place] === k);
    return {
      masks: cells.filter(isMask).length,
      committed: cells.filter((cell) => cell.state === "now").length,
      rate: k ? written / k : 0,
      least: sure.length ? Math.min(...sure) : null,
      mean: sure.length ? sure.reduce((sum, each) => sum + each, 0) / sure.length : null,
    };
  }

  // Cividis, which keeps its order for the colour-blind and in grey: dark blue to yellow.
  const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120],
    [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];
  const heat = (share) => {
    const x = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1), i = Math.min(Math.floor(x), CIVIDIS.length - 2);
    return CIVIDIS[i].map((low, c) => Math.round(low + (x - i) * (CIVIDIS[i + 1][c] - low)));
  };
  const css = (rgb) => `rgb(${rgb.join(",")})`;

  const shown = (text) => [...text].map((c) => (/\s/.test(c) ? c : MASK)).join("");
  // A token without a width of its own still takes a place.
  const filled = (text) => (text === "" ? "\u200b\u00a0" : text);

  function write(element, text) {
    element.replaceChildren();
    text.split(/(\r\n|\n|\r)/).forEach((part, i) => {
      if (i % 2 === 0) {
        if (part) element.append(part.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0))));
      } else {
        make("span", element, undefined, "nl");
        element.append("\n");
      }
    });
  }

  function paint(element, cell, trace) {
    const colour = at("colour").value, written = cell.state === "now" || cell.state === "earlier";
    const asDraft = at("drafts").checked && cell.state === "masked" && cell.draft && view.step > 0;
    const text = asDraft ? textOf(trace, cell.draft.token) : cell.state === "masked" ? shown(cell.text) : cell.text;
    element.dataset.state = cell.state;
    write(element, filled(text));
    const on = { open: cell.open && cell.state !== "cut", seed: cell.seed, opens: cell.opens, closes: cell.closes,
      draft: asDraft, filtered: cell.filter !== null, "cut-here": cell.state === "cut" && cell.cutHere };
    for (const name in on) element.classList.toggle(name, Boolean(on[name]));
    element.style.setProperty("--share", `${100 * (cell.filter ?? 0)}%`);
    delete element.dataset.heat;
    if (colour !== "state" && written && (colour === "order" || cell.confidence !== null)) {
      const rgb = heat(colour === "order" ? cell.since / trace.nfe : cell.confidence);
      element.dataset.heat = "";
      element.style.setProperty("--heat", css(rgb));
      element.style.setProperty("--heat-ink", 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 125 ? "#111" : "#fff");
    }
  }

  // Curves over the forwards of all decoders, so that they can be compared.
  function chart(panel, title, most, draw) {
    const figure = make("figure", panel.article), caption = make("figcaption", figure);
    make("span", caption, title);
    const value = make("b", caption, "");
    const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg");
    svg.setAttribute("viewBox", `0 0 ${panel.forwards} 100`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", title);
    figure.append(svg);
    const add = (name, kind, given) => {
      const element = document.createElementNS(space, name);
      element.setAttribute("class", kind);
      for (const key in given) element.setAttribute(key, given[key]);
      svg.append(element);
      return element;
    };
    const height = (x) => 96 - (92 * x) / (most || 1);
    draw(add, height);
    const cursor = add("line", "cursor", { y1: 0, y2: 100 });
    return { value, move: (k) => ["x1", "x2"].forEach((name) => cursor.setAttribute(name, k)) };
  }

  function charts(panel) {
    const counts = panel.counts, number = (x) => (x === null ? "" : x.toFixed(3));
    const level = (pick, height) => counts.slice(1).map((each, k) => {
      const y = pick(each) === null ? null : height(pick(each)).toFixed(2);
      return y === null ? "" : `${k && pick(counts[k]) !== null ? "L" : "M"}${k} ${y}H${k + 1}`;
    }).join("") || "M0 0";
    const masks = (add, height) => {
      const points = counts.map((each, k) => `${k} ${height(each.masks).toFixed(2)}`);
      add("path", "curve", { d: `M${points.join("L")}` });
    };
    const most = Math.max(...counts.map((each) => each.committed), 1);
    const bars = (add, height) => counts.forEach((each, k) => {
      if (k) add("rect", "bar", { x: k - 0.9, width: 0.8, y: height(each.committed), height: 96 - height(each.committed) });
    });
    const sure = (add, height) => {
      add("path", "curve", { d: level((each) => each.mean, height) });
      add("path", "curve second", { d: level((each) => each.least, height) });
    };
    panel.charts = [
      [chart(panel, "masks left", counts[0].masks, masks), (each) => `${each.masks}`],
      [chart(panel, `tokens per forward (at most ${most})`, most, bars), (each) => `${each.committed}`],
      [chart(panel, "confidence of the committed: mean, least (dashed)", 1, sure),
        (each) => (each.mean === null ? "" : `${number(each.mean)}, ${number(each.least)}`)],
    ];
  }

  function build(trace, forwards) {
    const panel = { trace, forwards, cells: [], counters: {} };
    panel.counts = Array.from({ length: trace.nfe + 1 }, (_, k) => countsOf(trace, k));
    panel.article = make("article", at("panels"));
    const head = make("header", panel.article);
    make("h2", head, trace.label);
    panel.badge = make("span", head, "", "done");
    const list = make("dl", panel.article);
    const names = ["forward", "committed now", "masks left", "tokens / forward", ...(trace.phases.length ? ["phase"] : [])];
    for (const name of names) {
      const pair = make("div", list);
      make("dt", pair, name);
      panel.counters[name] = make("dd", pair, "");
    }
    const canvas = make("div", panel.article, undefined, "canvas");
    canvas.setAttribute("tabindex", "0");
    trace.tokens.forEach((_, place) => {
      const element = make("span", canvas, undefined, "cell");
      element.dataset.position = place;
      panel.cells.push(element);
    });
    canvas.addEventListener("mousemove", (event) => hover(event, panel));
    canvas.addEventListener("click", (event) => hover(event, panel));
    canvas.addEventListener("mouseleave", leave);
    charts(panel);
    return panel;
  }

  function draw(panel) {
    const { trace } = panel, k = Math.min(view.step, trace.nfe);
    panel.now = cellsOf(trace, view.step);
    const cut = panel.now.findIndex((cell) => cell.state === "cut");
    if (cut >= 0) panel.now[cut].cutHere = true;
    panel.now.forEach((cell, place) => paint(panel.cells[place], cell, trace));
    const counts = panel.counts[k];
    const values = { "forward": `${k} / ${trace.nfe}`, "committed now": view.step > k ? 0 : counts.committed, "masks left": counts.masks,
      "tokens / forward": counts.rate.toFixed(2), "phase": (trace.phases[k - 1] ?? {}).phase ?? "\u2013" };
    for (const name in panel.counters) panel.counters[name].textContent = values[name];
    const ended = view.step >= trace.nfe;
    panel.article.classList.toggle("ended", ended);
    panel.badge.textContent = ended ? `done: ${trace.nfe} forward${trace.nfe === 1 ? "" : "s"}, ${trace.finish}` : "decoding";
    for (const [one, say] of panel.charts) { one.move(k); one.value.textContent = say(counts); }
  }

  function told(cell, trace) {
    const quoted = (token) => `${JSON.stringify(token in trace.pieceById ? trace.pieceById[token] : cell.token === token ? trace.pieces[cell.place] : "")} (id ${token})`;
    const lines = [`position ${cell.place}, block ${Math.floor(cell.place / trace.blockLength)}${cell.open ? ", open" : ""}`];
    if (cell.token !== null) {
      lines.push(`token ${quoted(cell.token)}`, `committed in forward ${cell.since} of ${trace.nfe}`);
      if (cell.confidence !== null) lines.push(`confidence ${cell.confidence.toFixed(4)}`);
    } else {
      lines.push({ masked: "masked", cut: "behind the end of the row", rejected: "masked: the draft was not accepted",
        retracted: "masked again by this forward" }[cell.state]);
    }
    if (cell.draft && cell.token === null) {
      lines.push(`proposed ${quoted(cell.draft.token)}${cell.draft.confidence === null ? "" : `, confidence ${cell.draft.confidence.toFixed(4)}`}`);
    }
    if (cell.filter !== null) lines.push(`the filter says ${cell.filter.toFixed(4)}`);
    if (cell.seed) lines.push("a seed of this forward");
    return lines.join("\n");
  }

  function hover(event, panel) {
    leave();
    const element = event.target.closest(".cell");
    if (!element) return;
    const box = at("hover"), place = Number(element.dataset.position);
    box.textContent = told(panel.now[place], panel.trace);
    view.panels.forEach((each) => each.cells[place]?.classList.add("hot"));
    box.hidden = false;
    const x = Math.min(event.clientX + 14, window.innerWidth - box.offsetWidth - 6);
    const y = event.clientY + 20 + box.offsetHeight > window.innerHeight ? event.clientY - box.offsetHeight - 12 : event.clientY + 20;
    box.style.left = `${Math.max(x, 4)}px`;
    box.style.top = `${Math.max(y, 4)}px`;
  }

  function leave() {
    at("hover").hidden = true;
    for (const each of document.querySelectorAll(".cell.hot")) each.classList.remove("hot");
  }

  function legend() {
    const list = at("legend"), race = data.races[view.race], colour = at("colour").value;
    list.replaceChildren();
    const traces = race.traces;
    const some = (test) => traces.some((trace) => trace.steps.some(test));
    const entry = (text, state, kinds, word) => {
      const item = make("li", list), sample = make("span", item, word, `cell ${kinds ?? ""}`);
      if (state) sample.dataset.state = state;
      make("span", item, text);
      return sample;
    };
    entry("masked", "masked", "", "\u00b7\u00b7\u00b7\u00b7");
    if (some((step) => step.block[1] - step.block[0] < traces[0].tokens.length)) entry("open block", "masked", "open", "\u00b7\u00b7\u00b7\u00b7");
    if (colour === "state") {
      entry("committed now", "now", "", "word");
      entry("committed earlier", "earlier", "", "word");
    } else {
      const item = make("li", list);
      make("span", item, colour === "order" ? "first" : "confidence 0");
      const scale = make("span", item, undefined, "scale");
      scale.style.background = `linear-gradient(to right, ${CIVIDIS.map(css).join(",")})`;
      make("span", item, colour === "order" ? "last" : "1");
    }
    if (traces.some((trace) => trace.policy === "apd")) entry("draft that was not accepted", "rejected", "", "word");
    if (some((step) => step.retracted)) entry("masked again", "retracted", "", "word");
    if (traces.some((trace) => trace.phases.length)) {
      entry("seed", "now", "seed", "word");
      entry("cluster", "earlier", "opens closes", "word");
    }
    if (some((step) => step.filter)) entry("what the filter says, 0 to 1", "masked", "filtered", "\u00b7\u00b7\u00b7\u00b7").style.setProperty("--share", "70%");
    if (traces.some((trace) => trace.lastEnd < trace.tokens.length)) entry("cut: behind the end", "cut", "cut-here", "\u00b7\u00b7\u00b7");
    entry("token that is no text", "earlier", "", SPECIAL);
  }

  function show(step) {
    const most = Number(at("slider").max);
    view.step = Math.min(Math.max(step, 0), most);
    at("slider").value = view.step;
    at("where").textContent = `forward ${view.step} of ${most}`;
    document.documentElement.dataset.step = view.step;
    leave();
    view.panels.forEach(draw);
  }

  function play(on) {
    window.clearTimeout(view.timer);
    view.timer = null;
    const most = Number(at("slider").max);
    if (on && view.step >= most) show(0);
    at("play").textContent = on ? "Pause" : "Play";
    document.documentElement.dataset.playing = on;
    if (!on) return;
    const tick = () => {
      show(view.step + 1);
      if (view.step >= most) play(false);
      else view.timer = window.setTimeout(tick, 1000 / Number(at("speed").value));
    };
    view.timer = window.setTimeout(tick, 1000 / Number(at("speed").value));
  }

  function open(race, step) {
    play(false);
    view.race = Math.min(Math.max(race, 0), data.races.length - 1);
    const { prompt, traces } = data.races[view.race];
    const forwards = Math.max(...traces.map((trace) => trace.nfe));
    at("prompts").value = String(view.race);
    at("earlier").disabled = view.race === 0;
    at("later").disabled = view.race === data.races.length - 1;
    at("prompt").textContent = prompt;
    at("panels").replaceChildren();
    at("panels").dataset.count = traces.length;
    at("slider").max = forwards;
    const wanted = forwards / 8;
    at("speed").value = String(SPEEDS.reduce((best, each) => (Math.abs(each - wanted) < Math.abs(best - wanted) ? each : best)));
    view.panels = traces.map((trace) => build(trace, forwards));
    legend();
    show(step);
  }

  data.races.forEach((race, i) => { make("option", at("prompts"), race.id).value = String(i); });
  SPEEDS.forEach((each) => { make("option", at("speed"), `${each} forward${each > 1 ? "s" : ""}/s`).value = String(each); });
  at("choice").hidden = data.races.length < 2;
  at("left").textContent = data.note;
  at("prompts").addEventListener("change", () => open(Number(at("prompts").value), 0));
  at("earlier").addEventListener("click", () => open(view.race - 1, 0));
  at("later").addEventListener("click", () => open(view.race + 1, 0));
  at("play").addEventListener("click", () => play(view.timer === null));
  at("slider").addEventListener("input", () => { play(false); show(Number(at("slider").value)); });
  const moves = { first: () => 0, back: () => view.step - 1, forth: () => view.step + 1, last: () => Infinity };
  for (const id in moves) at(id).addEventListener("click", () => { play(false); show(moves[id]()); });
  at("colour").addEventListener("change", () => { legend(); show(view.step); });
  at("drafts").addEventListener("change", () => show(view.step));
  const keys = { ArrowLeft: "back", ArrowRight: "forth", Home: "first", End: "last", " ": "play" };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    if (event.target.closest("button, select, input, summary")) return;
    event.preventDefault();
    at(keys[event.key]).click();
  });
  // "#2/15": the second prompt at step 15.
  const fromAddress = () => {
    const [race, step] = window.location.hash.slice(1).split("/").map(Number);
    open((race || 1) - 1, step || 0);
  };
  window.addEventListener("hashchange", fromAddress);
  fromAddress();
})();
