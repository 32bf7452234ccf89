const at = id => document.getElementById(id);
async function call(path, options) {
  const response = await fetch(path, options), content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}
function say(text) { at('state').textContent = text; }
if (at('file')) at('file').onchange = async () => {
  const file = at('file').files[0];
  if (!file) return;
  say('Adding ' + file.name + ' ...');
  try {
    const { video } = await call('/videos/' + encodeURIComponent(file.name), { method: 'PUT', body: file });
    at('video').add(new Option(video, video, true, true));
    say(video + ' was added.');
  } catch (error) { say(error.message); }
};
at('form').onsubmit = async event => {
  event.preventDefault();
  at('ask').disabled = true; at('result').innerHTML = '';
  try {
    const fields = { video: at('video').value, question: at('question').value,
      num_frames: Number(at('num_frames').value), method: at('method').value };
    const { question } = await call('/questions', { method: 'POST', body: JSON.stringify(fields) });
    for (let job; ; await new Promise(wake => setTimeout(wake, 300))) {
      job = await call('/questions/' + question);
      say(job.state);
      at('progress').hidden = job.state !== 'decoding' && job.state !== 'encoding';
      at('progress').value = job.share;
      if (job.state === 'done' || job.state === 'failed') { at('result').innerHTML = job.html; break; }
    }
  } catch (error) { say(error.message); }
  at('ask').disabled = false; at('progress').hidden = true;
};
