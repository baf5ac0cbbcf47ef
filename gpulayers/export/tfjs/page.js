// The page of an exported model: drawing for images of one channel and a few classes, else a form of the input's shape.
/* global tf */
import register from './custom_layers.js';

const $ = (id) => document.getElementById(id);
const make = (tag, options = {}, ...inside) => {
  const element = Object.assign(document.createElement(tag), options);
  element.append(...inside);
  return element;
};

async function load() {
  if (!window.tf) throw new Error('TensorFlow.js is not here: run npm install in this folder.');
  const backend = new URLSearchParams(location.search).get('backend');  // index.html?backend=cpu
  if (backend && !(await tf.setBackend(backend))) throw new Error(`There is no backend ${backend} here.`);
  await tf.ready();
  register(tf);
  const url = new URL('model.json', document.baseURI).href;  // whole: TensorFlow.js looks for weights at the root else
  const model = await tf.loadLayersModel(url);
  return [model, (await (await fetch(url)).json()).userDefinedMetadata.gpulayers];
}

const isDrawing = ({inputs, outputs}) => inputs.length === 1 && outputs.length === 1 && inputs[0].shape.length === 4 &&
  inputs[0].shape[1] === 1 && inputs[0].shape.slice(2).every((n) => n >= 4 && n <= 64) &&
  outputs[0].shape.length === 2 && outputs[0].shape[1] >= 2 && outputs[0].shape[1] <= 36;

// Rows of a list: a number, a bar, its value.
function barsIn(list, count) {
  return Array.from({length: count}, (_, k) => {
    const bar = make('div', {className: 'bar'}), share = make('span', {className: 'share'});
    list.append(make('li', {}, make('span', {textContent: k}), make('div', {className: 'track'}, bar), share));
    return {bar, share};
  });
}

// --- drawing ---------------------------------------------------------------------------------------------------------

// The ink of the pad as an image of height × width numbers in [0, 1]: what is drawn fills it, as in the data sets of
// digits (those of 28 × 28 keep a margin of 4), each number the share of a cell that is covered.
function seenBy(pad, height, width) {
  const {data} = pad.getContext('2d').getImageData(0, 0, pad.width, pad.height);
  const ink = (x, y) => (x < 0 || y < 0 || x >= pad.width || y >= pad.height ? 0 : data[4 * (y * pad.width + x) + 3] / 255);
  let [left, top, right, bottom] = [pad.width, pad.height, -1, -1];
  for (let y = 0; y < pad.height; y++) {
    for (let x = 0; x < pad.width; x++) {
      if (ink(x, y) > 0.1) [left, top, right, bottom] = [Math.min(left, x), Math.min(top, y), Math.max(right, x), Math.max(bottom, y)];
    }
  }
  const image = new Float32Array(height * width);
  if (right < 0) return image;
  const margin = Math.min(height, width) >= 20 ? Math.round(Math.min(height, width) / 7) : 0;
  const cell = Math.max((right - left + 1) / (width - 2 * margin), (bottom - top + 1) / (height - 2 * margin));
  const x0 = (left + right + 1 - width * cell) / 2, y0 = (top + bottom + 1 - height * cell) / 2;
  for (let i = 0; i < height; i++) {
    for (let j = 0; j < width; j++) {
      let sum = 0, count = 0;
      for (let y = Math.round(y0 + i * cell); y < Math.round(y0 + (i + 1) * cell); y++) {
        for (let x = Math.round(x0 + j * cell); x < Math.round(x0 + (j + 1) * cell); x++, count++) sum += ink(x, y);
      }
      image[i * width + j] = count ? sum / count : 0;
    }
  }
  return image;
}

function show(canvas, image, height, width) {
  Object.assign(canvas, {width, height});
  const pixels = canvas.getContext('2d').createImageData(width, height);
  image.forEach((v, i) => pixels.data.set([255, 255, 255, 255 * v], 4 * i));
  canvas.getContext('2d').putImageData(pixels, 0, 0);
  return canvas;
}

// Draws with mouse, pen or finger; calls changed after each stroke's piece.
function drawsOn(pad, changed) {
  const context = pad.getContext('2d', {willReadFrequently: true});
  Object.assign(context, {lineWidth: 30, lineCap: 'round', lineJoin: 'round', strokeStyle: '#fff'});
  let last = null;
  const at = (event) => {
    const box = pad.getBoundingClientRect();
    return [(event.clientX - box.left) * pad.width / box.width, (event.clientY - box.top) * pad.height / box.height];
  };
  const line = (event) => {
    const next = at(event);
    context.beginPath();
    context.moveTo(...last);
    context.lineTo(...next);
    context.stroke();
    last = next;
    changed();
  };
  pad.addEventListener('pointerdown', (event) => {
    pad.setPointerCapture(event.pointerId);
    last = at(event);
    line(event);
  });
  pad.addEventListener('pointermove', (event) => last && line(event));
  for (const end of ['pointerup', 'pointercancel']) pad.addEventListener(end, () => (last = null));
  $('clear').onclick = () => {
    context.clearRect(0, 0, pad.width, pad.height);
    changed();
  };
}

// Whether the model's outputs are probabilities by themselves: else the page takes their softmax.
function givesProbabilities(model, shape) {
  return tf.tidy(() => {
    const y = model.predict(tf.randomUniform([4, ...shape]));
    const sums = tf.sum(y, 1).dataSync();
    return y.min().dataSync()[0] >= 0 && sums.every((s) => Math.abs(s - 1) < 1e-3);
  });
}

function drawing(model, about) {
  const [, channels, height, width] = about.inputs[0].shape, classes = about.outputs[0].shape[1];
  const shape = [channels, height, width];
  const ready = givesProbabilities(model, shape);
  const logits = (y) => (ready ? tf.log(tf.maximum(y, 1e-9)) : y);
  $('what').textContent = classes === 10 ? 'a digit' : `one of ${classes}`;
  const bars = barsIn($('bars'), classes);

  let image, waits = false;
  function predict() {
    waits = false;
    image = seenBy($('pad'), height, width);
    show($('seen'), image, height, width);
    const empty = !image.some((v) => v > 0);
    const shares = tf.tidy(() => tf.softmax(logits(model.predict(tf.tensor(image, [1, ...shape])))).dataSync());
    const best = empty ? -1 : shares.indexOf(Math.max(...shares));
    bars.forEach(({bar, share}, k) => {
      bar.style.width = empty ? 0 : `${100 * shares[k]}%`;
      share.textContent = empty ? '' : `${(100 * shares[k]).toFixed(1)}\u202f%`;
      bar.closest('li').className = k === best ? 'best' : '';
    });
    $('answer').textContent = empty ? '–' : best;
    for (const button of $('labels').children) button.disabled = empty;
  }
  const soon = () => {
    if (!waits) requestAnimationFrame(predict);
    waits = true;
  };
  drawsOn($('pad'), soon);
  teaching(model, {shape, classes, logits, drawn: () => image, predict});
  predict();
  $('draw').hidden = false;
}

// --- teaching --------------------------------------------------------------------------------------------------------

// [what comes before the last layer that has weights to train, that layer and what follows], two models over the same
// weights; null where they are not one row of layers.
function split(model) {
  let end = model.outputs[0];
  const row = [];
  for (;;) {
    row.unshift(end.sourceLayer);
    if (end.inputs.length !== 1) return null;
    if (end.sourceLayer.trainableWeights.length) break;
    [end] = end.inputs;
  }
  const [features] = end.inputs;
  const input = tf.input({shape: features.shape.slice(1)});
  const head = tf.model({inputs: input, outputs: row.reduce((x, layer) => layer.apply(x), input)});
  return [tf.model({inputs: model.inputs, outputs: features}), head];
}

function teaching(model, {shape, classes, logits, drawn, predict}) {
  const parts = split(model);
  if (!parts) return void $('train').closest('section').remove();
  const [body, head] = parts;
  const first = head.getWeights().map((w) => w.clone());
  const taught = [];
  for (let k = 0; k < classes; k++) {
    const teach = () => {
      taught.push([drawn(), k]);
      const picture = show(make('canvas', {className: 'pixels'}), drawn(), shape[1], shape[2]);
      $('taught').append(make('li', {}, picture, `${k}`));
      $('train').disabled = false;
      $('learned').textContent = '';
      $('clear').click();
    };
    $('labels').append(make('button', {type: 'button', textContent: k, onclick: teach}));
  }

  // Features do not change while the head learns, so they are computed once, and as in prediction.
  $('train').onclick = async () => {
    for (const id of ['train', 'forget', 'clear']) $(id).disabled = true;
    Object.assign($('progress'), {value: 0, hidden: false});
    const x = tf.tidy(() => body.predict(tf.stack(taught.map(([image]) => tf.tensor(image, shape)))));
    const y = tf.tidy(() => tf.cast(tf.oneHot(taught.map(([, k]) => k), classes), 'float32'));
    const right = () => tf.tidy(() => tf.sum(tf.cast(tf.equal(tf.argMax(head.predict(x), 1), tf.argMax(y, 1)), 'int32')).dataSync()[0]);
    const before = right(), epochs = 30;
    const optimizer = tf.train.adam(0.003);
    head.compile({optimizer, loss: (want, got) => tf.losses.softmaxCrossEntropy(want, logits(got))});
    const onEpochEnd = async (epoch, {loss}) => {
      $('progress').value = (epoch + 1) / epochs;
      head.stopTraining = loss < 0.05;  // enough: what it knew before is to stay
      await tf.nextFrame();
    };
    await head.fit(x, y, {epochs, batchSize: 16, verbose: 0, callbacks: {onEpochEnd}});
    $('learned').textContent = `right: ${right()} of ${taught.length}, before: ${before}`;
    tf.dispose([x, y]);
    optimizer.dispose();
    $('progress').hidden = true;
    for (const id of ['train', 'forget', 'clear']) $(id).disabled = false;
    predict();
  };
  $('forget').onclick = () => {
    head.setWeights(first);
    taught.length = 0;
    $('taught').replaceChildren();
    $('train').disabled = $('forget').disabled = true;
    $('learned').textContent = 'The model is as it was exported.';
    predict();
  };
}

// --- a form ----------------------------------------------------------------------------------------------------------

const MANY = 64;

function form(model, about) {
  const fields = about.inputs.map(({shape: [, ...shape], dtype}, i) => {
    const size = shape.reduce((a, b) => a * b, 1);
    const legend = make('legend', {textContent: `${about.inputs.length > 1 ? `input ${i + 1}: ` : ''}${shape.length > 1 ? shape.join(' × ') : size === 1 ? 'a number' : `${size} numbers`}`});
    const field = size <= MANY ? numbers(size, shape) : text(shape);
    $('inputs').append(make('fieldset', {}, legend, field.element));
    return {...field, shape, size, dtype};
  });
  const write = (value) => fields.forEach((f) => {
    f.write(Array.from({length: f.size}, () => (f.dtype === 'int32' ? Math.abs(Math.trunc(value())) : value())));
  });
  const said = $('status').textContent;
  const predict = () => {
    Object.assign($('status'), {textContent: said, className: ''});
    try {
      const ys = tf.tidy(() => {
        const xs = fields.map((f) => tf.tensor(f.read(), [1, ...f.shape], f.dtype));
        return [].concat(model.predict(xs.length > 1 ? xs : xs[0])).map((y) => y.squeeze([0]).arraySync());
      });
      $('outputs').replaceChildren(...ys.map((y) => (Array.isArray(y) && y.length <= MANY && !y.some(Array.isArray) ? row(y) : written(y))));
    } catch (error) {
      wrong(error);
    }
  };
  $('inputs').onsubmit = (event) => {
    event.preventDefault();
    predict();
  };
  $('random').onclick = () => {
    write(() => Number((2 * Math.random() - 1).toFixed(3)));
    predict();
  };
  write(() => 0);
  predict();
  $('form').hidden = false;
}

// One output's numbers: a row as bars, the largest one full.
function row(values) {
  const list = make('ol', {className: 'bars'});
  const largest = Math.max(...values.map(Math.abs), 1e-12);
  barsIn(list, values.length).forEach(({bar, share}, k) => {
    bar.style.width = `${100 * Math.abs(values[k]) / largest}%`;
    share.textContent = Number(values[k].toPrecision(5));
  });
  return list;
}

function written(value) {
  const rounded = (v) => (Array.isArray(v) ? v.map(rounded) : Number(v.toPrecision(6)));
  return make('pre', {textContent: spaced(rounded(value))});
}

const spaced = (value) => JSON.stringify(value).replaceAll(',', ', ').replaceAll('], [', '],\n[');

function numbers(size, shape) {
  const inputs = Array.from({length: size}, () => make('input', {type: 'number', step: 'any', required: true}));
  const element = make('div', {className: 'numbers'}, ...inputs);
  const columns = shape.length > 1 && shape.at(-1) <= 8 ? shape.at(-1) : Math.min(size, 4);
  element.style.gridTemplateColumns = `repeat(${columns || 1}, 1fr)`;
  return {
    element,
    read: () => inputs.map((input) => input.valueAsNumber),
    write: (values) => values.forEach((v, i) => (inputs[i].value = v)),
  };
}

function text(shape) {
  const element = make('textarea', {spellcheck: false});
  const nested = (values, [n, ...rest]) => {
    const step = values.length / n;
    return rest.length ? Array.from({length: n}, (_, i) => nested(values.slice(i * step, (i + 1) * step), rest)) : values;
  };
  return {
    element,
    read: () => JSON.parse(element.value).flat(Infinity),
    write: (values) => (element.value = spaced(nested(values, shape))),
  };
}

function wrong(error) {
  $('status').className = 'wrong';
  $('status').textContent = error.message;
}

try {
  const [model, about] = await load();
  document.title = $('title').textContent = about.name;
  $('engine').textContent = `${tf.version.tfjs}, ${tf.getBackend()}`;
  $('status').textContent = `${model.countParams().toLocaleString('en')} parameters`;
  (isDrawing(about) ? drawing : form)(model, about);
} catch (error) {
  wrong(error);
}
