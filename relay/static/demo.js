"use strict";
// All this page keeps over a reload is the stream's name, in the URL's hash. All it needs to resume is the
// cursor: the id of the last frame it has.

const UPSTREAM = "/agent/stream";
const CUT_MS = 2000;
const LOG_MAX = 500;
// Control frames that say something of the connection. All other frames are in the journal and have a seq.
const CONNECTION_TYPES = new Set(["hello", "gap", "reset", "live", "bye"]);

const $ = (id) => document.getElementById(id);
const seqOf = (id) => Number(id.split("-")[0]);

let stream = location.hash.slice(1);
let cursor = "0-0";
let source = null;
let reopening = null;
let answer = null; // the paragraph that grows
let openRuns = new Set();
let asking = false;
const seen = { frames: 0, connections: 0, duplicates: 0, holes: 0 };

function show() {
  $("cursor").textContent = cursor;
  $("stream").textContent = stream || "–";
  for (const name of Object.keys(seen)) $(name).textContent = seen[name];
  for (const name of ["duplicates", "holes"]) $(name).className = seen[name] ? "bad" : "good";
  $("send").disabled = asking || openRuns.size > 0;
  $("cut").disabled = source === null;
  $("reload").disabled = $("tab").disabled = !stream;
}

function state(text, kind = "") {
  $("state").textContent = text;
  $("state").className = kind;
}

function log(id, text, control) {
  const list = $("log");
  const pinned = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  const line = document.createElement("li");
  if (control) line.className = "control";
  for (const part of [id || "–", text]) {
    const span = document.createElement("span");
    span.textContent = part;
    line.append(span);
  }
  list.append(line);
  while (list.childElementCount > LOG_MAX) list.firstChild.remove();
  if (pinned) list.scrollTop = list.scrollHeight;
}

function paragraph(kind, text) {
  $("empty")?.remove();
  const made = document.createElement("p");
  made.className = kind;
  made.textContent = text;
  $("chat").append(made);
  return made;
}

function clearChat() {
  $("chat").replaceChildren();
  answer = null;
  openRuns.clear();
}

// --- reading ---------------------------------------------------------------------------------------------

function connect(query) {
  disconnect();
  state("connecting");
  const opened = new EventSource(`/relay/v1/streams/${encodeURIComponent(stream)}/events?${query}&wait=10`);
  source = opened;
  opened.onopen = () => {
    seen.connections += 1;
    state("connected", "good");
    show();
  };
  opened.onerror = () => {
    if (opened.readyState === EventSource.CONNECTING) {
      state("lost, reconnecting", "bad"); // with Last-Event-ID, by itself
    } else {
      // 204: nothing more of this run. Anything else a browser does not tell. Either way, look for what
      // comes next; slowly, as it may be an error.
      disconnect();
      state("closed");
      follow(CUT_MS);
    }
    show();
  };
  opened.onmessage = (message) => frame(message, "");
  for (const event of ["question", "done", "relay"]) {
    opened.addEventListener(event, (message) => frame(message, event));
  }
  show();
}

function disconnect() {
  clearTimeout(reopening);
  source?.close();
  source = null;
}

// The whole stream from the cursor on: also what other tabs ask for.
function follow(delay_ms) {
  clearTimeout(reopening);
  reopening = setTimeout(() => connect(`after=${cursor}`), delay_ms);
}

function frame(message, event) {
  const id = message.lastEventId;
  const body = JSON.parse(message.data);
  if (event === "relay" && CONNECTION_TYPES.has(body.type)) {
    connectionSaid(id, body);
  } else if (seqOf(id) <= seqOf(cursor)) {
    seen.duplicates += 1; // shown nowhere: the id says that it is here already
  } else {
    if (seqOf(id) !== seqOf(cursor) + 1) seen.holes += 1;
    seen.frames += 1;
    cursor = id;
    log(id, `${event} ${message.data}`.trimStart(), event === "relay");
    journalSaid(event, body);
  }
  show();
}

function connectionSaid(id, body) {
  log(id, `relay ${JSON.stringify(body)}`, true);
  if (body.type === "reset") {
    clearChat();
    notice(`The journal was reset (${body.reason}); this is the stream from its earliest frame.`);
  } else if (body.type === "gap") {
    notice("Some older frames are no longer in the journal.");
  }
  // The id is the position that this frame establishes: where the next frame follows. A page that has a
  // cursor believes only a gap or a reset, so that a wrong hello would show as a hole.
  if (id && (cursor === "0-0" || body.type === "gap" || body.type === "reset")) cursor = id;
  if (body.type === "live") state("live", "good");
  if (body.type === "bye" && body.reason === "ended") {
    disconnect();
    follow(0);
  } else if (body.type === "bye" && body.reason === "deleted") {
    disconnect();
    state("the stream was deleted", "bad");
  }
}

function journalSaid(event, body) {
  if (event === "question") {
    paragraph("question", body.text || "(no question)");
    answer = paragraph("answer open", "");
  } else if (event === "relay" && body.type === "run.started") {
    openRuns.add(body.run);
    stats();
  } else if (event === "relay" && body.type === "run.ended") {
    openRuns.delete(body.run);
    answer?.classList.remove("open");
    answer = null;
    const words = `${body.status}${body.error ? `: ${body.error}` : ""}`;
    paragraph("ending", words).title = body.reason;
  } else if (event === "") {
    answer ??= paragraph("answer open", "");
    answer.textContent += body.text;
  }
}

// --- asking ----------------------------------------------------------------------------------------------

async function ask(prompt) {
  asking = true;
  notice("");
  if (!stream) {
    stream = `demo-${Array.from(crypto.getRandomValues(new Uint32Array(2)), (n) => n.toString(36)).join("")}`;
    history.replaceState(null, "", `#${stream}`);
  }
  show();
  try {
    // Through the proxy, as any client would call the agent; the header only names the conversation.
    const response = await fetch(`${UPSTREAM}?prompt=${encodeURIComponent(prompt)}`, {
      headers: { "Relay-Stream": stream },
    });
    const behind = response.headers.get("Relay-Stream");
    response.body?.cancel(); // leaving is not stopping: the run goes on, and is read from the journal
    if (!response.ok) notice(`The agent answered ${response.status}.`);
    else if (behind === null) notice("No relay in front of this agent: open this page through relay.");
    else {
      if (behind !== stream) {
        stream = behind;
        history.replaceState(null, "", `#${stream}`);
        cursor = "0-0";
        disconnect();
      }
      if (source === null) follow(0);
    }
  } catch (error) {
    notice(`Asking failed: ${error.message}`);
  }
  asking = false;
  show();
}

function notice(text) {
  $("notice").textContent = text;
}

async function stats() {
  try {
    const answered = await (await fetch("/agent/stats")).json();
    $("calls").textContent = answered.calls[UPSTREAM];
  } catch {
    $("calls").textContent = "–";
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!$("send").disabled) ask($("prompt").value);
});

$("cut").addEventListener("click", () => {
  disconnect();
  state(`cut, back in ${CUT_MS / 1000} s`, "bad");
  log("", "the connection is cut", true);
  follow(CUT_MS);
  show();
});

$("reload").addEventListener("click", () => location.reload());
$("tab").addEventListener("click", () => window.open(location.href, "_blank"));
window.addEventListener("hashchange", () => location.reload());

setInterval(stats, 3000);
stats();
show();
if (stream) connect("run=latest");
