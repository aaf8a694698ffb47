// A conversation on the page: its messages, and the answer that streams.

import * as api from "./api.js";
import { button, copyButton, element } from "./elements.js";
import { Markdown } from "./markdown.js";
import * as settings from "./settings.js";

const NEAR_END = 80; // pixels: whoever reads further up is not scrolled

const FINISHED = {
  length: "ended at the most tokens",
  stopped: "stopped",
};

const asSentCall = ({ name, arguments: text }, index) => ({
  id: `call_${index}`,
  type: "function",
  function: { name, arguments: text },
});

/** Messages as the server takes them. */
function asSent(messages) {
  const sent = [];
  if (settings.system()) sent.push({ role: "system", content: settings.system() });
  for (const { role, content, tools } of messages) {
    // An answer that failed, or was stopped at once, leaves two questions in a row:
    // many chat templates refuse that.
    if (role === "assistant" && !content && !tools) continue;
    if (sent.at(-1)?.role === role) sent.at(-1).content += `\n\n${content}`;
    else if (tools) sent.push({ role, content, tool_calls: tools.map(asSentCall) });
    else sent.push({ role, content });
  }
  return sent;
}

/** An answer's nodes, which follow what it has so far. */
class AnswerView {
  constructor(message, onRetry) {
    this.message = message;
    this.element = element("article", "answer");
    this.element.setAttribute("aria-label", "Answer");
    this.reasoning = element("details", "reasoning");
    this.reasoningTitle = element("summary", "", "Reasoning");
    const thoughts = element("div", "markdown");
    this.reasoning.append(this.reasoningTitle, thoughts);
    this.thoughts = new Markdown(thoughts);
    const text = element("div", "markdown");
    this.text = new Markdown(text);
    this.tools = element("div", "tools");
    this.error = element("p", "error");
    this.foot = element("footer");
    this.facts = element("span", "facts");
    this.foot.append(
      copyButton(() => message.content), button("Retry", onRetry), this.facts,
    );
    this.waiting = element("p", "waiting");
    this.waiting.append(element("span"), element("span"), element("span"));
    this.element.append(
      this.reasoning, text, this.tools, this.waiting, this.error, this.foot,
    );
    this.show(true);
  }

  /** Follow the message; `isOver` when nothing more comes. */
  show(isOver = false) {
    const { content, reasoning, tools, error, facts } = this.message;
    this.reasoning.hidden = !reasoning;
    if (reasoning) {
      const isThinking = !isOver && !content && !tools?.length;
      this.reasoning.classList.toggle("now", isThinking);
      this.reasoningTitle.textContent = isThinking ? "Reasoning …" : "Reasoning";
      this.thoughts.show(reasoning, isOver);
    }
    this.text.show(content, isOver);
    this.tools.replaceChildren(...(tools ?? []).map(toolView));
    this.waiting.hidden = isOver || Boolean(content || reasoning || tools?.length);
    this.error.hidden = !error;
    this.error.textContent = error ?? "";
    this.foot.hidden = !isOver;
    this.facts.textContent = facts ?? "";
    this.element.setAttribute("aria-busy", String(!isOver));
  }
}

function toolView({ name, arguments: text }) {
  const view = element("div", "tool");
  view.append(element("span", "tool-name", `Calls ${name}`));
  let shown = text;
  try {
    shown = JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    // it still streams
  }
  view.append(element("pre", "", shown));
  return view;
}

/** The middle of the page. `onChange` is called when a conversation is to be kept. */
export class Chat {
  constructor(onChange) {
    this.onChange = onChange;
    this.log = document.getElementById("log");
    this.prompt = document.getElementById("prompt");
    this.sendButton = document.getElementById("send");
    this.stopButton = document.getElementById("stop");
    this.status = document.getElementById("status");
    this.toEnd = document.getElementById("to-end");
    this.isReady = false;
    this.abort = null; // of the answer that streams
    this.follows = true;
    this.conversation = null;

    document.getElementById("composer").onsubmit = (event) => {
      event.preventDefault();
      this.send();
    };
    this.stopButton.onclick = () => this.stop();
    this.toEnd.onclick = () => this.scroll(true);
    this.log.onscroll = () => {
      const left = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight;
      this.follows = left < NEAR_END;
      this.toEnd.hidden = this.follows;
    };
    // A phone's keyboard, or a longer message, takes room from the conversation.
    new ResizeObserver(() => this.scroll()).observe(this.log);
    this.prompt.oninput = () => this.fit();
    this.prompt.onkeydown = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    };
    document.addEventListener("keydown", (event) => {
      const isOverlaid = document.querySelector("dialog[open], aside.open");
      if (event.key === "Escape" && !isOverlaid) this.stop();
    });
  }

  /** Show another conversation; an answer that streams is stopped. */
  open(conversation) {
    this.stop();
    this.conversation = conversation;
    this.draw();
    this.scroll(true);
  }

  /** Whether requests are taken; `words` says why not. */
  setReady(isReady, words) {
    this.isReady = isReady;
    this.prompt.placeholder = isReady ? "Write a message" : words;
    this.fit();
  }

  fit() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight}px`;
    this.sendButton.disabled = !this.isReady || !this.prompt.value.trim();
  }

  scroll(isForced = false) {
    if (isForced) this.follows = true;
    if (this.follows) this.log.scrollTop = this.log.scrollHeight;
    this.toEnd.hidden = this.follows;
  }

  draw() {
    const { messages } = this.conversation;
    if (messages.length === 0) {
      const welcome = element("div", "welcome");
      welcome.append(
        element("h2", "", "A new conversation"),
        element("p", "soft", "It stays in this browser and on your own machines."),
      );
      this.log.replaceChildren(welcome);
      return;
    }
    this.log.replaceChildren(
      ...messages.map((message, index) =>
        message.role === "user"
          ? this.question(message, index)
          : new AnswerView(message, () => this.retry(index)).element,
      ),
    );
  }

  question(message, index) {
    const view = element("article", "question");
    view.setAttribute("aria-label", "Your message");
    const foot = element("footer");
    foot.append(
      copyButton(() => message.content),
      button("Edit", () => this.edit(view, index)),
    );
    view.append(element("div", "bubble", message.content), foot);
    return view;
  }

  edit(view, index) {
    const form = element("form", "edit");
    const area = element("textarea");
    area.value = this.conversation.messages[index].content;
    area.rows = Math.min(12, area.value.split("\n").length + 1);
    area.setAttribute("aria-label", "Your message");
    const send = element("button", "main", "Send");
    const cancel = element("button", "plain", "Cancel");
    cancel.type = "button";
    const buttons = element("div", "buttons");
    buttons.append(cancel, send);
    form.append(area, buttons);
    const leave = () => {
      this.draw();
      this.log.children[index].querySelector("footer button:last-child").focus();
    };
    cancel.onclick = leave;
    form.onsubmit = (event) => {
      event.preventDefault();
      if (!area.value.trim() || !this.isReady) return;
      this.goBack(index);
      this.ask(area.value);
    };
    area.onkeydown = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      }
    };
    view.replaceChildren(form);
    area.focus();
  }

  /** Forget the message at `index` and all behind it. */
  goBack(index) {
    this.stop();
    this.conversation.messages.length = index;
  }

  send() {
    const text = this.prompt.value;
    if (!text.trim() || !this.isReady || this.abort) return;
    this.prompt.value = "";
    this.fit();
    this.ask(text);
  }

  ask(text) {
    this.conversation.messages.push({ role: "user", content: text });
    this.answer();
  }

  retry(index) {
    if (!this.isReady) return;
    this.goBack(index);
    this.answer();
  }

  /** Stop the answer that streams; what has come of it stays. */
  stop() {
    this.abort?.abort();
    this.abort = null;
    this.showStop();
  }

  showStop() {
    const hadFocus = document.activeElement === this.stopButton;
    this.stopButton.hidden = !this.abort;
    this.sendButton.hidden = Boolean(this.abort);
    if (hadFocus && !this.abort) this.prompt.focus();
  }

  /** Ask for the next message of the conversation, and show it as it comes. */
  async answer() {
    const { conversation } = this;
    const sent = asSent(conversation.messages);
    const index = conversation.messages.length;
    const message = { role: "assistant", content: "" };
    conversation.messages.push(message);
    this.onChange(conversation);
    this.draw();
    const view = new AnswerView(message, () => this.retry(index));
    this.log.lastElementChild.replaceWith(view.element);
    view.show();
    this.scroll(true);

    const abort = (this.abort = new AbortController());
    this.showStop();
    this.status.textContent = "The answer begins.";
    const frames = new Frames(() => {
      view.show();
      this.scroll();
    });
    const clock = new Clock();
    let finish = null;
    try {
      for await (const chunk of api.chat(sent, settings.sampling(), abort.signal)) {
        const [choice] = chunk.choices;
        if (choice) add(message, choice.delta);
        finish = choice?.finish_reason ?? finish;
        clock.note(chunk);
        frames.ask();
      }
    } catch (error) {
      if (error.name === "AbortError") finish = "stopped";
      else message.error = error instanceof api.Failure ? error.message : String(error);
    }
    frames.cancel();
    message.facts = [clock.facts(), FINISHED[finish]].filter(Boolean).join(" · ");
    view.show(true);
    if (this.abort === abort) this.abort = null;
    if (!conversation.messages.includes(message)) return; // it was forgotten meanwhile
    this.onChange(conversation);
    if (this.conversation !== conversation) return;
    this.showStop();
    this.scroll();
    this.status.textContent =
      message.error ?? (finish === "stopped" ? "Stopped." : "The answer is complete.");
  }
}

function add(message, delta) {
  message.content += delta.content ?? "";
  const reasoning = delta.reasoning_content ?? "";
  if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
  for (const call of delta.tool_calls ?? []) {
    message.tools ??= [];
    const known = (message.tools[call.index] ??= { name: "", arguments: "" });
    known.name += call.function?.name ?? "";
    known.arguments += call.function?.arguments ?? "";
  }
}

/** Draw at most once a frame, and leave three quarters of the time to the rest. */
class Frames {
  constructor(draw) {
    this.draw = draw;
    this.timer = null;
    this.earliest = 0;
  }

  ask() {
    this.timer ??= setTimeout(() => {
      this.timer = null;
      const begun = performance.now();
      this.draw();
      const now = performance.now();
      this.earliest = now + Math.max(16, 3 * (now - begun));
    }, Math.max(0, this.earliest - performance.now()));
  }

  cancel() {
    clearTimeout(this.timer);
  }
}

/** Tokens, and tokens a second from the first to the last that came. */
class Clock {
  constructor() {
    this.first = this.last = null;
    this.usage = null;
  }

  note({ choices, usage }) {
    if (choices[0]) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    if (usage) this.usage = usage;
  }

  facts() {
    if (!this.usage) return "";
    const tokens = this.usage.completion_tokens;
    const words = [`${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`];
    const seconds = (this.last - this.first) / 1000;
    if (tokens > 1 && seconds > 0) {
      words.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    }
    const cached = this.usage.prompt_tokens_details?.cached_tokens;
    if (cached) words.push(`${cached.toLocaleString("en")} cached`);
    return words.join(" · ");
  }
}
