// Starts a task and follows it with EventSource. What comes from the server is only ever written as text, never as HTML.
"use strict";

const part = (id) => document.getElementById(id);
let source = null;
let place = null;

part("start").addEventListener("submit", (event) => {
  event.preventDefault();
  start(new FormData(event.target)).catch(complain);
});

part("stop").addEventListener("click", () => {
  part("stop").disabled = true;
  // What becomes of it arrives as an event like all else.
  ask(place, { method: "DELETE" }).catch(complain);
});

async function start(fields) {
  part("problem").hidden = true;
  const answer = await ask(part("start").action, { method: "POST", body: fields });
  const task = await answer.json();
  place = answer.headers.get("Location");
  part("messages").replaceChildren();
  part("outcome").hidden = true;
  part("task").hidden = false;
  part("id").textContent = task.Id;
  show(task);
  follow(task.Sse.Url);
}

function follow(url) {
  if (source !== null) source.close();
  const mine = source = new EventSource(url);
  const hear = (name, then) => mine.addEventListener(name, (event) => then(JSON.parse(event.data)));

  hear("task.state", show);
  hear("task.progress", showProgress);
  hear("message", (data) => {
    const line = document.createElement("li");
    line.textContent = data.text;
    part("messages").append(line);
  });
  hear("task.completed", (task) => {
    // Else the browser would ask again, and be told that there is no more (204).
    mine.close();
    show(task);
    connection("The stream has ended with the task.");
  });
  mine.addEventListener("open", () => connection("Connected."));
  mine.addEventListener("error", () => {
    // A stream ends now and then; the browser comes back with the last id it has, and nothing is lost.
    connection(mine.readyState === EventSource.CLOSED ? "The connection is lost; start again." : "Connecting again …");
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

async function ask(url, options) {
  const answer = await fetch(url, { ...options, headers: { Accept: "application/json" } });
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  throw new Error(problem.detail ?? `The server answered ${answer.status}.`);
}

function connection(text) {
  part("connection").textContent = text;
}

function complain(error) {
  part("problem").textContent = error.message;
  part("problem").hidden = false;
}
