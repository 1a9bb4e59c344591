// Draws a conversation from the frames of its stream. All that is shown comes from the journal, so all tabs
// show the same; and all of it is set as text, never as HTML.

/** What became of an answer, in a word. */
const OUTCOMES = { completed: "completed", client_cancel: "stopped", superseded: "replaced" };

export class Conversation {
  /** The question asked last. */
  question = "";
  /** How many answers were begun. */
  size = 0;
  #list;
  #open = new Set();
  #answers = new Map(); // by run
  #replaced = new Map(); // by the run that replaces it

  constructor(list) {
    this.#list = list;
  }

  /** Whether an answer is being given. */
  get answering() {
    return this.#open.size > 0;
  }

  clear() {
    this.#list.replaceChildren();
    this.#open.clear();
    this.#answers.clear();
    this.#replaced.clear();
    this.size = 0;
  }

  /** A frame of the agent: the question, a word of the answer, or its end. */
  frame({ run, event, data }, caughtUp) {
    const answer = this.#answer(run);
    const text = textOf(data);
    if (event === "question") {
      this.question = text;
      const bubble = answer.turn.querySelector(".question");
      bubble.textContent = text || "(no question)";
      bubble.hidden = false;
    } else if (event === "") {
      const kind = caughtUp ? "caught-up" : "";
      let part = answer.text.lastChild;
      if (part?.className !== kind) part = answer.text.appendChild(made("span", kind));
      part.append(text);
    }
  }

  started({ run }) {
    this.#answer(run);
  }

  superseded({ run, by }) {
    this.#replaced.set(by, run);
    this.#show(this.#answer(run), "replaced", "replaced by the answer below");
    this.#under(by);
  }

  /** How it ended, in a word: "completed", "stopped", "replaced", "broke off". */
  ended({ run, status, reason, error }) {
    const answer = this.#answer(run);
    this.#open.delete(run);
    const outcome = OUTCOMES[status] ?? OUTCOMES[reason] ?? "broke off";
    if (outcome !== "replaced") {
      this.#show(answer, outcome, outcome === "broke off" ? `broke off: ${error ?? reason}` : outcome);
      answer.state.title = `${status}, ${reason}`;
    }
    return outcome;
  }

  #answer(run) {
    if (!this.#answers.has(run)) {
      const answer = { turn: made("article", "turn"), box: made("div", "answer") };
      answer.text = answer.box.appendChild(made("p", "text"));
      answer.state = answer.box.appendChild(made("p", "state"));
      answer.turn.appendChild(made("p", "question")).hidden = true;
      answer.turn.append(answer.box);
      this.#show(answer, "streaming", "streaming");
      this.#answers.set(run, answer);
      this.#open.add(run);
      this.#list.append(answer.turn);
      this.size += 1;
      this.#under(run);
    }
    return this.#answers.get(run);
  }

  /** An answer that replaces another stands below it, under the same question. */
  #under(run) {
    const old = this.#answers.get(this.#replaced.get(run));
    const answer = this.#answers.get(run);
    if (!old || !answer || old.turn === answer.turn) return;
    answer.turn.remove();
    answer.turn = old.turn;
    old.turn.append(answer.box);
  }

  #show(answer, outcome, words) {
    answer.box.dataset.state = outcome.replace(" ", "-");
    answer.state.textContent = words;
  }
}

/** Whoever else writes to this stream need not do it as the sample agent does. */
function textOf(data) {
  try {
    return JSON.parse(data).text ?? "";
  } catch {
    return data;
  }
}

function made(tag, className) {
  const element = document.createElement(tag);
  element.className = className;
  return element;
}
