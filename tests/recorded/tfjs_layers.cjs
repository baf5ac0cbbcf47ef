// node tfjs_layers.cjs DIR BACKEND: the classes in DIR/layers.js, held against DIR/cases.json in the real TensorFlow.js (cpu, wasm).
// Forward, gradients of inputs and weights, one step of SGD by model.fit, and tensors left behind over epochs.
const fs = require('fs');
const path = require('path');
const tf = require('@tensorflow/tfjs');

const folder = path.resolve(process.argv[2]);
const tensor = (a) => tf.tensor(a.data.map(Number), a.shape, a.dtype);

/** The largest error, relative to the largest number, or to 1. */
const error = (t, a) => {
  if (JSON.stringify(t.shape) !== JSON.stringify(a.shape)) throw new Error(`shape ${t.shape} for ${a.shape}`);
  const got = t.dataSync();
  const want = a.data.map(Number);
  const scale = want.filter(Number.isFinite).reduce((m, v) => Math.max(m, Math.abs(v)), 1);
  const off = (v, g) => (Object.is(v, g) || v === g ? 0 : Math.abs(v - g) / scale);
  return want.reduce((m, v, i) => (off(v, got[i]) <= m ? m : off(v, got[i])), 0);
};

/** The model of one layer, through model.json and back. */
const built = async (Layer, c) => {
  const symbols = c.x.map((x) => tf.input({shape: x.shape.slice(1), dtype: x.dtype}));
  const layer = new Layer();
  const model = tf.model({inputs: symbols, outputs: layer.apply(symbols.length > 1 ? symbols : symbols[0])});
  layer.own.forEach((w, i) => w.write(tensor(c.w[i])));
  let kept;
  await model.save(tf.io.withSaveHandler(async (artifacts) => ((kept = artifacts), {modelArtifactsInfo: {}})));
  return tf.loadLayersModel(tf.io.fromMemory(kept));
};

const held = async (Layer, c) => {
  const model = await built(Layer, c);
  const layer = model.layers[model.layers.length - 1];
  const [xs, dys, own] = [c.x.map(tensor), c.dy.map(tensor), layer.own.map((w) => w.read())];
  const many = (ts) => (ts.length > 1 ? ts : ts[0]);
  const apply = (ts) => [].concat(layer.apply(many(ts), {training: c.training}));
  const reset = () => own.forEach((v, i) => v.assign(tensor(c.w[i])));
  const errors = {};
  const before = tf.memory().numTensors;
  const ys = apply(xs);
  errors.leaked = tf.memory().numTensors - before - ys.length;
  ys.forEach((t, i) => (errors[`y${i}`] = error(t, c.y[i])));
  own.forEach((v, i) => (errors[`after ${c.names[i]}`] = error(v, c.after[i])));
  reset();
  const loss = (...ts) => {
    const before = ts.map((t) => tf.sum(tf.mul(tf.cast(t, 'float32'), 0)));  // a second use: gradients are summed, and let go
    return tf.addN([...before, ...apply(ts).map((t, i) => tf.sum(tf.mul(dys[i], tf.cast(t, 'float32'))))]);
  };
  if (c.dx[0]) tf.grads(loss)(xs).forEach((g, i) => (errors[`dx${i}`] = error(g, c.dx[i])));
  reset();
  const trained = own.filter((v, i) => c.dw[i]);
  if (trained.length) {
    const {grads} = tf.variableGrads(() => loss(...xs), trained);
    c.dw.forEach((g, i) => { if (g) errors[`d${c.names[i]}`] = error(grads[own[i].name], g); });
    reset();
    if (c.training) await step(model, xs, dys, own, c, errors);
  }
  return errors;
};

/** model.fit is a step of SGD on Σ dy · y; more epochs leave no tensor behind. */
const step = async (model, xs, dys, own, c, errors) => {
  const many = (ts) => (ts.length > 1 ? ts : ts[0]);
  const options = {batchSize: dys[0].shape[0], epochs: 1, shuffle: false, verbose: 0};
  model.compile({optimizer: tf.train.sgd(0.5), loss: (want, got) => tf.sum(tf.mul(want, tf.cast(got, 'float32')))});
  await model.fit(many(xs), many(dys), options);
  own.forEach((v, i) => {
    const moved = c.after[i].data.map((w, k) => w - (c.dw[i] ? 0.5 * Number(c.dw[i].data[k]) : 0));
    errors[`sgd ${c.names[i]}`] = error(v, {...c.after[i], data: moved});
  });
  const before = tf.memory().numTensors;
  await model.fit(many(xs), many(dys), {...options, epochs: 3});
  errors['leaked over epochs'] = tf.memory().numTensors - before;
};

/** Chance: what backward multiplies by is what forward did, and a second call draws again. */
const drawn = (Layer, c) => {
  const layer = new Layer();
  const x = tensor(c.x[0]);
  const apply = (t) => layer.apply(t, {training: true});
  const first = apply(x).dataSync();
  const y = tf.valueAndGrad(apply)(x, tf.onesLike(x));
  const [got, slope] = [y.value.dataSync(), y.grad.dataSync()];
  const errors = {linear: got.reduce((m, v, i) => Math.max(m, Math.abs(v - slope[i] * c.x[0].data[i])), 0)};
  errors['the same again'] = first.every((v, i) => v === got[i]) ? 1 : 0;
  errors.mean = Math.max(0, Math.abs(got.reduce((a, v) => a + v, 0) / got.length - c.mean) - 0.05);
  return errors;
};

(async () => {
  if (process.argv[3] === 'wasm') require('@tensorflow/tfjs-backend-wasm');
  await tf.setBackend(process.argv[3]);
  await tf.ready();
  const layers = require(path.join(folder, 'layers.js'))(tf);
  const found = [];
  for (const c of JSON.parse(fs.readFileSync(path.join(folder, 'cases.json')))) {
    try {
      found.push({name: c.name, errors: await (c.mean === undefined ? held : drawn)(layers[c.name], c)});
    } catch (e) {
      found.push({name: c.name, raised: e.stack.split('\n').slice(0, 6).join(' | ')});
    }
  }
  console.log(JSON.stringify(found));
})();
