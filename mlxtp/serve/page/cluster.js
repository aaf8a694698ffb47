// The cluster beside the conversation: what GET /cluster says, once a second.

import { request } from "./api.js";

const PERIOD = 1000; // ms
const SAMPLES = 120;

const STATES = {
  starting: "Starting",
  loading: "Loading",
  ready: "Ready",
  draining: "Ending",
  ended: "Lost",
  unreachable: "Lost",
};

const by = (id) => document.getElementById(id);

function bytes(count) {
  for (const [size, unit] of [[2 ** 40, "TB"], [2 ** 30, "GB"], [2 ** 20, "MB"]]) {
    if (count >= size) {
      const value = count / size;
      return `${value.toFixed(value < 10 ? 1 : 0)} ${unit}`;
    }
  }
  return `${Math.round(count / 1024)} kB`;
}

const percent = (part) => `${Math.round(100 * part)} %`;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A bar of parts: [[part of the whole, class]]. */
function bar(label, parts) {
  const made = element("div", "bar");
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", label);
  for (const [part, className] of parts) {
    const piece = element("span", className);
    piece.style.width = `${Math.min(100, 100 * part)}%`;
    made.append(piece);
  }
  return made;
}

function row(list, name, value) {
  list.append(element("dt", "", name), element("dd", "", value));
}

/** Weights, then caches and what is computed with, of the machine's memory. */
function rankView(rank, isAlone) {
  const view = element("div", "rank");
  const used = Math.max(rank.used_bytes ?? 0, rank.weights_bytes);
  const head = element("div", "rank-head");
  const name = isAlone ? "Memory" : `Rank ${rank.rank}`;
  const words = `${bytes(used)} of ${bytes(rank.memory_bytes)}`;
  head.append(element("span", "", name), element("span", "soft", words));
  view.append(
    head,
    bar(`${name}: ${words}, weights ${bytes(rank.weights_bytes)}`, [
      [rank.weights_bytes / rank.memory_bytes, "weights"],
      [(used - rank.weights_bytes) / rank.memory_bytes, "caches"],
    ]),
  );
  if (rank.collective_share !== null) {
    const share = element("div", "rank-head");
    share.append(
      element("span", "", "In collectives"),
      element("span", "soft", percent(rank.collective_share)),
    );
    view.append(
      share,
      bar(`In collectives: ${percent(rank.collective_share)}`, [
        [rank.collective_share, "collectives"],
      ]),
    );
  }
  return view;
}

function hostView(host, ranks) {
  const view = element("section", "card host");
  view.setAttribute("aria-label", host.host);
  const head = element("div", "host-head");
  head.append(element("h3", "", host.host), element("span", "soft small", host.chip));
  const mine = ranks.filter((rank) => rank.host === host.host);
  const share = mine.reduce((sum, rank) => sum + rank.share, 0);
  const names = mine.map((rank) => rank.rank).join(", ");
  const words = `${mine.length === 1 ? "rank" : "ranks"} ${names} · ${percent(share)} of the model`;
  view.append(head, element("p", "soft small", words));
  view.append(...mine.map((rank) => rankView(rank, mine.length === 1)));
  return view;
}

/** The panel. `onState(isReady, words)` hears whether requests are taken. */
export class Cluster {
  constructor(onState) {
    this.onState = onState;
    this.speeds = [];
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
    );
    by("links").textContent = cluster.links ? `Links: ${cluster.links}` : "";
  }

  showState({ state, words, done, tokens_per_second: speed }) {
    const isReady = state === "ready";
    const said = words.charAt(0).toUpperCase() + words.slice(1);
    for (const dot of document.querySelectorAll("[data-dot]")) dot.dataset.dot = state;
    by("state").textContent = STATES[state];
    by("state-words").textContent = isReady ? "" : said;
    by("loading").hidden = !["starting", "loading"].includes(state);
    if (done === null) by("loading").removeAttribute("value");
    else by("loading").value = done;
    const part = state === "loading" && done !== null ? ` ${percent(done)}` : "";
    by("summary-words").textContent =
      isReady && speed > 0 ? `${speed.toFixed(1)} tokens/s` : STATES[state] + part;
    this.onState(isReady, said);
  }

  showSpeed(cluster) {
    const speed = cluster.tokens_per_second;
    this.speeds.push(speed);
    if (this.speeds.length > SAMPLES) this.speeds.shift();
    by("tokens-a-second").textContent = speed.toFixed(1);
    const top = Math.max(1, ...this.speeds) * 1.1;
    const points = this.speeds.map((value, index) => {
      const x = 240 - (this.speeds.length - 1 - index) * (240 / (SAMPLES - 1));
      return [x.toFixed(1), (47 - 46 * (value / top)).toFixed(1)];
    });
    const line = `M${points.map((point) => point.join(" ")).join("L")}`;
    by("line-stroke").setAttribute("d", line);
    by("line-area").setAttribute("d", `${line}V48H${points[0][0]}Z`);
    const list = element("dl");
    row(list, "Requests", `${cluster.running} running, ${cluster.waiting} waiting`);
    row(list, "Caches", `${percent(cluster.cache_use)} of their limit`);
    if (cluster.step_seconds !== null) {
      row(list, "A step", `${(1000 * cluster.step_seconds).toFixed(1)} ms`);
    }
    if (cluster.prefix_queries > 0) {
      const part = cluster.prefix_hits / cluster.prefix_queries;
      row(list, "Prompts from the cache", percent(part));
    }
    by("figures").replaceChildren(...list.childNodes);
  }
}
