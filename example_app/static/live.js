// Starts a task and follows it with EventSource. Data from the server is always written as text, never as HTML.
"use strict";

const part = (id) => document.getElementById(id);
let source = null;
let taskUrl = null;

part("start").addEventListener("submit", (event) => {
  event.preventDefault();
  start(new FormData(event.target)).catch(showProblem);
});

part("stop").addEventListener("click", () => {
  part("stop").disabled = true;
  // The stream reports the result of the stop.
  send(taskUrl, { method: "DELETE" }).catch(showProblem);
});

async function start(fields) {
  part("problem").hidden = true;
  const response = await send(part("start").action, { method: "POST", body: fields });
  const task = await response.json();
  taskUrl = response.headers.get("Location");
  part("messages").replaceChildren();
  part("outcome").hidden = true;
  part("task").hidden = false;
  part("id").textContent = task.Id;
  show(task);
  follow(task.Sse.Url);
}

function follow(url) {
  if (source !== null) source.close();
  const stream = source = new EventSource(url);
  const listen = (name, handle) => stream.addEventListener(name, (event) => handle(JSON.parse(event.data)));

  listen("task.state", show);
  listen("task.progress", showProgress);
  listen("message", (data) => {
    const line = document.createElement("li");
    line.textContent = data.text;
    part("messages").append(line);
  });
  listen("task.completed", (task) => {
    // If the stream stayed open, the browser would reconnect and get status 204.
    stream.close();
    show(task);
    showConnection("The stream has ended with the task.");
  });
  stream.addEventListener("open", () => showConnection("Connected."));
  stream.addEventListener("error", () => {
    // Streams end at their maximum age. The browser reconnects with the last id, so no event is lost.
    showConnection(stream.readyState === EventSource.CLOSED ? "The connection is lost. Start again." : "Reconnecting …");
  });
}

function show(task) {
  part("state").textContent = task.State;
  part("state").className = `state ${task.State}`;
  showProgress(task);
  part("stop").disabled = task.IsCompleted || !task.Cancellable;
  if (task.IsCompleted) {
    part("doing").textContent = "";
    part("outcome").textContent = task.Error === undefined ? JSON.stringify(task.Result, null, 2) : task.Error;
    part("outcome").hidden = false;
  }
}

function showProgress(task) {
  const progress = task.Progress ?? 0;
  part("progress").value = progress;
  part("percent").textContent = `${Math.round(progress)} %`;
  part("doing").textContent = task.ProgressMessage ?? "";
}

async function send(url, options) {
  const response = await fetch(url, { ...options, headers: { Accept: "application/json" } });
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  throw new Error(problem.detail ?? `The server responded with status ${response.status}.`);
}

function showConnection(text) {
  part("connection").textContent = text;
}

function showProblem(error) {
  part("problem").textContent = error.message;
  part("problem").hidden = false;
}
