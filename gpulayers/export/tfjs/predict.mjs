// Predicts with the model in this folder, in Node.js.
//
//   npm install && node predict.mjs input.json
//
// input.json: a batch as nested lists; for a model of several inputs a list of these. Prints the outputs as JSON, for a
// model of several outputs a list of them. Options:
//   --dy dy.json      the gradient of a loss by the outputs, shaped as they are: prints {"y", "dx", "weights": {name: gradient}}
//   --training        as in training (dropout, statistics of the batch); the weights stay as they are
//   --backend wasm    after npm install @tensorflow/tfjs-backend-wasm@4.22.0
import fs from 'node:fs';
import {createRequire} from 'node:module';
import path from 'node:path';
import {fileURLToPath} from 'node:url';
import {parseArgs} from 'node:util';
import register from './custom_layers.js';

const file = fileURLToPath(import.meta.url);
const here = path.dirname(file);
const isCommand = process.argv[1] && fs.realpathSync(process.argv[1]) === file;
const tf = required('@tensorflow/tfjs', 'npm install');
tf.enableProdMode(); // no advertisement on stderr

// A package of this folder's: import would take half a second longer.
function required(name, advice) {
  try {
    return createRequire(import.meta.url)(name);
  } catch (error) {
    if (error.code !== 'MODULE_NOT_FOUND') throw error;
    const missing = `${name} is not installed for ${here}: ${advice}`;
    if (!isCommand) throw new Error(missing);
    console.error(`predict.mjs: ${missing}`);
    process.exit(1);
  }
}

// The layers model of this folder; model.about says its shapes and its weights' names in gpulayers.
export async function load() {
  register(tf);
  const described = JSON.parse(fs.readFileSync(path.join(here, 'model.json'), 'utf8'));
  const weightSpecs = described.weightsManifest.flatMap((group) => group.weights);
  const names = described.weightsManifest.flatMap((group) => group.paths);
  const weightData = new Uint8Array(Buffer.concat(names.map((name) => fs.readFileSync(path.join(here, name))))).buffer;
  const bytes = weightSpecs.reduce((sum, {shape}) => sum + 4 * shape.reduce((a, n) => a * n, 1), 0);
  if (weightData.byteLength !== bytes) {
    throw new Error(`${names[0]} …: the rule is ${bytes} bytes of weights; got ${weightData.byteLength}`);
  }
  const model = await tf.loadLayersModel(tf.io.fromMemory({modelTopology: described.modelTopology, weightSpecs, weightData}));
  model.about = described.userDefinedMetadata.gpulayers;
  return model;
}

// The outputs of one batch, a list of tensors.
export function predict(model, xs, training = false) {
  return tf.tidy(() => [].concat(model.apply(xs.length > 1 ? xs : xs[0], {training})));
}

// {y, dx, weights} as nested lists, for gradients dys of a loss by the outputs.
export function gradients(model, xs, dys, training = false) {
  return tf.tidy(() => {
    const variables = xs.map((x) => (x.dtype === 'float32' ? tf.variable(x) : x));  // integers have no gradient
    const byName = new Map(model.layers.flatMap((layer) => layer.weights).map((w) => [w.originalName, w.read()]));
    const trained = model.about.weights.filter((w) => w.trainable);
    const weights = trained.map((w) => byName.get(w.variable));
    let ys;
    const {grads} = tf.variableGrads(() => {
      ys = predict(model, variables, training).map((y) => tf.keep(y));
      return tf.addN(ys.map((y, i) => tf.sum(tf.mul(y, dys[i]))));
    }, [...variables, ...weights].filter((v) => v.dtype === 'float32'));
    const of = (v) => grads[v.name] ?? tf.zeros(v.shape);
    const own = ({transpose, shape}, g) => tf.reshape(transpose ? tf.transpose(g, transpose) : g, shape).arraySync();
    const found = {
      y: nested(ys),
      dx: nested(variables.map(of)),
      weights: Object.fromEntries(trained.map((w, i) => [w.name, own(w, of(weights[i]))])),
    };
    tf.dispose([ys, variables.filter((v, i) => v !== xs[i])]);
    return found;
  });
}

const nested = (tensors) => (tensors.length > 1 ? tensors.map((t) => t.arraySync()) : tensors[0].arraySync());

// Tensors of these shapes (the batch is null) and dtypes from a file with nested lists.
export function read(file, kinds, what) {
  let value;
  try {
    value = JSON.parse(fs.readFileSync(file, 'utf8'));
  } catch (error) {
    throw new Error(`${file}: ${error.message}`);
  }
  const parts = kinds.length > 1 ? value : [value];
  if (!Array.isArray(parts) || parts.length !== kinds.length) {
    throw new Error(`${file}: the rule is a list of ${kinds.length} ${what}`);
  }
  const tensors = parts.map((part, i) => tensor(file, part, kinds[i]));
  if (new Set(tensors.map((t) => t.shape[0])).size > 1) {
    throw new Error(`${file}: the rule is the same number of rows in all ${what}; got ${tensors.map((t) => t.shape[0])}`);
  }
  return tensors;
}

function tensor(file, value, {shape, dtype}) {
  const sizes = [];
  for (let v = value; Array.isArray(v); v = v[0]) sizes.push(v.length);
  const got = [];
  const walk = (v, depth) => {
    if (depth === sizes.length && typeof v === 'number') {
      if (dtype === 'int32' && !Number.isInteger(v)) throw new Error(`${file}: the rule is integers; got ${v}`);
      return void got.push(v);
    }
    if (!Array.isArray(v) || v.length !== sizes[depth]) {
      throw new Error(`${file}: the rule is nested lists of numbers, equally long; got ${JSON.stringify(v)?.slice(0, 60)}`);
    }
    v.forEach((inner) => walk(inner, depth + 1));
  };
  walk(value, 0);
  if (sizes.length !== shape.length || shape.some((n, i) => n !== null && n !== sizes[i])) {
    throw new Error(`${file}: the rule is the shape [${shape.map((n) => n ?? 'rows')}]; got [${sizes}]`);
  }
  return tf.tensor(got, sizes, dtype);
}

async function main() {
  const options = {dy: {type: 'string'}, training: {type: 'boolean'}, backend: {type: 'string', default: 'cpu'}};
  const {values, positionals} = parseArgs({options, allowPositionals: true});
  if (positionals.length !== 1) throw new Error('the rule is: node predict.mjs input.json [--dy dy.json]');
  if (values.backend === 'wasm') required('@tensorflow/tfjs-backend-wasm', 'npm install @tensorflow/tfjs-backend-wasm@4.22.0');
  if (!(await tf.setBackend(values.backend))) throw new Error(`--backend: there is no ${values.backend} here`);
  const model = await load();
  const xs = read(positionals[0], model.about.inputs, 'inputs');
  const dys = values.dy && read(values.dy, model.about.outputs, 'outputs');
  if (dys && dys[0].shape[0] !== xs[0].shape[0]) {
    throw new Error(`${values.dy}: the rule is a row for each of ${xs[0].shape[0]} inputs; got ${dys[0].shape[0]}`);
  }
  const found = dys ? gradients(model, xs, dys, values.training) : nested(predict(model, xs, values.training));
  let strange = 0;
  const text = JSON.stringify(found, (_, v) => (typeof v === 'number' && !Number.isFinite(v) ? (strange++, null) : v));
  if (strange) console.error(`predict.mjs: ${strange} numbers are NaN or infinite, which JSON has not: they are null`);
  fs.writeFileSync(1, text + '\n');
}

if (isCommand) {
  main().catch((error) => {
    console.error(`predict.mjs: ${error.message}`);
    process.exitCode = 1;
  });
}
