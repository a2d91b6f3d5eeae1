// Keeps the board up to date with one event stream, and starts tasks without leaving the page.
// Without this script, the page is a plain list, and its forms lead to the pages of the tasks.
"use strict";

const RETRY_MS = 3000;
const part = (id) => document.getElementById(id);
const board = part("board");
let source = null;
let refreshing = null;
let isStale = false;

// --- The board ---

// Reads the board from the server. Changes during a read cause one more read.
function refresh() {
  isStale = true;
  refreshing ??= readBoard().catch(showProblem).finally(() => { refreshing = null; });
  return refreshing;
}

async function readBoard() {
  while (isStale) {
    isStale = false;
    const response = await fetch(board.dataset.url, { headers: { Accept: "text/html" } });
    if (!response.ok) throw new Error(`The server responded with status ${response.status}.`);
    showBoard(new DOMParser().parseFromString(await response.text(), "text/html").body);
  }
}

function showBoard(fresh) {
  const focused = board.contains(document.activeElement) ? document.activeElement.id : "";
  board.replaceChildren(...fresh.childNodes);
  showButtons();
  if (focused) part(focused)?.focus();
  // The form that started a task shows it, too.
  for (const place of document.querySelectorAll(".started[data-task]")) {
    const row = board.querySelector(`[data-task="${place.dataset.task}"]`);
    if (row !== null) place.replaceChildren(...withoutIds(row).childNodes);
  }
}

function withoutIds(row) {
  const copy = row.cloneNode(true);
  for (const element of copy.querySelectorAll("[id]")) element.removeAttribute("id");
  for (const element of copy.querySelectorAll("time, .stop")) element.remove();
  return copy;
}

function showButtons() {
  for (const button of board.querySelectorAll(".stop")) button.hidden = false;
}

function showProgress(task) {
  for (const place of document.querySelectorAll(`[data-task="${task.Id}"]`)) {
    const bar = place.querySelector(".going progress");
    if (bar === null) {
      refresh();
      return;
    }
    bar.value = task.Progress;
    place.querySelector(".percent").textContent = `${Math.round(task.Progress)} %`;
    place.querySelector(".doing").textContent = task.ProgressMessage ?? "";
  }
}

board.addEventListener("click", (event) => {
  const button = event.target.closest(".stop");
  if (button === null) return;
  button.disabled = true;
  send(button.dataset.url, { method: "DELETE" }).catch(showProblem).finally(refresh);
});

// --- The event stream ---

function connect() {
  if (source !== null || document.hidden) return;
  source = new EventSource(board.dataset.events);
  source.addEventListener("open", () => {
    part("connection").textContent = "Live";
    refresh(); // for the changes before the stream began
  });
  source.addEventListener("task.state", refresh);
  source.addEventListener("task.progress", (event) => showProgress(JSON.parse(event.data)));
  source.addEventListener("task.completed", (event) => {
    const task = JSON.parse(event.data);
    part("news").textContent = `${task.Method} ${new URL(task.Url).pathname}: ${task.State}`;
    refresh();
  });
  source.addEventListener("error", () => {
    // Streams end at their maximum age, or at once if the server has too many. Then the browser
    // reconnects by itself, unless the server has refused the stream.
    if (source?.readyState !== EventSource.CLOSED) return;
    disconnect();
    part("connection").textContent = "Not connected";
    setTimeout(connect, RETRY_MS);
  });
}

function disconnect() {
  source?.close();
  source = null;
}

// A browser opens six connections to a server for all tabs, so hidden tabs close their streams.
document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
addEventListener("pagehide", disconnect);
addEventListener("pageshow", connect);

// --- Forms ---

for (const form of document.querySelectorAll("form.work")) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    start(form).catch(showProblem);
  });
}

async function start(form) {
  const button = form.querySelector("button");
  const place = form.querySelector(".started");
  part("problem").hidden = true;
  delete place.dataset.task;
  button.disabled = true;
  try {
    const task = await upload(form, place);
    place.dataset.task = task.Id;
    await refresh();
    place.hidden = false;
  } catch (error) {
    place.hidden = true;
    throw error;
  } finally {
    button.disabled = false;
  }
}

// Sends a form and returns the task. fetch() does not report the progress of an upload.
function upload(form, place) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", form.action);
    request.setRequestHeader("Accept", "application/json");
    request.responseType = "json";
    if (form.enctype === "multipart/form-data") {
      const bar = document.createElement("progress");
      bar.max = 100;
      bar.setAttribute("aria-label", "Upload");
      const text = document.createElement("span");
      text.textContent = "Uploading";
      place.replaceChildren(bar, text);
      place.hidden = false;
      request.upload.addEventListener("progress", ({ loaded, total }) => {
        bar.value = (100 * loaded) / total;
        text.textContent = `Uploading: ${Math.round(bar.value)} %`;
      });
    }
    request.addEventListener("load", () => {
      if (request.status < 300 && request.response !== null) resolve(request.response);
      else reject(new Error(request.response?.detail ?? `The server responded with status ${request.status}.`));
    });
    request.addEventListener("error", () => reject(new Error("The server cannot be reached.")));
    request.send(new FormData(form));
  });
}

async function send(url, options) {
  const response = await fetch(url, { ...options, headers: { Accept: "application/json" } });
  if (response.ok) return;
  const problem = await response.json().catch(() => ({}));
  throw new Error(problem.detail ?? `The server responded with status ${response.status}.`);
}

function showProblem(error) {
  part("problem").textContent = error.message;
  part("problem").hidden = false;
}

// --- Commands ---

if (navigator.clipboard !== undefined) {
  for (const button of document.querySelectorAll(".copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.parentElement.querySelector("pre").textContent.trim());
      button.textContent = "Copied";
    });
  }
}

part("reload").hidden = true; // the board updates itself
showButtons();
connect();
