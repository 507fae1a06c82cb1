"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const MAX_STEPS = 600000; // of all traces; more are counted, but not drawn one by one

  // ---- text of others ---------------------------------------------------------------------
  // Control characters and those that change the direction of text are shown by their number.
  const HIDDEN = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
  const code = (c) => "\u27e8U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "\u27e9";
  const shown = (text) => String(text).replace(HIDDEN, code);
  const short = (text, most) => (text.length > most ? text.slice(0, most - 1) + "\u2026" : text);
  const say = (element, text) => { if (element.textContent !== text) element.textContent = text; };
  const make = (tag, text) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; return e; };

  // ---- what is known ----------------------------------------------------------------------
  const known = { groups: new Map(), traces: new Map(), rids: new Map(), pool: [], time: 0, lost: 0, steps: 0 };

  function forgetAll() {
    known.groups.clear(); known.traces.clear(); known.rids.clear();
    known.pool = []; known.lost = 0; known.steps = 0;
  }

  function apply(update) {
    if (update.full) forgetAll();
    known.time = update.time;
    known.lost += update.lost || 0;
    for (const event of update.events || []) take(event);
    for (const sample of update.pool || []) known.pool.push(sample);
    if (known.pool.length > 8000) known.pool.splice(0, known.pool.length - 6000);
    for (const trace of known.traces.values()) trace.runs = false;
    const progress = update.progress || {};
    (progress.traces || []).forEach((number, i) => {
      const trace = known.traces.get(number);
      if (trace && trace.ended === null) { trace.runs = true; trace.tokens = progress.tokens[i]; trace.kv = progress.kv[i]; }
    });
  }

  function take(event) {
    if (event.kind === "group") {
      known.groups.set(event.group, { number: event.group, name: shown(event.name), began: event.time, traces: [], votes: [],
        expected: 1, last: event.time, replica: event.replica || 0 });
    } else if (event.kind === "trace") {
      const group = known.groups.get(event.group);
      if (!group || known.traces.has(event.trace)) return;
      const trace = { number: event.trace, group, place: group.traces.length, rid: event.rid, began: event.time, prompt: event.prompt_tokens,
        before: { tokens: event.tokens || 0, steps: event.steps || 0, score: event.score === undefined ? null : event.score },
        tokens: event.tokens || 0, kv: 0, runs: false, times: [], at: [], scores: [], means: [], texts: null,
        count: event.steps || 0, sum: (event.score || 0) * (event.steps || 0),
        ended: null, fate: "", reason: "", freed: 0, last: null, answer: null, branch: event.branch || null };
      known.traces.set(event.trace, trace);
      known.rids.set(event.rid, trace);
      group.traces.push(trace);
      group.expected = Math.max(group.expected, event.expected || 1);
      group.last = Math.max(group.last, event.time);
    } else if (event.kind === "steps") {
      const trace = known.traces.get(event.trace);
      if (!trace) return;
      event.scores.forEach((score, i) => {
        trace.sum += score; trace.count += 1;
        if (known.steps >= MAX_STEPS) return;
        known.steps += 1;
        trace.times.push(event.times[i]); trace.at.push(event.positions[i] + 1);
        trace.scores.push(score); trace.means.push(trace.sum / trace.count);
        if (event.texts) { trace.texts = trace.texts || []; trace.texts[trace.scores.length - 1] = event.texts[i]; }
        trace.tokens = Math.max(trace.tokens, event.positions[i] + 1);
        trace.group.last = Math.max(trace.group.last, event.times[i]);
      });
    } else if (event.kind === "end") {
      const trace = known.traces.get(event.trace);
      if (!trace || trace.ended !== null) return;
      Object.assign(trace, { ended: event.time, fate: event.fate, reason: event.reason || "", freed: event.freed || 0,
        tokens: event.tokens, last: event.score === undefined ? null : event.score, runs: false, kv: 0 });
      trace.group.last = Math.max(trace.group.last, event.time);
    } else if (event.kind === "answer") {
      const trace = known.traces.get(event.trace);
      if (trace) trace.answer = shown(event.answer);
    } else if (event.kind === "vote") {
      const group = known.groups.get(event.group);
      if (group) { group.votes.push(event); group.last = Math.max(group.last, event.time); }
    } else if (event.kind === "gone") {
      for (const number of event.groups) {
        const group = known.groups.get(number);
        if (!group) continue;
        known.groups.delete(number);
        for (const trace of group.traces) {
          known.traces.delete(trace.number); known.steps -= trace.times.length;
          if (known.rids.get(trace.rid) === trace) known.rids.delete(trace.rid);
        }
      }
    }
  }

  // ---- how it stood at a time -------------------------------------------------------------
  function countUntil(times, time) {
    let low = 0, high = times.length;
    while (low < high) { const middle = (low + high) >> 1; if (times[middle] <= time) low = middle + 1; else high = middle; }
    return low;
  }

  // Tokens between two known moments are drawn on a line; steps, ends and votes are exact.
  function stood(trace, time) {
    if (time >= known.time) {
      const steps = trace.times.length;
      const score = trace.ended !== null ? trace.last : trace.count ? trace.sum / trace.count : null;
      const fate = trace.ended !== null ? trace.fate : trace.runs ? "running" : "waiting";
      return { began: true, tokens: trace.tokens, steps, score, fate, count: trace.count };
    }
    if (time < trace.began) return { began: false, tokens: 0, steps: 0, score: null, fate: "", count: 0 };
    const steps = countUntil(trace.times, time);
    if (trace.ended !== null && trace.ended <= time) {
      return { began: true, tokens: trace.tokens, steps, score: trace.last, fate: trace.fate, count: trace.count };
    }
    const from = steps ? [trace.times[steps - 1], trace.at[steps - 1]] : [trace.began, trace.before.tokens];
    const to = steps < trace.times.length ? [trace.times[steps], trace.at[steps]]
      : [trace.ended !== null ? trace.ended : known.time, trace.tokens];
    const part = to[0] > from[0] ? (time - from[0]) / (to[0] - from[0]) : 1;
    const tokens = Math.round(from[1] + part * (to[1] - from[1]));
    const score = steps ? trace.means[steps - 1] : trace.before.score;
    return { began: true, tokens, steps, score, fate: tokens > 0 ? "running" : "waiting", count: trace.before.steps + steps };
  }

  // ---- what is chosen ---------------------------------------------------------------------
  const data = $("recording").textContent.trim();
  const recorded = data !== "";
  document.body.dataset.mode = recorded ? "recording" : "live";
  const view = { group: null, lane: null, step: null, peek: null, time: Infinity, playing: false, tick: 0, rows: [], height: 12 };
  const groupOf = () => known.groups.get(view.group) || null;
  const range = (group) => [group.began, Math.max(group.last, group.began + 0.001)];

  function choose(number) {
    view.group = number; view.lane = view.step = view.peek = null;
    const group = groupOf();
    if (recorded && group) { view.playing = false; seek(range(group)[1]); }
    $("lanes").scrollTop = 0;
    draw();
  }

  function chooseNewest() {
    if (!recorded && !$("follow").checked && groupOf()) return;
    let newest = null;
    for (const group of known.groups.values()) {
      if (!newest || group.expected >= Math.min(newest.expected, 2)) { newest = group; if (recorded) break; }
    }
    if (newest && newest.number !== view.group) choose(newest.number);
  }

  // ---- colours ----------------------------------------------------------------------------
  const look = { scale: [] };
  function readTheme() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["back", "text", "dim", "line", "track", "none", "accent", "used", "cached", "warn"]) {
      look[name] = style.getPropertyValue("--" + name).trim();
    }
    const stops = style.getPropertyValue("--score").trim().split(/\s+/)
      .map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    look.scale = Array.from({ length: 65 }, (_, i) => {
      const x = (i / 64) * (stops.length - 1), j = Math.min(stops.length - 2, Math.floor(x));
      return `rgb(${stops[j].map((v, k) => Math.round(v + (x - j) * (stops[j + 1][k] - v))).join(",")})`;
    });
    const canvas = $("scale"), pen = canvas.getContext("2d");
    for (let i = 0; i < canvas.width; i++) {
      pen.fillStyle = look.scale[Math.round((64 * i) / (canvas.width - 1))]; pen.fillRect(i, 0, 1, canvas.height);
    }
  }
  let low = 0, high = 1;
  const shade = (score) => Math.max(0, Math.min(64, Math.round((64 * (score - low)) / (high - low))));

  function theme(name) {
    document.documentElement.dataset.theme = name;
    say($("theme"), name === "dark" ? "Light" : "Dark");
    readTheme();
  }

  // ---- drawing ----------------------------------------------------------------------------
  function fit(canvas, height) {
    const width = canvas.clientWidth, ratio = Math.min(2, window.devicePixelRatio || 1);
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
      canvas.style.height = height + "px";
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    return [pen, width];
  }

  function rows(group) {
    const all = group.traces.map((trace) => [trace, stood(trace, view.time)]).filter(([, at]) => at.began);
    const order = $("order").value;
    if (order === "score") return all.sort((a, b) => (b[1].score ?? -1) - (a[1].score ?? -1));
    if (order === "tokens") return all.sort((a, b) => b[1].tokens - a[1].tokens);
    if (!all.some(([trace]) => trace.branch)) return all;
    // Branches stand below the trace whose text they continue.
    const below = new Map(), roots = [], mine = new Map(all.map((row) => [row[0].rid, row]));
    for (const row of all) {
      const parent = row[0].branch && mine.get(row[0].branch.parent);
      if (parent && parent !== row) { if (!below.has(parent)) below.set(parent, []); below.get(parent).push(row); } else roots.push(row);
    }
    const sorted = [], stack = roots.reverse(), seen = new Set();
    while (stack.length) {
      const row = stack.pop();
      if (seen.has(row)) continue;
      seen.add(row); sorted.push(row);
      stack.push(...(below.get(row) || []).reverse());
    }
    for (const row of all) if (!seen.has(row)) sorted.push(row);
    return sorted;
  }

  function drawLanes(group) {
    view.rows = group ? rows(group) : [];
    const count = view.rows.length, box = $("lanes");
    view.height = count <= 24 ? 18 : count <= 72 ? 13 : count <= 300 ? 7 : 5;
    const total = Math.max(60, count * view.height + 6), visible = Math.min(total, Math.max(180, window.innerHeight * 0.6));
    box.style.height = visible + 2 + "px";
    $("spacer").style.height = Math.max(0, total - visible) + "px";
    const [pen, width] = fit($("lane-canvas"), visible);
    if (!group) return;
    low = 0; high = 1;
    if ($("stretch").checked) {
      const scores = view.rows.map(([, at]) => at.score).filter((score) => score !== null);
      if (scores.length > 1) { low = Math.min(...scores); high = Math.max(low + 0.02, Math.max(...scores)); }
    }
    say($("low"), low.toFixed(low ? 2 : 0)); say($("high"), high.toFixed(high === 1 ? 0 : 2));
    const named = view.height >= 11, left = named ? 38 : 8, right = named ? 118 : 22;
    const most = Math.max(16, ...group.traces.map((trace) => trace.tokens));
    const scale = (width - left - right) / most;
    view.scale = scale; view.left = left;
    const first = Math.max(0, Math.floor(box.scrollTop / view.height) - 1);
    const last = Math.min(count, Math.ceil((box.scrollTop + visible) / view.height) + 1);
    pen.font = `${Math.min(11, view.height - 3)}px system-ui, sans-serif`;
    pen.textBaseline = "middle";
    const places = new Map(view.rows.map(([trace], i) => [trace.rid, i]));
    for (let i = first; i < last; i++) {
      const [trace, at] = view.rows[i];
      drawLane(pen, trace, at, i * view.height - box.scrollTop + 3, left, scale, named, width, places, i);
    }
  }

  function drawLane(pen, trace, at, top, left, scale, named, width, places, row) {
    const height = view.height, thick = Math.max(2, height - (height > 8 ? 5 : 1)), middle = top + thick / 2;
    const chosen = view.lane === trace.number || view.peek === trace.number;
    if (chosen) { pen.fillStyle = look.track; pen.fillRect(0, top - 2, width, height); }
    if (named) { pen.fillStyle = look.dim; pen.textAlign = "right"; pen.fillText(String(trace.place + 1), left - 8, middle); pen.textAlign = "left"; }
    const x = (tokens) => left + tokens * scale;
    let from = 0;
    if (trace.branch) {
      from = trace.branch.position;
      const parent = places.get(trace.branch.parent);
      if (parent !== undefined) {
        pen.strokeStyle = look.dim; pen.lineWidth = 1; pen.beginPath();
        pen.moveTo(x(from), middle + (parent - row) * height + thick / 2); pen.lineTo(x(from), middle); pen.lineTo(x(from) + 3, middle); pen.stroke();
      }
    }
    const over = at.fate === "pruned" || at.fate === "aborted" || at.fate === "cancelled";
    pen.globalAlpha = over ? 0.62 : 1;
    // One rectangle for neighbours of one colour.
    const part = (start, end, colour) => { pen.fillStyle = colour; pen.fillRect(x(start), top, Math.max(0.5, x(end) - x(start)), thick); };
    let begin = from, colour = trace.before.score === null ? look.none : look.scale[shade(trace.before.score)];
    const steps = at.steps;
    for (let j = 0; j < steps; j++) {
      if (trace.at[j] <= from) continue;
      const next = look.scale[shade(trace.means[j])];
      const start = j ? Math.max(from, trace.at[j - 1]) : Math.max(from, trace.before.tokens);
      if (next !== colour) { if (start > begin) part(begin, start, colour); begin = Math.max(begin, start); colour = next; }
    }
    if (at.tokens > begin) part(begin, at.tokens, colour);
    if (steps && scale * (at.tokens / steps) > 4 && height >= 7) {
      pen.fillStyle = look.back;
      for (let j = 0; j < steps; j++) if (trace.at[j] > from) pen.fillRect(x(trace.at[j]) - 0.5, top, 1, thick);
    }
    pen.globalAlpha = 1;
    if (chosen && view.step !== null && view.step < steps) {
      pen.strokeStyle = look.text; pen.lineWidth = 1.5;
      const start = view.step ? trace.at[view.step - 1] : from;
      pen.strokeRect(x(start), top - 1, Math.max(2, x(trace.at[view.step]) - x(start)), thick + 2);
    }
    const end = x(Math.max(at.tokens, from)) + 3;
    pen.fillStyle = pen.strokeStyle = look.text;
    const size = Math.max(1.6, Math.min(3.4, thick / 2 - 0.4));
    let word = "";
    if (at.fate === "finished") {
      pen.beginPath(); pen.arc(end + size, middle, size, 0, 7); pen.fill();
      word = trace.answer === null ? "" : short(trace.answer, 16);
    } else if (at.fate === "pruned") {
      pen.lineWidth = Math.max(1, size / 2); pen.beginPath();
      pen.moveTo(end, middle - size); pen.lineTo(end + 2 * size, middle + size);
      pen.moveTo(end, middle + size); pen.lineTo(end + 2 * size, middle - size); pen.stroke();
      word = trace.reason;
    } else if (at.fate === "aborted") { pen.fillRect(end, middle - size, 2 * size, 2 * size); word = "aborted"; }
    else if (at.fate === "cancelled") { pen.lineWidth = 1; pen.strokeRect(end, middle - size, 2 * size, 2 * size); }
    else if (at.fate === "waiting" && named) { word = "waits"; }
    if (named && word) { pen.fillStyle = at.fate === "finished" ? look.text : look.dim; pen.fillText(word, end + 2 * size + 4, middle); }
  }

  function drawPool(group) {
    const height = 130, [pen, width] = fit($("pool"), height);
    const replica = group ? group.replica : 0;
    let [from, to] = group && recorded ? range(group) : [known.time - 90, known.time];
    const end = Math.min(view.time, to);
    const samples = known.pool.filter((s) => (s.replica || 0) === replica && s.time >= from - 1 && s.time <= end);
    if (!recorded && samples.length) { from = Math.max(from, Math.min(samples[0].time, to - 20)); }
    const size = Math.max(1, ...samples.map((s) => (s.size ? s.size : (s.used + s.cached) * 1.05)));
    const x = (time) => ((time - from) / Math.max(0.001, to - from)) * width, y = (tokens) => height - 2 - (tokens / size) * (height - 14);
    const area = (value, colour) => {
      if (!samples.length) return;
      pen.fillStyle = colour; pen.beginPath(); pen.moveTo(x(samples[0].time), height);
      for (const sample of samples) pen.lineTo(x(sample.time), y(value(sample)));
      pen.lineTo(x(samples[samples.length - 1].time), height); pen.fill();
    };
    area((s) => s.used + s.cached, look.cached); area((s) => s.used, look.used);
    const limit = samples.some((s) => s.size);
    if (limit) { pen.fillStyle = look.text; pen.fillRect(0, y(size), width, 1); }
    pen.fillStyle = look.warn;
    for (const one of group ? known.groups.values() : []) {
      if (recorded && one !== group) continue;
      for (const trace of one.traces) {
        if (trace.fate === "pruned" && trace.ended >= from && trace.ended <= end) pen.fillRect(x(trace.ended) - 0.5, 0, 1.5, 10);
      }
    }
    const now = samples[samples.length - 1];
    say($("pool-text"), !now ? "nothing known" : `${now.used} tokens used${now.cached ? `, ${now.cached} cached` : ""}${now.size ? ` of ${now.size}` : ""}`);
    say($("pool-key"), limit ? "· line: the pool's size" : samples.length ? "· counted from the traces' tokens; the pool's size was not recorded" : "");
    if (now && !recorded) say($("load"), `${now.running} requests run, ${now.waiting} wait`);
  }

  function drawVote(group) {
    const list = $("vote"), votes = group ? group.votes.filter((vote) => vote.time <= view.time) : [];
    const vote = votes[votes.length - 1];
    if (!vote || !vote.bars.length) { list.replaceChildren(); say($("verdict"), group ? "no answer yet" : ""); return; }
    const total = vote.bars.reduce((sum, bar) => sum + bar.weight, 0) || 1;
    list.replaceChildren(...vote.bars.map((bar, i) => {
      const item = make("li"), full = make("span"), part = make("span");
      if (i === 0) item.className = "winner";
      full.className = "full"; part.className = "part"; part.style.width = `${(100 * bar.weight) / Math.max(total, 1e-9)}%`;
      full.append(part);
      item.append(make("bdi", short(shown(bar.answer), 200)), full, make("small", `${((100 * bar.weight) / total).toFixed(0)} % · ${bar.count} trace${bar.count === 1 ? "" : "s"}`));
      return item;
    }));
    let settled = null;
    for (const one of votes) { if (!one.settled) settled = null; else if (settled === null) settled = one.time; }
    const words = { calibrated: "weighted by the odds of being right", weighted: "weighted by trace score", majority: "one vote each", best: "the best trace alone" };
    say($("verdict"), (settled === null ? "It can still change; " : `Nothing could change it from ${(settled - group.began).toFixed(1)} s on; `)
      + (words[vote.vote] || shown(vote.vote)) + (vote.as_text ? ", answers compared as text" : "") + ".");
  }

  const FATES = ["running", "waiting", "finished", "pruned", "aborted", "cancelled"];
  function drawCounts(group) {
    const counts = new Map(FATES.map((fate) => [fate, 0]));
    for (const [, at] of view.rows) counts.set(at.fate, (counts.get(at.fate) || 0) + 1);
    const list = [["traces", view.rows.length], ...[...counts].filter(([fate, n]) => n || fate === "running" || fate === "pruned" || fate === "finished")];
    if (group && group.expected > group.traces.length) list.push(["to come", group.expected - group.traces.length]);
    $("counts").replaceChildren(...list.map(([name, n]) => {
      const pair = make("div"); pair.dataset.count = name;
      pair.append(make("dt", name), make("dd", String(n))); return pair;
    }));
    say($("name"), group ? group.name : "no group yet");
  }

  const described = (at, trace) => (at.fate === "pruned" ? `pruned (${trace.reason || "no reason known"})` : at.fate);
  function drawLaneText() {
    const number = view.peek !== null ? view.peek : view.lane, trace = known.traces.get(number), box = $("lane");
    const canvas = $("history");
    canvas.hidden = !trace;
    if (!trace) { box.replaceChildren(make("p", "Point at a trace, or choose one with the arrow keys.")); box.firstChild.className = "hint"; return; }
    const at = stood(trace, view.time), lines = [];
    const score = at.score === null ? "no score yet" : `trace score ${at.score.toFixed(3)}`;
    lines.push(make("p", `Trace ${trace.place + 1}: ${described(at, trace)}, ${at.tokens} tokens, ${trace.kv ? `${trace.kv} KV tokens, ` : trace.freed ? `${trace.freed} KV tokens freed, ` : ""}${at.count} steps, ${score}`
      + (trace.answer !== null && at.fate === "finished" ? `, answer ${short(trace.answer, 200)}` : "") + (trace.branch ? `; branch of depth ${trace.branch.depth}` : "")));
    const step = view.step === null ? at.steps - 1 : Math.min(view.step, at.steps - 1);
    if (step >= 0) {
      lines.push(make("p", `Step ${trace.before.steps + step + 1}: score ${trace.scores[step].toFixed(3)}, ends at token ${trace.at[step]}`));
      const text = trace.texts && trace.texts[step];
      if (text) { const block = make("div", shown(text)); block.className = "text"; block.dir = "auto"; lines.push(block); }
    }
    const id = make("p"); id.className = "hint"; id.append("request ", make("bdi", shown(trace.rid))); lines.push(id);
    box.replaceChildren(...lines);
    const height = 70, [pen, width] = fit(canvas, height), most = Math.max(1, at.steps);
    pen.fillStyle = look.line; pen.fillRect(0, height / 2, width, 1);
    const x = (j) => ((j + 0.5) / most) * width, y = (value) => 4 + (1 - value) * (height - 8);
    pen.strokeStyle = look.text; pen.lineWidth = 1.5; pen.beginPath();
    for (let j = 0; j < at.steps; j++) { if (j) pen.lineTo(x(j), y(trace.means[j])); else pen.moveTo(x(j), y(trace.means[j])); }
    pen.stroke();
    for (let j = 0; j < at.steps; j++) {
      pen.fillStyle = look.scale[shade(trace.scores[j])];
      const big = j === step ? 5 : 3; pen.fillRect(x(j) - big / 2, y(trace.scores[j]) - big / 2, big, big);
    }
  }

  let listed = "";
  function drawGroups() {
    const groups = [...known.groups.values()];
    const some = recorded ? groups : groups.reverse().slice(0, 120);
    const words = some.map((group) => {
      const fates = new Map();
      for (const trace of group.traces) { const fate = trace.ended === null ? "live" : trace.fate; fates.set(fate, (fates.get(fate) || 0) + 1); }
      return [group, `${group.traces.length} trace${group.traces.length === 1 ? "" : "s"}` + [...fates].map(([fate, n]) => `, ${n} ${fate}`).join("")];
    });
    const now = view.group + words.map(([group, text]) => group.number + text).join("|");
    if (now === listed) return;
    listed = now;
    const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.group : undefined;
    $("groups").replaceChildren(...words.map(([group, text]) => {
      const item = make("li"), button = make("button");
      button.type = "button"; button.dataset.group = String(group.number);
      button.setAttribute("aria-current", String(group.number === view.group));
      button.append(make("bdi", short(group.name, 60)), make("small", text));
      button.addEventListener("click", () => { $("follow").checked = false; choose(group.number); });
      item.append(button); return item;
    }));
    if (focused !== undefined) { const again = document.querySelector(`#groups button[data-group="${Number(focused)}"]`); if (again) again.focus(); }
  }

  function drawTable() {
    if (!$("all").open) return;
    $("rows").replaceChildren(...view.rows.map(([trace, at]) => {
      const row = make("tr"); row.dataset.rid = trace.rid;
      for (const cell of [trace.place + 1, shown(trace.rid), at.tokens, trace.kv || "", at.count, at.score === null ? "" : at.score.toFixed(4),
        described(at, trace), trace.answer !== null && at.fate === "finished" ? trace.answer : ""]) {
        const td = make("td"); td.append(make("bdi", String(cell))); row.append(td);
      }
      return row;
    }));
  }

  let asked = false, tabled = 0;
  function draw() {
    if (asked) return;
    asked = true;
    requestAnimationFrame((now) => {
      asked = false;
      if (view.playing) step(now);
      const group = groupOf();
      drawLanes(group); drawCounts(group); drawVote(group); drawPool(group); drawLaneText(); drawGroups();
      if (now - tabled > 450 || !view.playing) { tabled = now; drawTable(); }
      if (recorded && group) {
        const [from, to] = range(group);
        $("at").value = String((view.time - from) / (to - from));
        say($("clock"), `${(view.time - from).toFixed(1)} s of ${(to - from).toFixed(1)} s`);
        say($("play"), view.playing ? "Pause" : "Play");
      }
      if (view.playing) draw();
    });
  }

  // ---- replay -----------------------------------------------------------------------------
  function seek(time) { view.time = time; draw(); }
  function step(now) {
    const group = groupOf();
    if (!group) return;
    const to = range(group)[1];
    view.time = Math.min(to, view.time + ((now - view.tick) / 1000) * Number($("speed").value));
    view.tick = now;
    if (view.time >= to) view.playing = false;
  }
  function play() {
    const group = groupOf();
    if (!group) return;
    view.playing = !view.playing;
    if (view.playing) { const [from, to] = range(group); if (view.time >= to) view.time = from; view.tick = performance.now(); }
    draw();
  }
  function nextPrune() {
    const group = groupOf();
    if (!group) return;
    const times = group.traces.filter((trace) => trace.fate === "pruned").map((trace) => trace.ended).sort((a, b) => a - b);
    const at = view.time >= range(group)[1] ? -Infinity : view.time;
    const next = times.find((time) => time > at);
    if (next !== undefined) { view.playing = false; seek(next); }
  }
  $("play").addEventListener("click", play);
  $("next").addEventListener("click", nextPrune);
  $("replay").addEventListener("submit", (event) => event.preventDefault());
  $("at").addEventListener("input", () => {
    const group = groupOf();
    if (group) { const [from, to] = range(group); view.playing = false; seek(from + Number($("at").value) * (to - from)); }
  });

  // ---- pointing and keys ------------------------------------------------------------------
  const lanes = $("lanes");
  function point(event) {
    const box = lanes.getBoundingClientRect();
    const row = view.rows[Math.floor((event.clientY - box.top + lanes.scrollTop - 3) / view.height)];
    if (!row) return null;
    const tokens = (event.clientX - box.left - view.left) / view.scale;
    const step = row[0].at.findIndex((at) => at >= tokens);
    return { lane: row[0].number, step: step >= 0 && step < row[1].steps ? step : null };
  }
  lanes.addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch") return;
    const at = point(event);
    view.peek = at ? at.lane : null; if (at) view.step = at.step; draw();
  });
  lanes.addEventListener("pointerleave", () => { view.peek = null; draw(); });
  lanes.addEventListener("click", (event) => {
    const at = point(event);
    if (at) { view.lane = at.lane; view.step = at.step; view.peek = null; draw(); }
  });
  lanes.addEventListener("scroll", draw);
  lanes.addEventListener("keydown", (event) => {
    const place = view.rows.findIndex(([trace]) => trace.number === view.lane), last = view.rows.length - 1;
    const page = Math.floor(lanes.clientHeight / view.height) - 1;
    const to = { ArrowDown: place + 1, ArrowUp: place < 0 ? last : place - 1, Home: 0, End: last, PageDown: place + page, PageUp: place - page }[event.key];
    if (to !== undefined && last >= 0) {
      const row = Math.max(0, Math.min(last, to));
      view.lane = view.rows[row][0].number; view.step = view.peek = null;
      const top = row * view.height;
      if (top < lanes.scrollTop) lanes.scrollTop = top;
      if (top + view.height + 6 > lanes.scrollTop + lanes.clientHeight) lanes.scrollTop = top + view.height + 6 - lanes.clientHeight;
    } else if ((event.key === "ArrowRight" || event.key === "ArrowLeft") && place >= 0) {
      const steps = view.rows[place][1].steps, at = view.step === null ? steps - 1 : view.step;
      view.step = steps ? Math.max(0, Math.min(steps - 1, at + (event.key === "ArrowRight" ? 1 : -1))) : null;
    } else return;
    event.preventDefault(); draw();
  });
  document.addEventListener("keydown", (event) => {
    if (!recorded || event.ctrlKey || event.metaKey || event.altKey || /^(BUTTON|SELECT|INPUT|SUMMARY)$/.test(event.target.tagName)) return;
    if (event.key === " ") { event.preventDefault(); play(); }
    if (event.key === "n" || event.key === "N") nextPrune();
  });
  for (const id of ["order", "stretch"]) $(id).addEventListener("change", draw);
  $("follow").addEventListener("change", () => { chooseNewest(); draw(); });
  $("all").addEventListener("toggle", draw);
  $("theme").addEventListener("click", () => { theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); draw(); });
  window.addEventListener("resize", draw);

  // ---- where it comes from ----------------------------------------------------------------
  function status(state, text) { $("status").dataset.state = state; say($("status"), text); }
  let heard = 0;
  function connect() {
    const source = new EventSource(new URL("step/events", document.baseURI));
    source.onmessage = (message) => {
      heard = performance.now();
      const update = JSON.parse(message.data);
      apply(update);
      if (update.full) view.lane = view.peek = null;
      status("live", known.lost ? `live; ${known.lost} events were left out` : "live");
      chooseNewest(); draw();
    };
    source.onerror = () => {
      status("lost", "The server does not answer. Trying again \u2026");
      if (source.readyState === EventSource.CLOSED) setTimeout(connect, 2000);
    };
  }
  setInterval(() => {
    if (!recorded && $("status").dataset.state === "live" && performance.now() - heard > 4000) status("slow", "no news for some seconds: the server is busy");
  }, 1000);

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  theme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => { theme(dark.matches ? "dark" : "light"); draw(); });
  if (recorded) {
    apply(JSON.parse(data));
    for (const trace of known.traces.values()) known.time = Math.max(known.time, trace.group.last);
    known.time += 1e-6; // every recorded moment is before it
    status("recording", "a recorded run");
    chooseNewest();
  } else connect();
  draw();
})();
