// A chat whose answers come through relay. relay-stream.js hands over each frame of the conversation once,
// over cuts, reloads and tabs; what is left to do for a page is here.

import { ask, cancel, subscribe } from "/relay/static/relay-stream.js";
import { Conversation } from "./demo-conversation.js";
import { Instruments } from "./demo-instruments.js";

const AGENT = "/agent/stream";
const PACE_MS = 70; // between two words, so that there is time to break something
const OFFLINE_S = 6;
const AGAIN_MS = 2000;

const $ = (id) => document.getElementById(id);
const seqOf = (id) => Number(id.split("-")[0]);

const conversation = new Conversation($("conversation"));
const instruments = new Instruments();

// The conversation's name is in the URL, so that another tab, or another person, opens the same one.
const named = /^#[A-Za-z0-9._~:-]{1,200}$/.test(location.hash);
const [random] = crypto.getRandomValues(new Uint32Array(1));
const chat = named ? location.hash.slice(1) : `chat-${random.toString(36)}`;
history.replaceState(null, "", `#${chat}`);

let subscription = null;
let cursor = null; // the id of the last frame: all that it takes to go on
let top = null; // the last frame that was there when this connection began
let resumed = false; // whether this connection goes on where another one was cut
let away = false; // since it was cut
let offline = null; // while it is cut on purpose: the clock that counts the seconds down
let asking = false;

// --- reading -----------------------------------------------------------------------------------------------

/** Read the conversation's stream, behind the cursor. It is created first, unless it is there, and can so be
 * followed before anything was said. */
async function follow() {
  const created = await fetch(`/relay/v1/streams/${chat}`, { method: "PUT" }).catch(() => null);
  if (!created?.ok) return again("relay cannot be reached.");
  const callbacks = { onFrame, onControl, onState, onEnd };
  subscription = subscribe(chat, { after: cursor ?? "start", envelope: true, ...callbacks });
  show();
}

function again(why) {
  say(`${why} This page tries again by itself.`, "lost");
  away = true;
  setTimeout(follow, AGAIN_MS);
}

function onFrame(frame) {
  journaled(frame);
  conversation.frame(frame, resumed && isReplayed(frame.id));
  if (frame.event === "question") countCalls();
  show();
}

function onControl(control) {
  const { id, type } = control;
  if (type.startsWith("run.")) journaled(control);
  instruments.event(id, type, detailOf(control));
  if (type === "hello") {
    ({ top, resumed } = control);
    instruments.position(id);
    const missed = seqOf(top) - seqOf(cursor ?? id);
    if (away && resumed && missed > 0) {
      back(`Back. ${missed} frames were written meanwhile. Here they are, each once.`);
    }
  } else if (type === "gap") {
    lose(id, "Some older frames are no longer in the journal.");
  } else if (type === "reset") {
    lose(id, "The journal was begun anew. This is what it holds.");
    conversation.clear();
  } else if (type === "run.started") {
    conversation.started(control);
    if (!isReplayed(id)) say("The agent answers.");
  } else if (type === "run.superseded") {
    conversation.superseded(control);
  } else if (type === "run.ended") {
    const outcome = conversation.ended(control);
    if (!isReplayed(id)) say(`The answer ${outcome === "broke off" ? "" : "is "}${outcome}.`);
    countCalls();
  }
  show();
}

/** What the log says of a control frame, beside its type. */
function detailOf({ resumed: honoured, status, reason, run }) {
  return honoured ? "resumed" : (status ?? reason ?? run?.slice(0, 8));
}

/** relay says that it cannot go on from the cursor, and from where it can. */
function lose(id, sentence) {
  cursor = id;
  instruments.position(id, true);
  back(sentence);
}

/** A frame of the journal, of the agent's or of relay's own. */
function journaled({ id, type }) {
  instruments.frame(id, isReplayed(id), type !== "frame");
  cursor = id;
}

/** Whether a frame was written before this connection began. */
function isReplayed(id) {
  return top !== null && seqOf(id) <= seqOf(top);
}

function onState(state, error) {
  if (state !== "open") top = null;
  if (error && state === "waiting") {
    say("relay cannot be reached. This page tries again by itself.", "lost");
    away = true;
  }
  show();
}

function onEnd({ reason, error }) {
  if (reason === "closed") return; // cut, by the button
  instruments.event(null, reason, error?.message);
  if (reason === "error") {
    subscription = null;
    again(error.message);
  } else say("This chat is no more. Begin a new one.", "lost");
}

// --- asking ------------------------------------------------------------------------------------------------

/** Ask the agent through relay, as its own clients do. The answer is read with the rest of the conversation,
 * so this request need not wait for it; if it is cut, `ask` makes it again, and the agent is called once. */
async function put(question, headers) {
  asking = true;
  show();
  try {
    const query = new URLSearchParams({ prompt: question, chat, take: conversation.size, pace_ms: PACE_MS });
    const asked = await ask(`${AGENT}?${query}`, {
      method: "GET",
      headers: { "Relay-Stream": chat, Prefer: "respond-async", ...headers },
    });
    asked.close();
    return true;
  } catch (error) {
    say(`That did not get through: ${error.message}`, "lost");
    return false;
  } finally {
    asking = false;
    show();
  }
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if ($("send").disabled) return;
  if (await put(question, {})) $("question").value = "";
  show();
});

// Both are for all tabs, wherever the answer was asked for.
$("regenerate").addEventListener("click", () => put(conversation.question, { "Relay-Supersedes": "latest" }));
$("stop").addEventListener("click", () => cancel(chat).catch((error) => say(error.message, "lost")));

/** How often the agent was called in this chat, as it says itself. */
async function countCalls() {
  const told = fetch(`/agent/stats?chat=${chat}`).then((answer) => (answer.ok ? answer.json() : null));
  instruments.calls((await told.catch(() => null))?.chat);
}

// --- breaking it -------------------------------------------------------------------------------------------

$("cut").addEventListener("click", () => (offline ? reconnect() : disconnect()));
$("reload").addEventListener("click", () => location.reload());
$("tab").addEventListener("click", () => window.open(location.href, "_blank", "noopener"));
$("events").addEventListener("click", ({ target }) => {
  target.ariaExpanded = String(target.ariaExpanded !== "true");
});
window.addEventListener("hashchange", () => location.reload());

function disconnect() {
  let left_s = OFFLINE_S;
  $("left").textContent = left_s;
  offline = setInterval(() => {
    $("left").textContent = left_s -= 1;
    if (left_s === 0) reconnect();
  }, 1000);
  away = true;
  subscription.close();
  subscription = null;
  instruments.event(null, "cut");
  say("Cut. This tab hears nothing. The agent talks on, and relay writes it down.", "lost");
  show();
}

function reconnect() {
  clearInterval(offline);
  offline = null;
  follow();
}

// --- showing -----------------------------------------------------------------------------------------------

function connection() {
  if (offline || subscription?.state === "suspended") return "offline";
  if (subscription?.state === "closed") return "ended";
  // A tab for which another one reads is not told when that one connected.
  if (subscription?.state === "open" && (top !== null || subscription.role === "follower")) {
    return seqOf(cursor ?? "0-0") < seqOf(top ?? "0-0") ? "replaying" : "live";
  }
  return away || cursor ? "reconnecting" : "connecting";
}

function say(sentence, kind = "") {
  $("notice").textContent = sentence;
  $("notice").className = kind;
}

function back(sentence) {
  away = false;
  say(sentence, "back");
}

function show() {
  const state = connection();
  const isThere = state === "live" || state === "replaying";
  const { answering } = conversation;
  instruments.connection(state, subscription?.role);
  if (away && state === "live") back("Back, and nothing was missed.");
  document.body.dataset.agent = answering ? "talking" : "silent";
  $("empty").hidden = conversation.size > 0;
  $("send").disabled = asking || answering || !isThere || $("question").value.trim() === "";
  $("stop").disabled = !answering || !isThere;
  $("regenerate").disabled = asking || conversation.size === 0 || !isThere;
  $("cut").disabled = !offline && !isThere;
}

$("question").addEventListener("input", show);
follow();
countCalls();
