// The page of `serve`: choose a video, ask, go to moments of it, and let each method answer.
const at = id => document.getElementById(id);
const film = at('film'), still = at('still'), result = at('result');
const LOADED_AT_ONCE = 4;  // previews
const found = new Map();  // address of a question -> its result, for going back and forth
let shown = null;  // name of the video in the player
let asked = null;  // {video, question, num_frames, method} of the result on the page
let moment = 0;  // seconds

// ---- talking with the server ----------------------------------------------------------------------------

async function call(path, options) {
  const response = await fetch(path, options), content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}

function say(text) { at('state').textContent = text; }

// Asks, and follows the question until it is done or failed: {state, share, html, answer}.
async function follow(fields, report) {
  const { question } = await call('/questions', { method: 'POST', body: JSON.stringify(fields) });
  for (;;) {
    const job = await call('/questions/' + question);
    report(job);
    if (job.state === 'done' || job.state === 'failed') return job;
    await new Promise(wake => setTimeout(wake, 300));
  }
}

function clock(seconds) {
  const whole = Math.round(seconds), two = n => String(n).padStart(2, '0');
  const hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  return (hours ? hours + ':' + two(minutes) : minutes) + ':' + two(whole % 60);
}

const urlOf = (kind, name) => '/' + kind + '/' + name.split('/').map(encodeURIComponent).join('/');

// ---- the videos to choose from --------------------------------------------------------------------------

const cards = new Map();  // name -> element

function addCard(name) {
  const card = document.createElement('li');
  card.role = 'option';
  card.ariaSelected = 'false';
  card.tabIndex = -1;
  card.dataset.name = name;
  card.title = name;
  card.innerHTML = "<span class='picture'></span><span class='length'></span><span class='name'></span>";
  card.querySelector('.name').textContent = name;
  cards.set(name, card);
  at('cards').append(card);
  seen.observe(card);
}

// Pictures are loaded for the cards that can be seen, those that came into view last first.
const wanted = new Set();
let loading = 0;
const seen = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) wanted.add(target); else wanted.delete(target);
  }
  loadPreviews();
}, { root: at('cards'), rootMargin: '200px' });

async function loadPreviews() {
  while (wanted.size && loading < LOADED_AT_ONCE) {
    const card = [...wanted].pop();
    wanted.delete(card);
    seen.unobserve(card);
    loading++;
    loadPreview(card).finally(() => { loading--; loadPreviews(); });
  }
}

async function loadPreview(card) {
  try {
    const { seconds, picture } = await call(urlOf('previews', card.dataset.name));
    const image = new Image();
    image.src = picture;
    image.alt = '';
    card.querySelector('.picture').replaceChildren(image);
    card.querySelector('.length').textContent = seconds === null ? '' : clock(seconds);
    if (card.dataset.name === shown && film.hidden && !still.hidden && !still.getAttribute('src')) still.src = picture;
  } catch (error) {
    card.classList.add('unreadable');
    card.title = error.message;
  }
}

const inView = () => [...cards.values()].filter(card => !card.hidden);

function search() {
  const words = at('search').value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const [name, card] of cards) card.hidden = !words.every(word => name.toLowerCase().includes(word));
  const number = inView().length;
  at('count').textContent = number === cards.size ? number : number + ' of ' + cards.size;
  makeReachable();
}

// One card can be reached by Tab: the chosen one, else the first.
function makeReachable(card) {
  const visible = inView();
  card = card || visible.find(c => c.ariaSelected === 'true') || visible[0];
  for (const other of at('cards').querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
  if (card) card.tabIndex = 0;
}

function moveTo(card) {
  if (!card) return;
  makeReachable(card);
  card.focus();
  card.scrollIntoView({ block: 'nearest' });
}

at('search').oninput = search;
at('search').onkeydown = event => {
  if (event.key === 'ArrowDown') { event.preventDefault(); moveTo(inView()[0]); }
  if (event.key === 'Enter' && inView().length) { event.preventDefault(); choose(inView()[0].dataset.name, true); }
};
at('cards').onclick = event => {
  const card = event.target.closest('li');
  if (card) choose(card.dataset.name);
};
at('cards').onkeydown = event => {
  const visible = inView(), place = visible.indexOf(document.activeElement);
  if (place < 0) return;
  const columns = visible.findIndex((card, i) => i && card.offsetTop !== visible[0].offsetTop);
  const across = columns < 0 ? visible.length : columns;
  const rows = Math.max(1, Math.floor(at('cards').clientHeight / visible[0].offsetHeight));
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, PageDown: rows * across,
    PageUp: -rows * across, Home: -visible.length, End: visible.length };
  if (event.key === 'Enter' || event.key === ' ') choose(visible[place].dataset.name, true);
  else if (event.key === 'ArrowUp' && place < across) at('search').focus();
  else if (event.key in steps) moveTo(visible[Math.min(visible.length - 1, Math.max(0, place + steps[event.key]))]);
  else return;
  event.preventDefault();
};
document.addEventListener('keydown', event => {
  if (event.key === '/' && !/INPUT|TEXTAREA|SELECT/.test(document.activeElement.tagName)) {
    event.preventDefault();
    at('library').open = true;
    at('search').focus();
  }
});

// A video of the list is chosen: it is shown, and its link is in the address bar.
function choose(name, byKeyboard) {
  if (matchMedia('(max-width: 800px)').matches) at('library').open = false;
  show(name);
  clearResult();
  history.pushState(null, '', addressOf({ video: name }));
  if (byKeyboard) at('question').focus({ preventScroll: true });  // else a phone would open its keyboard
  at('player').scrollIntoView({ block: 'nearest' });
}

function show(name) {
  if (name === shown) return;
  shown = name;
  at('video').value = name;
  for (const card of at('cards').querySelectorAll("[aria-selected='true']")) card.ariaSelected = 'false';
  const card = cards.get(name);
  if (card) { card.ariaSelected = 'true'; makeReachable(card); card.scrollIntoView({ block: 'nearest' }); }
  still.hidden = true;
  still.removeAttribute('src');
  film.hidden = false;
  film.src = urlOf('videos', name);
  moment = 0;
  sayWhere();
}

if (at('file')) at('file').onchange = async () => {
  const file = at('file').files[0];
  if (!file) return;
  say('Adding ' + file.name + ' ...');
  try {
    const { video } = await call('/videos/' + encodeURIComponent(file.name), { method: 'PUT', body: file });
    at('video').add(new Option(video, video));
    addCard(video);
    search();
    choose(video);
    say(video + ' was added.');
  } catch (error) { say(error.message); }
  at('file').value = '';
};
at('video').onchange = () => choose(at('video').value);

// ---- the player -----------------------------------------------------------------------------------------

// What the browser cannot play, or is only in the frame store, is shown frame by frame.
film.onerror = () => {
  film.hidden = true;
  still.hidden = false;
  goTo(moment);
};
still.onerror = () => {  // not decoded yet: the picture of its card
  const picture = cards.get(shown) && cards.get(shown).querySelector('img');
  if (picture && still.src !== picture.src) still.src = picture.src;
};
film.ontimeupdate = () => { if (!film.hidden && film.readyState) { moment = film.currentTime; sayWhere(); } };

function goTo(seconds) {
  moment = Math.max(0, seconds);
  if (!film.hidden) film.currentTime = moment;
  else if (shown) still.src = urlOf('stills', shown) + '?at=' + moment;
  sayWhere();
}

function sayWhere() {
  at('where').textContent = shown ? shown + ', ' + clock(moment) : '';
  for (const chart of result.querySelectorAll('svg[data-duration]')) {
    const { left, right, duration } = chart.dataset, line = chart.querySelector('.now');
    const x = +left + (right - left) * Math.min(1, moment / duration);
    line.setAttribute('x1', x);
    line.setAttribute('x2', x);
    chart.setAttribute('aria-valuenow', moment.toFixed(1));
    chart.setAttribute('aria-valuetext', clock(moment));
  }
  for (const frame of result.querySelectorAll('figure[data-seconds]')) {
    frame.classList.toggle('shown', Math.abs(frame.dataset.seconds - moment) < 0.5);
  }
}

// ---- the result -----------------------------------------------------------------------------------------

function clearResult() {
  asked = null;
  result.replaceChildren();
  at('share').hidden = true;
  say('');
}

function addressOf(fields) {
  const parameters = new URLSearchParams();
  for (const name of ['video', 'question', 'num_frames', 'method']) if (fields[name]) parameters.set(name, fields[name]);
  return '/?' + parameters;
}

function showResult(fields, job) {
  put(job.html);
  if (job.state === 'failed') return;
  asked = fields;
  for (const chart of result.querySelectorAll('svg[data-duration]')) {
    const line = document.createElementNS('http://www.w3.org/2000/svg', 'line');
    const attributes = { class: 'now', y1: 0, y2: chart.viewBox.baseVal.height - 18 };
    for (const [name, value] of Object.entries(attributes)) line.setAttribute(name, value);
    chart.append(line);
    const slider = { role: 'slider', tabindex: 0, 'aria-label': 'Moment of the video', 'aria-valuemin': 0,
      'aria-valuemax': chart.dataset.duration };
    for (const [name, value] of Object.entries(slider)) chart.setAttribute(name, value);
  }
  for (const strip of result.querySelectorAll('.strip')) {
    [...strip.children].forEach((frame, i) => {
      frame.tabIndex = i ? -1 : 0;  // arrows go on from the first
      frame.setAttribute('role', 'button');
      frame.setAttribute('aria-label', 'Go to ' + frame.querySelector('figcaption').textContent);
    });
  }
  if (at('method')) for (const choice of result.querySelectorAll('.choice')) {
    const button = document.createElement('button');
    button.className = 'answer';
    button.type = 'button';
    button.textContent = 'Answer';
    button.setAttribute('aria-label', 'Answer from the frames of ' + choice.querySelector('.key').textContent);
    button.hidden = Boolean(said(choice).textContent.trim());
    choice.querySelector('h4').append(button);
  }
  at('link').href = addressOf(fields);
  at('share').hidden = false;
  sayWhere();
}

// A part that the user opened stays open: of an answer in rounds there is more and more.
function put(html) {
  const open = [...result.querySelectorAll('details')].map(part => part.open);
  result.innerHTML = html;
  [...result.querySelectorAll('details')].forEach((part, i) => { part.open = Boolean(open[i]); });
}

const said = choice => choice.querySelector('h4').children[1];

// One method's answer, by one click.
async function answer(choice, button) {
  const fields = { ...asked, method: choice.dataset.method, show: false }, of = asked;
  button.disabled = true;
  try {
    const job = await follow(fields, job => { button.textContent = job.state + ' ...'; });
    if (job.state === 'failed') { said(choice).innerHTML = job.html; throw new Error('failed'); }
    said(choice).textContent = '“' + job.answer + '”';
    button.hidden = true;
    if (asked === of) found.set(addressOf(asked), { ...found.get(addressOf(asked)), html: bare(result) });
  } catch (error) {
    button.textContent = 'Answer';
    say(error.message);
  }
  button.disabled = false;
}

// The result without what showResult adds to it.
function bare(element) {
  const copy = element.cloneNode(true);
  for (const added of copy.querySelectorAll('.now, .answer')) added.remove();
  return copy.innerHTML;
}

function momentOf(chart, event) {
  const box = chart.getBoundingClientRect(), { left, right, duration } = chart.dataset;
  const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
  return Math.min(1, Math.max(0, (x - left) / (right - left))) * duration;
}

result.addEventListener('click', event => {
  const chart = event.target.closest('svg[data-duration]'), frame = event.target.closest('figure[data-seconds]');
  const button = event.target.closest('button.answer');
  if (button) answer(button.closest('.choice'), button);
  else if (chart) goTo(momentOf(chart, event));
  else if (frame) goTo(+frame.dataset.seconds);
});
result.addEventListener('keydown', event => {
  const chart = event.target.closest('svg[data-duration]'), frame = event.target.closest('figure[data-seconds]');
  if (chart) {
    const end = +chart.dataset.duration, step = event.shiftKey ? 10 : 1;
    const to = { ArrowRight: moment + step, ArrowUp: moment + step, ArrowLeft: moment - step, ArrowDown: moment - step,
      PageUp: moment + end / 10, PageDown: moment - end / 10, Home: 0, End: end }[event.key];
    if (to === undefined) return;
    goTo(Math.min(end, to));
  } else if (frame) {
    const frames = [...frame.parentElement.children], place = frames.indexOf(frame);
    const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: frames.length - 1 }[event.key];
    if (event.key === 'Enter' || event.key === ' ') goTo(+frame.dataset.seconds);
    else if (to === undefined) return;
    else if (frames[to]) { frame.tabIndex = -1; frames[to].tabIndex = 0; frames[to].focus(); }
  } else return;
  event.preventDefault();
});

// ---- asking ---------------------------------------------------------------------------------------------

at('form').onsubmit = event => { event.preventDefault(); ask(); };

async function ask() {
  show(at('video').value);
  clearResult();
  const fields = { video: shown, question: at('question').value, num_frames: Number(at('num_frames').value) };
  if (at('method')) fields.method = at('method').value;
  const address = addressOf(fields);
  if (location.pathname + location.search !== address) history.pushState(null, '', address);
  at('ask').disabled = true;
  try {
    let soFar = '';
    const job = await follow(fields, job => {
      if (job.state !== 'done' && job.state !== 'failed') say(job.state + ' ...');
      at('progress').hidden = job.state !== 'decoding' && job.state !== 'encoding';
      at('progress').value = job.share;
      if (job.state === 'answering' && job.html !== soFar && shown === fields.video) put(soFar = job.html);
    });
    if (job.state === 'done') found.set(address, job);
    if (shown === fields.video) { showResult(fields, job); say(job.state); if (!film.hidden) sayWhere(); else goTo(moment); }
  } catch (error) { say(error.message); }
  at('ask').disabled = false;
  at('progress').hidden = true;
}

// ---- links ----------------------------------------------------------------------------------------------

// What the address names; else what is there, which the user may have chosen or typed before the script came.
function restore() {
  const parameters = new URLSearchParams(location.search), video = parameters.get('video');
  const names = [...at('video').options].map(option => option.value);
  if (video && !names.includes(video)) say('there is no video ' + video + ' here');
  else if (names.length) show(video || at('video').value);
  if (parameters.has('question')) at('question').value = parameters.get('question');
  if (parameters.get('num_frames')) at('num_frames').value = parameters.get('num_frames');
  if (parameters.get('method') && at('method')) at('method').value = parameters.get('method');
  return Boolean(video && names.includes(video) && at('question').value && at('form').checkValidity());
}

onpopstate = () => {
  clearResult();
  at('question').value = '';
  restore();
  const fields = Object.fromEntries(new URLSearchParams(location.search)), job = found.get(addressOf(fields));
  if (job) { showResult({ ...fields, num_frames: Number(fields.num_frames) }, job); say(job.state); }
};

for (const option of at('video').options) addCard(option.value);
search();
if (restore() && at('form').dataset.atOnce) ask();  // not where another site led here
