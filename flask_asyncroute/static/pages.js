// Shows times in the reader's time zone, and updates the page of a task: with an event stream, or
// else by polling.
"use strict";

const POLL_MS = 2000;
const PARTS = ["status", "progress", "outcome", "actions", "facts"];
const task = document.getElementById("task");
let source = null;
let loading = Promise.resolve();
let waiting = null;

function isLive() {
  return task !== null && "live" in task.dataset;
}

function showLocalTimes(part) {
  for (const time of part.querySelectorAll("time")) {
    time.title = time.textContent;
    time.textContent = new Date(time.dateTime).toLocaleString();
  }
}

// Loads the page once more after the current load, so that an older page never replaces a newer one.
function refresh() {
  waiting ??= loading.then(() => {
    waiting = null;
    loading = load();
    return loading;
  });
  return waiting;
}

// Updates the parts that differ from the page on the server, so that a focused button stays.
async function load() {
  let response, page;
  try {
    response = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
    page = new DOMParser().parseFromString(await response.text(), "text/html");
  } catch {
    return; // no connection
  }
  if (response.status >= 500) return;
  const fresh = page.getElementById("task");
  if (fresh === null) {
    // The task was removed, or the reader has to sign in again.
    location.reload();
    return;
  }
  showLocalTimes(fresh);
  for (const id of PARTS) {
    const part = document.getElementById(id);
    const other = page.getElementById(id);
    if (part?.textContent !== other?.textContent) part?.replaceChildren(...(other?.childNodes ?? []));
  }
  if (!("live" in fresh.dataset)) delete task.dataset.live;
  document.title = page.title;
}

async function poll() {
  await refresh();
  if (isLive()) setTimeout(poll, POLL_MS);
}

function follow(url) {
  source = new EventSource(url);
  source.addEventListener("task.state", refresh);
  source.addEventListener("task.progress", (event) => showProgress(JSON.parse(event.data)));
  source.addEventListener("task.completed", () => {
    source.close();
    poll();
  });
  source.addEventListener("error", () => {
    // The browser reconnects by itself, unless the server has refused the stream.
    if (source.readyState === EventSource.CLOSED) poll();
  });
}

function showProgress(data) {
  const bar = document.querySelector("#progress progress");
  const message = document.querySelector("#progress .message");
  if (bar === null || (message === null && data.ProgressMessage)) {
    refresh();
    return;
  }
  bar.value = data.Progress;
  document.querySelector("#progress .percent").textContent = `${Math.floor(data.Progress)} %`;
  if (message !== null) message.textContent = data.ProgressMessage ?? "";
}

showLocalTimes(document);
if (isLive()) {
  if (task.dataset.events) follow(task.dataset.events);
  else setTimeout(poll, POLL_MS);
  addEventListener("pagehide", () => source?.close());
  addEventListener("pageshow", (event) => event.persisted && location.reload());
}
