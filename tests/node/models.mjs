// node models.mjs cases.json: what exported models do in TF.js, all in one process.
//
// cases.json: {backend, cases: [{folder, xs, dys, training, fit: {epochs, rate} | null}]}, arrays as nested lists.
// Prints a list of {y, dx, weights, leaked, after} or {error}; after: the weights when fit is through, by their names.
import fs from 'node:fs';
import path from 'node:path';
import {createRequire} from 'node:module';

const {backend, modules, cases} = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const require = createRequire(path.join(modules, 'here.js'));
const tf = require('@tensorflow/tfjs');
tf.enableProdMode();
if (backend === 'wasm') require('@tensorflow/tfjs-backend-wasm');
await tf.setBackend(backend);

const tensors = (values) => values.map((v) => tf.tensor(v, undefined, 'float32'));

// What fit makes of the weights, for the loss sum(dy y), and how many tensors it leaves behind after its first epoch.
async function fitted(model, xs, dys, {epochs, rate}) {
  const loss = (dy, y) => tf.sum(tf.mul(dy, y));
  model.compile({optimizer: tf.train.sgd(rate), loss: dys.map(() => loss)});
  const counts = [];
  const one = (ts) => (ts.length > 1 ? ts : ts[0]);
  const callbacks = {onEpochEnd: () => void counts.push(tf.memory().numTensors)};
  await model.fit(one(xs), one(dys), {epochs, batchSize: xs[0].shape[0], shuffle: false, verbose: 0, callbacks});
  const byName = new Map(model.layers.flatMap((layer) => layer.weights).map((w) => [w.originalName, w.read()]));
  const own = ({transpose, shape}, w) => tf.reshape(transpose ? tf.transpose(w, transpose) : w, shape).arraySync();
  const after = Object.fromEntries(model.about.weights.map((w) => [w.name, own(w, byName.get(w.variable))]));
  return {after, leaked: counts.at(-1) - counts[0]};
}

async function run({folder, xs, dys, training, fit}) {
  const exported = await import(path.join(folder, 'predict.mjs'));
  const model = await exported.load();
  const [x, dy] = [xs.map((v, i) => tf.tensor(v, undefined, model.about.inputs[i].dtype)), tensors(dys)];
  const before = tf.memory().numTensors;
  const found = exported.gradients(model, x, dy, training);
  found.leaked = tf.memory().numTensors - before;
  return fit ? {...found, ...(await fitted(model, x, dy, fit))} : found;
}

const found = [];
for (const each of cases) {
  tf.engine().startScope();
  found.push(await run(each).catch((error) => ({error: error.stack})));
  tf.engine().endScope();
}
fs.writeFileSync(1, JSON.stringify(found));
