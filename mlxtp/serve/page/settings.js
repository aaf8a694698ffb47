// What the person has set: kept in the browser, sent with every request.

const NAME = "mlxtp.settings";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

function kept() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {};
  }
}

/** The system prompt, "" for none. */
export const system = () => kept().system ?? "";

/** Numbers in OpenAI's names; what is left open is not among them. */
export function sampling() {
  const values = kept();
  return Object.fromEntries(
    NUMBERS.filter((name) => name in values).map((name) => [name, values[name]]),
  );
}

/** Let the button open the dialog, and the dialog keep what is typed. */
export function setUp() {
  const dialog = document.getElementById("settings");
  const form = document.getElementById("settings-form");
  document.getElementById("open-settings").onclick = () => {
    const values = kept();
    for (const name of ["system", ...NUMBERS]) {
      form.elements[name].value = values[name] ?? "";
    }
    dialog.showModal();
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    const values = { system: form.elements.system.value };
    for (const name of NUMBERS) {
      const input = form.elements[name];
      if (input.value !== "") values[name] = input.valueAsNumber;
    }
    localStorage.setItem(NAME, JSON.stringify(values));
    dialog.close();
  };
}
