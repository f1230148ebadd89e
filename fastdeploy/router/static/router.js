"use strict";

const EVERY_MS = 1000;
const whole = new Intl.NumberFormat("en");
const before = new Map(); // server URL -> {atMs, events}: what the rates are measured from

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function rateOf(server, nowMs) {
  const last = before.get(server.url);
  before.set(server.url, { atMs: nowMs, events: server.n_events_total });
  if (!last || nowMs <= last.atMs || server.n_events_total < last.events) return 0;
  return ((server.n_events_total - last.events) * 1000) / (nowMs - last.atMs);
}

function rowOf(server, rate, most) {
  const row = element("tr");
  const meter = element("meter");
  meter.max = Math.max(most, 1);
  meter.value = server.n_requests;
  meter.title = `${whole.format(server.n_tokens)} tokens in flight, estimated`;
  const load = element("td");
  load.append(meter);
  row.append(
    element("td", server.url.replace("http://", "")),
    element("td", server.role),
    element("td", server.is_available ? "ready" : "not ready", server.is_available ? "dot good" : "dot bad"),
    load,
    ...[server.n_requests, server.n_waiting, Math.round(rate), server.n_requests_total].map((n) =>
      element("td", whole.format(n), "n")),
    element("td", whole.format(server.n_failures), server.n_failures ? "n bad" : "n"));
  return row;
}

function show(status, nowMs) {
  const most = Math.max(0, ...status.servers.map((server) => server.n_requests));
  const rates = status.servers.map((server) => rateOf(server, nowMs));
  const ready = status.servers.filter((server) => server.is_available).length;
  const totals = [
    ["servers ready", `${ready} of ${status.servers.length}`],
    ["requests in flight", whole.format(status.totals.in_flight)],
    ["tokens/s", whole.format(Math.round(rates.reduce((sum, rate) => sum + rate, 0)))],
    ["answers", whole.format(status.totals.n_answers)],
    ["errors", whole.format(status.totals.n_errors)],
    ["retries", whole.format(status.totals.retries)],
    ...Object.entries(status.decisions).map(([name, n]) => [`decided: ${name}`, whole.format(n)]),
  ];
  document.getElementById("totals").replaceChildren(...totals.map(([name, text]) => {
    const card = element("div");
    card.append(element("b", text), element("span", name));
    return card;
  }));
  const rows = status.servers.map((server, i) => rowOf(server, rates[i], most));
  document.getElementById("servers").replaceChildren(...rows);
  document.getElementById("empty").hidden = rows.length > 0;
}

async function refresh() {
  const state = document.getElementById("state");
  try {
    const answer = await fetch("/status", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json(), performance.now());
    state.textContent = `live, ${new Date().toLocaleTimeString()}`;
    state.className = "";
  } catch (error) {
    state.textContent = `the router does not answer: ${error.message}`;
    state.className = "lost";
  }
  setTimeout(refresh, EVERY_MS);
}

refresh();
