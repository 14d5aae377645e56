// The dashboard: asks /v1/stats and /v1/history and draws what they say. No libraries.
const POLL_MS = 2000;
const MAX_LOG_LINES = 1000;
const at = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// ---- token and theme -------------------------------------------------------------------
let token = sessionStorage.getItem("stockade-token") || "";
let asking = null;

function askToken() {
  asking ??= new Promise((resolve) => {
    const dialog = at("ask");
    at("ask-token").value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asking = null;
      if (dialog.returnValue !== "ok") return resolve(false);
      token = at("ask-token").value.trim();
      sessionStorage.setItem("stockade-token", token);
      resolve(true);
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

const dark = matchMedia("(prefers-color-scheme: dark)");
function applyTheme() {
  const chosen = localStorage.getItem("stockade-theme");
  document.documentElement.dataset.theme = chosen || (dark.matches ? "dark" : "light");
}
dark.addEventListener("change", applyTheme);
at("theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("stockade-theme", next);
  applyTheme();
});
at("token").addEventListener("click", async () => { if (await askToken()) refresh(); });
applyTheme();

// ---- calls -----------------------------------------------------------------------------
function headers() {
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function call(path, options = {}) {
  let response = await fetch(path, { ...options, headers: headers() });
  if (response.status === 401 && await askToken()) {
    response = await fetch(path, { ...options, headers: headers() });
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    throw new Error(problem.detail || `the server answered ${response.status}`);
  }
  return response.json();
}

// A poll that goes well takes back what a poll complained of, not what a click did.
function complain(text, source) {
  const problem = at("problem");
  if (!text && problem.dataset.source !== source) return;
  problem.hidden = !text;
  problem.textContent = text || "";
  problem.dataset.source = source;
}

// ---- numbers ---------------------------------------------------------------------------
function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${value >= 100 || unit === 0 ? value.toFixed(0) : value.toFixed(1)} ${units[unit]}`;
}
function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1e-3) return `${(value * 1e6).toFixed(0)} µs`;
  return value < 1 ? `${(value * 1e3).toFixed(1)} ms` : `${value.toFixed(1)} s`;
}
const count = (value) => Number(value).toLocaleString("en");
const percent = (value) => (value === null || value === undefined ? "–" : `${(value * 100).toFixed(1)} %`);

// ---- drawing ---------------------------------------------------------------------------
function svg(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.append(node);
  return node;
}

function chart(id, points, series, top, format) {
  const root = at(id);
  root.replaceChildren();
  const width = root.clientWidth || 500;
  const height = root.clientHeight || 150;
  const left = 62, bottom = 18, right = 6, head = 8;
  const values = points.flatMap((point) => series.map((name) => point[name] ?? 0));
  const highest = top ?? (Math.max(0, ...values) * 1.15 || 1);
  const y = (value) => head + (height - bottom - head) * (1 - Math.min(value / highest, 1));
  for (const part of [0, 0.5, 1]) {
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(highest * part), y2: y(highest * part) }, root);
    const label = svg("text", { x: left - 6, y: y(highest * part) + 4, "text-anchor": "end" }, root);
    label.textContent = format(highest * part);
  }
  if (points.length === 0) return;
  const first = points[0].unix_ms;
  const span = Math.max(points[points.length - 1].unix_ms - first, 60000);
  const end = first + span;
  const x = (time) => left + (width - left - right) * ((time - first) / span);
  for (const [time, anchor] of [[first, "start"], [end, "end"]]) {
    const label = svg("text", { x: x(time), y: height - 3, "text-anchor": anchor }, root);
    label.textContent = new Date(time).toLocaleTimeString("en-GB");
  }
  series.forEach((name, index) => {
    const kind = index === 0 ? "a" : "b";
    // A gap in the data is a gap in the line.
    const runs = [[]];
    for (const point of points) {
      if (point[name] === null) runs.push([]);
      else runs[runs.length - 1].push([x(point.unix_ms), y(point[name])]);
    }
    for (const run of runs.filter((it) => it.length > 0)) {
      const line = run.map(([px, py]) => `${px.toFixed(1)},${py.toFixed(1)}`).join(" ");
      if (index === 0 && series.length === 1 && run.length > 1) {
        const floor = y(0);
        svg("polygon", { class: "area", points: `${run[0][0]},${floor} ${line} ${run[run.length - 1][0]},${floor}` }, root);
      }
      if (run.length > 1) svg("polyline", { class: kind, points: line }, root);
      else svg("circle", { class: kind, cx: run[0][0], cy: run[0][1], r: 1.8 }, root);
    }
  });
}

function cell(row, text, label, className = "") {
  const node = row.insertCell();
  node.textContent = text;
  if (label) node.dataset.label = label;
  if (className) node.className = className;
  return node;
}

// ---- plugins ---------------------------------------------------------------------------
const MOOD = { running: "good", prepared: "good", exited: "", stopped: "", discovered: "", backoff: "warn", failed: "bad", quarantined: "bad", refused: "bad" };

function drawPlugins(plugins) {
  const body = at("plugins");
  at("no-plugins").hidden = plugins.length > 0;
  const rows = new Map([...body.rows].map((row) => [row.dataset.name, row]));
  plugins.forEach((plugin, index) => {
    let row = rows.get(plugin.name);
    rows.delete(plugin.name);
    if (!row) {
      row = body.insertRow(index);
      row.dataset.name = plugin.name;
      cell(row, plugin.name, "", "full");
      cell(row, "", "");
      for (const label of ["CPU", "Memory", "Restarts", "Lines"]) cell(row, "", label, "num");
      cell(row, "", "", "end full");
      const steer = cell(row, "", "", "full");
      for (const action of ["start", "stop", "restart"]) {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = action;
        button.dataset.action = action;
        button.addEventListener("click", () => act(plugin.name, action, button));
        steer.append(button);
      }
      const logs = document.createElement("button");
      logs.type = "button";
      logs.textContent = "log";
      logs.dataset.action = "log";
      logs.addEventListener("click", () => follow(plugin.name));
      steer.append(logs);
    }
    const badge = document.createElement("span");
    badge.className = `badge ${MOOD[plugin.state] ?? ""}`;
    badge.textContent = plugin.state;
    const cells = row.cells;
    if (cells[1].textContent !== plugin.state) cells[1].replaceChildren(badge);
    cells[2].textContent = plugin.cpu_seconds === null ? "–" : seconds(plugin.cpu_seconds);
    cells[3].textContent = bytes(plugin.memory_bytes);
    cells[4].textContent = count(plugin.restarts);
    const dropped = plugin.log_lines_dropped ? ` (${count(plugin.log_lines_dropped)} dropped)` : "";
    cells[5].textContent = count(plugin.log_lines) + dropped;
    cells[6].textContent = plugin.last_end ?? "";
    const isRunning = plugin.state === "running";
    row.querySelector("[data-action=start]").disabled = isRunning;
    row.querySelector("[data-action=stop]").disabled = !isRunning && plugin.state !== "backoff";
  });
  for (const row of rows.values()) row.remove();
}

async function act(name, action, button) {
  button.disabled = true;
  try {
    await call(`/v1/plugins/${encodeURIComponent(name)}/${action}`, { method: "POST" });
    complain("", "click");
  } catch (error) {
    complain(`${name} could not be asked to ${action}: ${error.message}`, "click");
  }
  button.disabled = false;
  refresh();
}

// ---- log tail --------------------------------------------------------------------------
let following = null;

async function follow(name) {
  following?.abort();
  const controller = new AbortController();
  following = controller;
  at("log-section").hidden = false;
  at("log-name").textContent = name;
  at("log").textContent = "";
  at("log-section").scrollIntoView({ behavior: "smooth", block: "nearest" });
  try {
    const path = `/v1/plugins/${encodeURIComponent(name)}/logs?follow=true&lines=200`;
    const response = await fetch(path, { headers: headers(), signal: controller.signal });
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let lines = [];
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts.filter((it) => it.trim())) {
        const line = JSON.parse(part);
        lines.push(`${new Date(line.unix_ms).toLocaleTimeString("en-GB")}  ${line.text}`);
      }
      lines = lines.slice(-MAX_LOG_LINES);
      const log = at("log");
      const isAtEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 30;
      log.textContent = lines.join("\n");
      if (isAtEnd) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") complain(`the log of ${name} ended: ${error.message}`, "click");
  }
}
at("log-close").addEventListener("click", () => {
  following?.abort();
  at("log-section").hidden = true;
});

// ---- tenants and operations ------------------------------------------------------------
function drawTenants(tenants, capacity) {
  const body = at("tenants");
  body.replaceChildren();
  at("no-tenants").hidden = tenants.length > 0;
  const scale = Math.max(1, ...tenants.map((it) => Math.max(it.used_bytes, it.floor_bytes, it.cap_bytes ?? 0)));
  for (const tenant of tenants) {
    const row = body.insertRow();
    cell(row, tenant.name || "(no salt)", "", "full");
    const bar = cell(row, "", "", "full");
    const root = svg("svg", { class: "budget", viewBox: "0 0 100 10", preserveAspectRatio: "none" }, bar);
    const length = (value) => Math.min(100, (value / scale) * 100);
    const cap = tenant.cap_bytes;
    svg("rect", { class: "room", x: 0, y: 2, width: length(cap ?? Math.min(scale, capacity)), height: 6, rx: 1 }, root);
    const isOver = cap !== null && tenant.used_bytes > cap;
    svg("rect", { class: `used ${isOver ? "over" : ""}`, x: 0, y: 2, width: length(tenant.used_bytes), height: 6, rx: 1 }, root);
    if (tenant.floor_bytes > 0) {
      const mark = length(tenant.floor_bytes);
      svg("line", { class: "floor", x1: mark, x2: mark, y1: 0, y2: 10, "vector-effect": "non-scaling-stroke" }, root);
    }
    cell(row, bytes(tenant.used_bytes), "Used", "num");
    cell(row, tenant.floor_bytes ? bytes(tenant.floor_bytes) : "–", "Floor", "num");
    cell(row, cap === null ? "–" : bytes(cap), "Cap", "num");
    cell(row, count(tenant.objects), "Objects", "num");
  }
}

function drawOperations(requests) {
  const body = at("operations");
  body.replaceChildren();
  for (const [name, it] of Object.entries(requests).sort((a, b) => b[1].count - a[1].count)) {
    const row = body.insertRow();
    cell(row, name, "", "full");
    cell(row, count(it.count), "Requests", "num");
    cell(row, seconds(it.p50_seconds), "p50", "num");
    cell(row, seconds(it.p99_seconds), "p99", "num");
  }
}

// ---- the loop --------------------------------------------------------------------------
async function refresh() {
  try {
    const [stats, past] = await Promise.all([call("/v1/stats"), call("/v1/history")]);
    draw(stats, past.points);
    complain("", "poll");
  } catch (error) {
    at("health").textContent = "no answer";
    at("health").className = "badge bad";
    complain(error.message, "poll");
  }
}

function draw(stats, points) {
  const { pool, lookups, now } = stats;
  at("health").textContent = stats.complaint ?? "healthy";
  at("health").className = `badge ${stats.complaint ? "bad" : "good"}`;
  at("identity").textContent = `${stats.version} · ${stats.instance_id}`;
  const share = pool.used_bytes / pool.capacity_bytes;
  at("pool").textContent = percent(share);
  at("pool-meter").value = share;
  at("pool-meter").high = pool.trigger_watermark;
  at("pool-detail").textContent = `${bytes(pool.used_bytes)} of ${bytes(pool.capacity_bytes)} · ${count(pool.objects)} objects · ${pool.eviction_policy}, ${count(pool.evicted_objects)} evicted`;
  at("hits").textContent = percent(now?.hit_rate ?? lookups.hit_rate);
  at("hits-detail").textContent = `${percent(lookups.hit_rate)} since the start, ${count(lookups.hit_tokens)} of ${count(lookups.requested_tokens)} tokens`;
  at("requests").textContent = `${count((now?.requests_per_second ?? 0).toFixed(0))}/s`;
  at("requests-detail").textContent = `p50 ${seconds(now?.p50_seconds)}, p99 ${seconds(now?.p99_seconds)} · ${count(stats.errors)} errors · ${count(stats.connections)} connections, ${count(stats.workers)} workers`;
  at("moved").textContent = `${bytes((now?.stored_bytes_per_second ?? 0) + (now?.retrieved_bytes_per_second ?? 0))}/s`;
  at("moved-detail").textContent = `${bytes(stats.stored_bytes)} stored, ${bytes(stats.retrieved_bytes)} retrieved`;
  chart("chart-pool", points, ["used_bytes"], pool.capacity_bytes, bytes);
  chart("chart-hits", points, ["hit_rate"], 1, (value) => `${(value * 100).toFixed(0)} %`);
  chart("chart-bytes", points, ["stored_bytes_per_second", "retrieved_bytes_per_second"], null, (value) => `${bytes(value)}/s`);
  chart("chart-latency", points, ["p50_seconds", "p99_seconds"], null, seconds);
  drawPlugins(stats.plugins);
  drawTenants(stats.tenants, pool.capacity_bytes);
  drawOperations(stats.requests);
}

async function loop() {
  for (;;) {
    if (!document.hidden && !at("ask").open) await refresh();
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}
loop();
