// Players side by side: what one does, all of its row do. One of them is loud, the one that was touched last.
"use strict";
(() => {
  const APART = 0.05; // seconds that players may drift before they are set straight
  const PLAYER = "video.shown, audio.shown";

  const rowOf = (player) => player.closest(".compare-row");
  const others = (player) => {
    const row = rowOf(player);
    return row ? Array.from(row.querySelectorAll(PLAYER)).filter((other) => other !== player) : [];
  };
  const place = (other, time) => {
    const end = Number.isFinite(other.duration) ? other.duration : time;
    return Math.min(time, end);
  };

  function loud(player) {
    player.muted = false;
    others(player).forEach((other) => { other.muted = true; });
  }

  // The leader of a row is the one a person touched; the others are held to its clock.
  const leaders = new WeakMap();
  const lead = (player) => { const row = rowOf(player); if (row) leaders.set(row, player); };
  const leads = (player) => leaders.get(rowOf(player)) === player;

  function straighten(player) {
    if (!leads(player) || player.paused) return;
    for (const other of others(player)) {
      const wanted = place(other, player.currentTime);
      if (Math.abs(other.currentTime - wanted) > APART && !other.seeking) other.currentTime = wanted;
      if (other.paused && !other.ended) other.play().catch(() => {});
    }
  }

  // A follower's own events come back here as well: it does not lead, and is not apart any more, so that they end there.
  const heard = {
    play: (player) => {
      if (!starts(player)) return;
      lead(player);
      loud(player);
      for (const other of others(player)) { other.currentTime = place(other, player.currentTime); other.play().catch(() => {}); }
    },
    pause: (player) => {
      if (!leads(player)) return;
      for (const other of others(player)) { other.pause(); other.currentTime = place(other, player.currentTime); }
    },
    seeked: (player) => {
      if (!(leads(player) || quiet(player)) || !apart(player)) return;
      lead(player);
      for (const other of others(player)) other.currentTime = place(other, player.currentTime);
    },
    ratechange: (player) => {
      if (leads(player) || quiet(player)) for (const other of others(player)) other.playbackRate = player.playbackRate;
    },
    volumechange: (player) => { if (!player.muted) loud(player); },
    timeupdate: straighten,
  };
  const apart = (player) => others(player).some((other) => Math.abs(other.currentTime - place(other, player.currentTime)) > 0.001);
  const quiet = (player) => others(player).every((other) => other.paused);
  const starts = (player) => leads(player) || quiet(player) || !others(player).length;

  // A person takes the lead by touching a player.
  for (const touch of ["pointerdown", "keydown", "focusin"]) {
    document.addEventListener(touch, (event) => { if (event.target.matches?.(PLAYER)) lead(event.target); }, true);
  }
  for (const [name, act] of Object.entries(heard)) {
    document.addEventListener(name, (event) => { if (event.target.matches?.(PLAYER)) act(event.target); }, true);
  }

  // What the page says of itself is read out by those who do not see it.
  const announce = () => {
    const status = document.querySelector("#compare-status");
    if (status && !status.hasAttribute("aria-live")) { status.setAttribute("aria-live", "polite"); status.setAttribute("role", "status"); }
  };
  new MutationObserver(announce).observe(document.documentElement, { childList: true, subtree: true });
})();
