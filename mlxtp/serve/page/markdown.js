// Markdown to nodes. What a model writes becomes nodes here alone, behind DOMPurify:
// no other module makes HTML of text, and the page's policy (trusted types) forbids it.

import { Marked } from "./vendor/marked.esm.js";
import DOMPurify from "./vendor/purify.es.mjs";
import { copyButton, element } from "./elements.js";

const PLAIN = "b|br|code|del|details|em|i|kbd|p|s|strong|sub|summary|sup|u";
const ALLOWED = {
  ALLOWED_TAGS: [
    ...PLAIN.split("|"),
    ..."a blockquote h1 h2 h3 h4 h5 h6 hr li ol pre ul".split(" "),
    ..."table tbody td th thead tr".split(" "),
  ],
  ALLOWED_ATTR: ["href", "title", "align", "start", "class"],
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const PLAIN_TAG = new RegExp(`&#60;(/?)(${PLAIN})\\s*/?&#62;`, "gi");

const escaped = (text) =>
  text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    // Tags that a model writes are shown as text, but for plain ones.
    html({ text }) {
      return escaped(text).replace(PLAIN_TAG, "<$1$2>");
    },
    // Nothing is fetched because a model names it: a picture is a link.
    image({ href, text }) {
      return `<a href="${escaped(href)}">${escaped(text || href)}</a>`;
    },
    checkbox({ checked }) {
      return checked ? "☑ " : "☐ ";
    },
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
  // The only classes that mean something: a code block's language.
  if (node.hasAttribute("class") && !/^language-[\w+#.-]+$/.test(node.className)) {
    node.removeAttribute("class");
  }
});

function dressed(fragment) {
  for (const pre of fragment.querySelectorAll("pre")) {
    const code = pre.querySelector("code");
    const box = element("div", "code");
    const head = element("div", "code-head");
    const language = code?.className.replace("language-", "") ?? "";
    head.append(element("span", "", language), copyButton(() => pre.textContent));
    pre.replaceWith(box);
    pre.tabIndex = 0; // it scrolls, so the keyboard has to reach it
    box.append(head, pre);
  }
  for (const table of fragment.querySelectorAll("table")) {
    const box = element("div", "table");
    box.tabIndex = 0;
    table.replaceWith(box);
    box.append(table);
  }
  return fragment;
}

/** A text as it streams: blocks that have not changed keep their nodes. */
export class Markdown {
  constructor(element) {
    this.element = element;
    this.blocks = []; // what each child was made of
  }

  /** Show `text`; `isWhole` makes all nodes anew, for references that came late. */
  show(text, isWhole = false) {
    const tokens = marked.lexer(text).filter((token) => token.type !== "space");
    if (isWhole) this.blocks = [];
    let same = 0;
    while (same < this.blocks.length && this.blocks[same] === tokens[same]?.raw) same++;
    while (this.element.childElementCount > same) this.element.lastElementChild.remove();
    this.blocks.length = same;
    for (const token of tokens.slice(same)) {
      const block = element("div");
      block.append(dressed(DOMPurify.sanitize(marked.parser([token]), ALLOWED)));
      this.element.append(block);
      this.blocks.push(token.raw);
    }
  }
}
