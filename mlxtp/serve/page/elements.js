// Elements that several modules make. Text is always text here, never HTML.

/** Make an element with a class and a text. */
export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

/** Make a small button. */
export function button(words, onclick) {
  const made = element("button", "text", words);
  made.type = "button";
  made.onclick = onclick;
  return made;
}

/** Put text on the clipboard, also where the page is not served by https. */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Make a button that copies what `text` returns. */
export function copyButton(text) {
  const made = button("Copy", async () => {
    await copy(text());
    made.textContent = "Copied";
    setTimeout(() => (made.textContent = "Copy"), 1500);
  });
  return made;
}
