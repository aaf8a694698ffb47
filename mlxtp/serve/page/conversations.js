// Conversations in the browser: one entry of localStorage each, so that two tabs do not
// overwrite each other's.

const PREFIX = "mlxtp.conversation.";
export const MOST = 200;
const LONGEST_TITLE = 60;

/** Words for people where a conversation cannot be kept. */
export class Full extends Error {}

/** All conversations, the newest first. */
export function all() {
  const kept = [];
  for (let index = 0; index < localStorage.length; index++) {
    const name = localStorage.key(index);
    if (!name.startsWith(PREFIX)) continue;
    try {
      kept.push(JSON.parse(localStorage.getItem(name)));
    } catch {
      // written by something else
    }
  }
  return kept.sort((a, b) => b.changed - a.changed);
}

/** A new one, which is kept when it has messages. */
export function fresh() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "New conversation", changed: Date.now(), messages: [] };
}

/**
 * Keep a conversation.
 *
 * Throws Full, with what to do, if there are too many or the browser has no more room.
 */
export function save(conversation) {
  const first = conversation.messages[0].content.trim().replace(/\s+/g, " ");
  conversation.title = first.slice(0, LONGEST_TITLE);
  conversation.changed = Date.now();
  const name = PREFIX + conversation.id;
  if (localStorage.getItem(name) === null && all().length >= MOST) {
    throw new Full(
      `This browser keeps ${MOST} conversations: this one is lost when the page is ` +
        "closed. Delete others to keep it.",
    );
  }
  try {
    localStorage.setItem(name, JSON.stringify(conversation));
  } catch {
    throw new Full(
      "The browser's storage is full: what is new in this conversation is lost when " +
        "the page is closed. Delete others to keep it.",
    );
  }
}

/** Forget a conversation. */
export function remove(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}
