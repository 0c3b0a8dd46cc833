// Voting: puts the open comparison on the page as text and media (never as markup), and sends votes until they are acknowledged.
"use strict";
(() => {
  const CHOICES = ["left", "right", "tie", "both_bad"];
  const KEYS = { 1: "left", 2: "right", 0: "tie", 9: "both_bad", u: "undo", U: "undo", ArrowLeft: "left", ArrowRight: "right" };
  const WORDS = { left: "A is better", right: "B is better", tie: "Tie", both_bad: "Both bad" };
  const PENDING = "mmpo.vote";
  const SLOWEST = 4000; // milliseconds between two attempts to reach the server
  let parts = null, current = null, left = 0, busy = true, sure = 0;

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children.filter((child) => child !== null));
    return element;
  };
  const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
  const say = (words) => { parts.status.textContent = words; };
  const percent = (share) => `${Math.round(100 * share)} %`;
  const whole = (number) => String(Math.round(number));

  // Ask the server until it answers; what it refuses is an answer, that it is away, busy or broken is not.
  async function ask(path, body) {
    for (let pause = 250; ; pause = Math.min(2 * pause, SLOWEST)) {
      try {
        const options = { credentials: "same-origin", cache: "no-store" };
        if (body) Object.assign(options, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
        const answer = await fetch(path, options);
        if (answer.status === 401) { location.reload(); await wait(SLOWEST); continue; }
        if (answer.status < 500 && answer.status !== 429 && answer.status !== 408) {
          return { ok: answer.ok, status: answer.status, told: await answer.json() };
        }
      } catch (error) { /* no connection, or it broke: tried again */ }
      say("Reconnecting\u2026");
      await wait(pause);
    }
  }

  const nonce = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const keep = (vote) => { try { vote ? sessionStorage.setItem(PENDING, JSON.stringify(vote)) : sessionStorage.removeItem(PENDING); } catch (error) { /* not allowed here */ } };
  const kept = () => { try { return JSON.parse(sessionStorage.getItem(PENDING)); } catch (error) { return null; } };

  async function cast(choice) {
    if (busy || !parts.results.hidden || (choice !== "undo" && choice !== "finish" && !current)) return;
    busy = true;
    buttons();
    await settle({ comparison: CHOICES.includes(choice) ? current : null, choice, nonce: nonce() });
  }

  // Send one vote until it is acknowledged or refused, then show what is open.
  async function settle(vote) {
    keep(CHOICES.includes(vote.choice) ? vote : null); // not undo and finish, which need no comparison: another one may log in next
    const answer = await ask("/vote", vote);
    keep(null);
    let said = WORDS[vote.choice] ? `Stored: ${WORDS[vote.choice]}.` : "";
    if (vote.choice === "undo") said = answer.ok && answer.told.stored ? "Taken back." : "There is nothing to take back.";
    if (!answer.ok) said = String(answer.told.detail || "The server refused this.");
    await load(said);
  }

  async function load(said = "") {
    const { ok, told } = await ask("/vote");
    busy = false;
    if (!ok) return say(String(told.detail || "The server refused this."));
    progress(told);
    current = told.comparison;
    parts.ballot.hidden = !current;
    if (current) show(told);
    if (!current && told.finished) return results();
    say(current ? said : "You have voted on everything. Finish shows who was who; until then u takes back the last vote.");
    buttons();
  }

  function progress({ done, total, others }) {
    left = total - done;
    parts.bar.max = Math.max(total, 1);
    parts.bar.value = done;
    parts.count.textContent = `${done} of ${total} voted${others ? `, ${others} more on answers that are not asked about any more` : ""}`;
  }

  function show(told) {
    parts.prompt.replaceChildren(...told.prompt.map((part) => piece(part, "image", "Picture of the prompt")));
    parts.prompt.hidden = !told.prompt.length;
    for (const [side, name] of [["left", "A"], ["right", "B"]]) {
      parts[side].replaceChildren(piece(told[side], told.kind, `Answer ${name}`));
      parts[side].scrollTop = 0;
    }
    parts.frame.dataset.comparison = told.comparison;
  }

  // A text, or a medium at an address of this server.
  function piece(part, kind, name) {
    if ("text" in part) return make("p", { class: "vote-text" }, (part.role ? `${part.role}: ` : "") + part.text);
    if (kind === "image") return failing(make("img", { src: part.media, alt: name }), name);
    const player = make(kind, { src: part.media, controls: "", preload: "auto", "aria-label": name });
    if (kind === "video") { player.setAttribute("playsinline", ""); player.setAttribute("loop", ""); }
    return failing(player, name);
  }

  function failing(element, name) {
    element.addEventListener("error", () => element.replaceWith(make("p", { class: "vote-text" }, `${name} cannot be shown.`)));
    return element;
  }

  function buttons() {
    for (const choice of CHOICES) disable(choice, busy || !current);
    disable("undo", busy);
    disable("finish", busy);
  }
  function disable(choice, off) {
    const button = document.getElementById(`vote-${choice}`);
    if (button) button.setAttribute("aria-disabled", String(off));
  }

  // Who was who

  async function results() {
    const { ok, told } = await ask("/vote/results");
    if (!ok) return say(String(told.detail));
    current = null;
    parts.ballot.hidden = true;
    parts.results.replaceChildren(...summary(told), ...(told.mode === "label" ? told.items.flatMap(ranking) : [systems(told)]), ...unbounded(told), who(told));
    parts.results.hidden = false;
    document.getElementById("vote-buttons").hidden = true;
    say("");
    parts.results.focus();
  }

  function summary(told) {
    const lines = [`${told.votes} votes by ${told.voters} ${told.voters === 1 ? "voter" : "voters"}.${told.others ? ` ${told.others} of them are on answers that are not asked about any more, and count for nothing here.` : ""}`];
    const rate = told.win_rate;
    if (rate) lines.push(`${rate.of} wins ${percent(rate.value)} of its comparisons with ${rate.over} (95 % interval ${percent(rate.low)} to ${percent(rate.high)}, ties count half).`);
    lines.push(told.agreement === null ? `Agreement between voters: not defined, ${told.why}.` : `Agreement between voters (Krippendorff's alpha): ${told.agreement.toFixed(2)}.`);
    return [make("h2", {}, "Who was who"), ...lines.map((line) => make("p", {}, line))];
  }

  const table = (name, heads, rows) => make("div", { class: "vote-table", tabindex: "0", role: "region", "aria-label": name },
    make("table", {}, make("caption", {}, name), make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell)))))));
  const unknown = (of) => of.low === null && of.high === null;
  function interval(of, told) {
    if (unknown(of)) return told(of.value);
    const bounds = of.high === null ? `${told(of.low)} or more` : of.low === null ? `${told(of.high)} or less` : `${told(of.low)} to ${told(of.high)}`;
    return [told(of.value), `(${bounds})`].map((part) => part.replaceAll(" ", "\u00a0")).join(" ");
  }
  const tally = (row) => [interval(row.win_rate, percent), interval(row.elo, whole), whole(row.wins), whole(row.ties), whole(row.losses)];
  const TALLY = ["Win rate", "Elo", "Wins", "Ties", "Losses"]; // a narrow page shows the first columns, the others by scrolling

  function unbounded(told) {
    if (![...(told.systems || []), ...(told.items || []).flatMap((item) => item.answers)].some((row) => unknown(row.elo))) return [];
    return [make("p", {}, "Elo stands without an interval where the votes set no bound.")];
  }

  function systems(told) {
    if (!told.systems.length) return make("p", {}, "The data do not name who made the answers.");
    return table("Systems, best first", ["System", ...TALLY], told.systems.map((row) => [row.name, ...tally(row)]));
  }

  function ranking(item) {
    const rows = item.answers.map((row) => [piece(row, row.kind, row.name), row.name, ...tally(row)]);
    return [table(`Ranking${item.prompt ? `: ${item.prompt}` : ""}`, ["Answer", "Name", ...TALLY], rows)];
  }

  function who(told) {
    const rows = told.who.map((row, i) => [String(i + 1), row.prompt, row.left, row.right, WORDS[row.choice]]);
    return table(`Your votes${told.own > rows.length ? `, the first ${rows.length} of ${told.own}` : ""}`, ["", "Prompt", "A was", "B was", "You said"], rows);
  }

  // The page

  function finish() {
    const now = Date.now();
    if (left > 0 && now - sure > 8000) {
      sure = now;
      return say(`${left} are not voted on. Press once more to finish all the same; no vote can be changed after that.`);
    }
    cast("finish");
  }

  function clicked(event) {
    const button = event.target.closest("#vote-left, #vote-right, #vote-tie, #vote-both_bad, #vote-undo, #vote-finish");
    if (!button || button.getAttribute("aria-disabled") === "true") return;
    const choice = button.id.slice("vote-".length);
    choice === "finish" ? finish() : cast(choice);
  }

  function pressed(event) {
    const choice = KEYS[event.key], target = event.target;
    if (!choice || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
    if (target.closest("textarea, select, [contenteditable=true], [role=listbox], input:not([type=radio])")) return;
    if (event.key.startsWith("Arrow") && target.closest("input, video, audio, .vote-table, .vote-sample")) return;
    event.preventDefault();
    cast(choice);
  }

  function build(frame) {
    const side = (name) => make("div", { class: "vote-sample", tabindex: "0", role: "group", "aria-label": `Answer ${name}` });
    parts = {
      frame, bar: make("progress", { "aria-label": "Votes so far" }), count: make("span"), left: side("A"), right: side("B"),
      prompt: make("div", { id: "vote-prompt", role: "group", "aria-label": "Prompt" }), status: make("p", { id: "vote-status", role: "status" }),
      results: make("section", { id: "vote-results", tabindex: "-1", "aria-label": "Results" }),
    };
    const sides = make("div", { class: "vote-sides" }, ...[["A", parts.left], ["B", parts.right]].map(([name, sample]) => make("div", { class: "vote-side" }, make("h2", {}, name), sample)));
    parts.ballot = make("div", { id: "vote-ballot" }, parts.prompt, sides);
    parts.results.hidden = true;
    parts.ballot.hidden = true;
    const loading = document.getElementById("vote-loading");
    if (loading) loading.hidden = true;
    frame.append(make("p", { id: "vote-progress" }, parts.bar, " ", parts.count), parts.ballot, parts.status, parts.results);
    document.addEventListener("click", clicked);
    document.addEventListener("keydown", pressed);
    const vote = kept();
    vote ? settle(vote) : load();
  }

  const watch = new MutationObserver(start);
  function start() {
    const frame = document.getElementById("vote-frame");
    if (!frame || !document.getElementById("vote-finish")) return;
    watch.disconnect();
    build(frame);
  }
  watch.observe(document.documentElement, { childList: true, subtree: true });
  start();
})();
