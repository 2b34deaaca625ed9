// A click or Enter shows a picture large; arrows walk; m asks for more like it; Escape closes.
const cards = () => [...element.querySelectorAll("figure")].filter(card => card.offsetParent);  // what is hidden is not walked to
const large = () => element.querySelector("dialog");
let shown = 0;

function show(place) {
  const all = cards(), box = large();
  if (!all.length) return;
  shown = (place + all.length) % all.length;
  const card = all[shown], thumbnail = card.querySelector("img");
  box.querySelector("img").src = card.dataset.full || thumbnail.src;
  box.querySelector("img").alt = thumbnail.alt;
  box.querySelector("p").textContent = thumbnail.alt;
  if (!box.open) box.showModal();
}

function unfold(button) {
  const before = cards().length;
  element.querySelector(".grid").classList.add("all");
  element.querySelector(".message")?.remove();
  button.remove();
  cards()[before]?.focus();
}

function columns() {
  const all = cards();
  return all.filter(card => card.offsetTop === all[0].offsetTop).length;
}

element.addEventListener("click", event => {
  const card = event.target.closest("figure"), box = large();
  if (event.target.closest(".more")) trigger("select", { key: card.dataset.key, title: card.querySelector("img").alt });
  else if (event.target.closest(".rest")) unfold(event.target);
  else if (event.target.closest(".previous")) show(shown - 1);
  else if (event.target.closest(".next")) show(shown + 1);
  else if (event.target.closest(".close") || event.target === box) box.close();
  else if (card) show(cards().indexOf(card));
});

element.addEventListener("keydown", event => {
  const box = large(), step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() }[event.key];
  if (box.open) {
    if (step === 1 || step === -1) { show(shown + step); event.preventDefault(); }
    return;
  }
  const all = cards(), place = all.indexOf(event.target);
  if (place < 0) return;
  if (event.key === "Enter") show(place);
  else if (event.key === "m" && all[place].dataset.key) trigger("select", { key: all[place].dataset.key, title: all[place].querySelector("img").alt });
  else if (step && all[place + step]) all[place + step].focus();
  else return;
  event.preventDefault();
});
