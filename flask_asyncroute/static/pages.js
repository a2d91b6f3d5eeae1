// Updates the page of a task while the task runs: with an event stream, or else by polling.
"use strict";

const POLL_MS = 2000;
let source = null;

function task() {
  return document.getElementById("task");
}

// Replaces the content with the page as it is now on the server. Returns false if that failed.
async function refresh() {
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const fresh = page.getElementById("task");
    if (fresh === null) {
      document.querySelector("main").replaceChildren(...page.querySelector("main").childNodes);
      return true;
    }
    task().replaceWith(fresh);
    document.title = page.title;
    return true;
  } catch {
    return false;
  }
}

async function poll() {
  await refresh();
  if (task() !== null && "live" in task().dataset) setTimeout(poll, POLL_MS);
}

function follow(url) {
  source = new EventSource(url);
  source.addEventListener("task.state", () => refresh());
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

async function showProgress(data) {
  let bar = task().querySelector("progress");
  if (bar === null) {
    await refresh();
    bar = task().querySelector("progress");
  }
  if (bar === null) return;
  bar.value = data.Progress;
  task().querySelector(".percent").textContent = `${Number(data.Progress.toPrecision(4))} %`;
  task().querySelector(".message").textContent = data.ProgressMessage ?? "";
}

if (task() !== null && "live" in task().dataset) {
  if (task().dataset.events) follow(task().dataset.events);
  else setTimeout(poll, POLL_MS);
  addEventListener("pagehide", () => source?.close());
}
