// The page: conversations at the left, one of them in the middle, the cluster at the
// right. Each module below it has one subject.

import { Chat } from "./chat.js";
import { Cluster } from "./cluster.js";
import * as conversations from "./conversations.js";
import { element } from "./elements.js";
import * as settings from "./settings.js";

const by = (id) => document.getElementById(id);

/** Tell the person something, with something that they can do about it. */
function notice(words, action = null, onAction = null) {
  by("notice-words").textContent = words;
  by("notice-action").hidden = !action;
  by("notice-action").textContent = action ?? "";
  by("notice-action").onclick = () => {
    by("notice").hidden = true;
    onAction();
  };
  by("notice").hidden = !words;
}

function keep(conversation) {
  try {
    conversations.save(conversation);
  } catch (error) {
    if (!(error instanceof conversations.Full)) throw error;
    notice(error.message);
  }
  list();
}

const chat = new Chat(keep);

function open(conversation) {
  chat.open(conversation);
  list();
  closePanels();
  if (!matchMedia("(pointer: coarse)").matches) by("prompt").focus();
}

function remove(conversation) {
  conversations.remove(conversation);
  if (conversation.id === chat.conversation.id) {
    chat.goBack(0); // what still comes of an answer is not kept
    open(conversations.fresh());
  }
  list();
  notice("The conversation is deleted.", "Undo", () => {
    keep(conversation);
    open(conversation);
  });
}

function list() {
  by("list").replaceChildren(
    ...conversations.all().map((conversation) => {
      const item = element("li");
      const choose = element("button", "choose", conversation.title);
      choose.title = conversation.title;
      const isOpen = conversation.id === chat.conversation.id;
      if (isOpen) choose.setAttribute("aria-current", "true");
      choose.onclick = () => (isOpen ? closePanels() : open(conversation));
      const forget = element("button", "forget", "×");
      forget.setAttribute("aria-label", `Delete: ${conversation.title}`);
      forget.onclick = () => remove(conversation);
      item.append(choose, forget);
      return item;
    }),
  );
}

// On narrow screens the two sides lie over the conversation, one at a time.
function closePanels() {
  for (const panel of document.querySelectorAll("aside")) panel.classList.remove("open");
  by("shade").hidden = true;
  document.querySelector("main").inert = false;
}

for (const button of document.querySelectorAll("[data-open]")) {
  button.onclick = () => {
    closePanels();
    const panel = by(button.dataset.open);
    panel.classList.add("open");
    by("shade").hidden = false;
    document.querySelector("main").inert = true;
    panel.querySelector("[data-close]").focus();
  };
}
for (const button of document.querySelectorAll("[data-close]")) {
  button.onclick = () => {
    closePanels();
    document.querySelector(`[data-open=${button.dataset.close}]`).focus();
  };
}
by("shade").onclick = closePanels;
matchMedia("(max-width: 70rem)").onchange = closePanels;
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closePanels();
});
for (const button of document.querySelectorAll("[data-dismiss]")) {
  button.onclick = () => button.closest("dialog").close();
}

by("new").onclick = () => open(conversations.fresh());
by("notice-close").onclick = () => notice("");
window.addEventListener("storage", list); // another tab has changed a conversation
// A desktop's browser ends requests before `pagehide`; a phone's has nothing before it.
for (const leaving of ["beforeunload", "pagehide"]) {
  window.addEventListener(leaving, () => {
    if (!chat.abort) return;
    keep(chat.conversation); // what has come of the answer so far
    chat.stop();
  });
}
settings.setUp();
open(conversations.fresh());
new Cluster((isReady, words) => chat.setReady(isReady, words)).follow();
