// The cluster beside the conversation: what GET /cluster says, once a second.

import { request } from "./api.js";
import { element } from "./elements.js";

const PERIOD = 1000; // ms
const SAMPLES = 120;

const STATES = {
  starting: "Starting",
  loading: "Loading",
  ready: "Ready",
  recovering: "Recovering",
  waiting: "Waiting for hosts",
  draining: "Draining",
  ended: "Lost",
  unreachable: "Lost",
};

const by = (id) => document.getElementById(id);

const UNITS = [[2 ** 40, "TB"], [2 ** 30, "GB"], [2 ** 20, "MB"]];

/** "40 / 256 GB": a part and the whole in the whole's unit. */
function partOf(part, whole) {
  const [size, unit] = UNITS.find(([size]) => whole >= size) ?? [1024, "kB"];
  const digits = whole / size < 10 ? 1 : 0;
  return `${(part / size).toFixed(digits)} / ${(whole / size).toFixed(digits)} ${unit}`;
}

const percent = (part) => `${Math.round(100 * part)} %`;

function row(list, name, value) {
  list.append(element("dt", "", name), element("dd", "", value));
}

/** A name, a bar of parts ([part of the whole, class]) and what it says in words. */
function meter(name, words, parts) {
  const view = element("div", "meter");
  const bar = element("span", "bar");
  for (const [part, className] of parts) {
    const piece = element("span", className);
    piece.style.width = `${Math.max(0, Math.min(100, 100 * part))}%`;
    bar.append(piece);
  }
  view.append(element("span", "", name), bar, element("span", "value", words));
  return view;
}

/** A rank's memory, as parts of its machine's, and its time in collectives. */
function rankMeters(rank, name) {
  const used = Math.max(rank.used_bytes ?? 0, rank.weights_bytes);
  const caches = used - rank.weights_bytes;
  const whole = rank.memory_bytes;
  const share = rank.collective_share;
  return [
    meter(name, partOf(used, whole), [
      [rank.weights_bytes / whole, "weights"],
      [caches / whole, "caches"],
      [(rank.cache_limit_bytes - caches) / whole, "room"],
    ]),
    meter("Collectives", share === null ? "–" : percent(share), [
      [share ?? 0, "collectives"],
    ]),
  ];
}

function hostView(host, ranks) {
  const view = element("section", "card host");
  view.setAttribute("aria-label", host.host);
  const head = element("div", "host-head");
  const mine = ranks.filter((rank) => rank.host === host.host);
  const share = mine.reduce((sum, rank) => sum + rank.share, 0);
  head.append(
    element("h3", "", host.host),
    element("span", "soft small chip", host.chip),
    element("span", "soft small", `share ${percent(share)}`),
  );
  view.append(head);
  for (const rank of mine) {
    view.append(...rankMeters(rank, mine.length === 1 ? "Memory" : `Rank ${rank.rank}`));
  }
  return view;
}

/** A host that is lost: why, and the command that mends it, if one does. */
function missingView([host, words]) {
  const view = element("section", "card host");
  view.setAttribute("aria-label", host);
  const head = element("div", "host-head");
  head.append(element("h3", "", host), element("span", "soft small", "missing"));
  view.append(head, element("p", "small", words));
  return view;
}

/** The panel. `onState(isReady, words)` hears whether requests are taken. */
export class Cluster {
  constructor(onState) {
    this.onState = onState;
    this.speeds = Array(SAMPLES).fill(0);
  }

  /** Ask for ever; while nobody sees the page, not at all. */
  async follow() {
    for (;;) {
      if (!document.hidden) {
        try {
          this.show(await (await request("cluster", {}, false)).json());
        } catch (error) {
          this.showState({ state: "unreachable", words: error.message, done: null });
        }
      }
      await new Promise((resolve) => setTimeout(resolve, PERIOD));
    }
  }

  show(cluster) {
    this.showState(cluster);
    by("model").textContent = cluster.model ?? "mlxtp";
    document.title = cluster.model ? `${cluster.model} · mlxtp` : "mlxtp";
    by("speed").hidden = cluster.model === null;
    this.showSpeed(cluster);
    by("hosts").replaceChildren(
      ...cluster.hosts.map((host) => hostView(host, cluster.ranks)),
      ...Object.entries(cluster.missing).map(missingView),
    );
    by("legend").hidden = cluster.hosts.length === 0;
    by("links").textContent = cluster.links ? `Links: ${cluster.links}` : "";
  }

  showState({ state, words, done, tokens_per_second: speed, missing = {} }) {
    const isReady = state === "ready";
    const said = words.charAt(0).toUpperCase() + words.slice(1);
    for (const dot of document.querySelectorAll("[data-dot]")) dot.dataset.dot = state;
    by("state").textContent = STATES[state];
    by("state-words").textContent = said;
    by("progress").hidden = isReady && Object.keys(missing).length === 0;
    by("loading").hidden = !["starting", "loading", "recovering"].includes(state);
    if (done === null) by("loading").removeAttribute("value");
    else by("loading").value = done;
    const part = state === "loading" && done !== null ? ` ${percent(done)}` : "";
    by("summary-words").textContent =
      isReady && speed > 0 ? `${speed.toFixed(1)} tokens/s` : STATES[state] + part;
    // Those that come meanwhile wait for the next ranks.
    this.onState(isReady || state === "recovering", said);
  }

  showSpeed(cluster) {
    const speed = cluster.tokens_per_second;
    this.speeds.push(speed);
    this.speeds.shift();
    by("tokens-a-second").textContent = speed.toFixed(1);
    const top = Math.max(1, ...this.speeds) * 1.1;
    const points = this.speeds.map((value, index) => {
      const x = index * (240 / (SAMPLES - 1));
      return `${x.toFixed(1)} ${(47 - 46 * (value / top)).toFixed(1)}`;
    });
    const line = `M${points.join("L")}`;
    by("line-stroke").setAttribute("d", line);
    by("line-area").setAttribute("d", `${line}V48H0Z`);
    const list = element("dl");
    row(list, "Requests", `${cluster.running} running, ${cluster.waiting} waiting`);
    row(list, "Caches", `${percent(cluster.cache_use)} of their limit`);
    if (cluster.step_seconds !== null) {
      row(list, "A step", `${(1000 * cluster.step_seconds).toFixed(1)} ms`);
    }
    if (cluster.prefix_queries > 0) {
      const part = cluster.prefix_hits / cluster.prefix_queries;
      row(list, "Prefix cache", `${percent(part)} of prompts`);
    }
    by("figures").replaceChildren(...list.childNodes);
  }
}
