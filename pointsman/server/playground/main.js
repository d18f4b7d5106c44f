// The page: its views, its key, and what it says of the server.

const WAIT_MILLISECONDS = 700;

function showView(view) {
  document.body.dataset.view = view;
  if (view !== "chat") document.body.dataset.side = view;
  for (const tab of document.querySelectorAll("[data-show]")) {
    const phone = getComputedStyle(document.querySelector(".phone")).display !== "none";
    tab.setAttribute("aria-current", String(tab.dataset.show === (phone ? view : document.body.dataset.side)));
  }
}

function askForKey(current) {
  const dialog = find("key-dialog"), input = find("key");
  input.value = "";
  find("key-title").textContent = current ? "That key was not accepted" : "This server needs an API key";
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const used = dialog.returnValue === "use" && input.value !== "";
      if (used) api.key = input.value;
      input.value = "";
      resolve(used);
    }, { once: true });
  });
}

function say(state, text) {
  find("status").dataset.state = state;
  find("status").textContent = text;
}

/** Wait until the model is there, and say so. */
async function greet() {
  for (;;) {
    try {
      const models = await api.json("/v1/models");
      find("model").textContent = models.data[0].id;
      find("model").title = `Context of ${models.data[0].max_model_len.toLocaleString("en")} tokens`;
      say("ready", "ready");
      routing.poll();
      return;
    } catch (error) {
      if (error.status === 401) {
        say("bad", "no API key");
        return;
      }
      say("wait", error.status === 503 ? error.message : "the server does not answer");
    }
    await new Promise((resolve) => setTimeout(resolve, WAIT_MILLISECONDS));
  }
}

let asking = null;
const api = new Api((current) => (asking = asking || askForKey(current).finally(() => (asking = null))));
const routing = new RoutingView(api);
const chat = new Chat(api, routing);

find("key-cancel").addEventListener("click", () => find("key-dialog").close("cancel"));
for (const tab of document.querySelectorAll("[data-show]")) tab.addEventListener("click", () => showView(tab.dataset.show));
matchMedia("(max-width: 860px)").addEventListener("change", () => showView(document.body.dataset.view));
find("key-change").addEventListener("click", async () => {
  if (await askForKey(api.key)) greet();
});
showView("chat");
greet();
chat.box.focus();
