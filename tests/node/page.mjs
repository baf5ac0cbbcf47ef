// node page.mjs plan.json: opens index.html of exported models in headless Chromium, and does what a visitor would.
//
// plan.json: {modules, chromium, visits: [{folder, screenshot, strokes: [[[x, y], …], …], label, numbers}, …]}; x and y are
// in [0, 1] of the pad. A visit {folder, xs, dys, training} asks for gradients on WebGL, which Chromium has without a GPU, too.
// Prints a list of {answers, shares, learned, output, gradients, requests, complaints}; gradients is null without WebGL.
import fs from 'node:fs';
import http from 'node:http';
import os from 'node:os';
import path from 'node:path';
import {createRequire} from 'node:module';

const plan = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const {chromium} = createRequire(path.join(plan.modules, 'here.js'))('playwright-core');
const TYPES = {'.html': 'text/html', '.js': 'text/javascript', '.css': 'text/css', '.json': 'application/json'};

const server = http.createServer((request, response) => {
  const [, visit, ...rest] = decodeURIComponent(new URL(request.url, 'http://localhost').pathname).split('/');
  const file = path.join(plan.visits[visit]?.folder ?? '/nowhere', ...rest);
  fs.readFile(file, (error, data) => {
    response.writeHead(error ? 404 : 200, {'Content-Type': TYPES[path.extname(file)] ?? 'application/octet-stream'});
    response.end(error ? '' : data);
  });
});
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));

const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'page-'));
const args = ['--no-sandbox', '--use-gl=angle', '--use-angle=swiftshader', '--enable-unsafe-swiftshader',
  '--disable-gpu-compositing', '--disable-gpu-rasterization', '--disable-quic', '--no-first-run',
  '--disable-background-networking', '--disable-component-update', '--disable-sync'];
const browser = await chromium.launchPersistentContext(profile, {executablePath: plan.chromium, args, viewport: {width: 820, height: 860}});
const found = [];
try {
  for (const i of plan.visits.keys()) found.push(await visit(i));
} finally {
  await browser.close();
  server.close();
  fs.rmSync(profile, {recursive: true, force: true});
}
fs.writeFileSync(1, JSON.stringify(found));

async function visit(i) {
  const wanted = plan.visits[i], seen = {requests: [], complaints: []};
  const page = await browser.newPage();
  page.setDefaultTimeout(180000);  // of a machine that is busy
  page.on('request', (request) => seen.requests.push(request.url()));
  page.on('pageerror', (error) => seen.complaints.push(error.message));
  page.on('console', (message) => message.type() === 'error' && seen.complaints.push(message.text()));
  const [backend, visitor] = wanted.dys ? ['webgl', differentiate] : ['cpu', wanted.strokes ? draw : fill];
  await page.goto(`http://127.0.0.1:${server.address().port}/${i}/index.html?backend=${backend}`);
  await page.waitForSelector('main:not([hidden]), #status.wrong');
  const [wrong] = await page.locator('#status.wrong').allTextContents();
  const missing = backend === 'webgl' && wrong?.includes('no backend webgl');
  if (wrong && !missing) throw new Error(wrong);
  if (missing) Object.assign(seen, {gradients: null, complaints: []});
  else await visitor(page, wanted, seen);
  if (wanted.screenshot) await page.screenshot({path: wanted.screenshot});
  if (wanted.label !== undefined) await teach(page, wanted, seen);
  await page.close();
  return seen;
}

async function draw(page, {strokes}, seen) {
  const box = await page.locator('#pad').boundingBox();
  for (const [first, ...rest] of strokes) {
    const at = ([x, y]) => [box.x + x * box.width, box.y + y * box.height];
    await page.mouse.move(...at(first));
    await page.mouse.down();
    for (const point of rest) await page.mouse.move(...at(point), {steps: 4});
    await page.mouse.up();
  }
  await page.evaluate(() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve))));
  (seen.answers ??= []).push(await page.textContent('#answer'));
  seen.shares = (await page.locator('#bars .share').allTextContents()).map(parseFloat);
}

async function teach(page, wanted, seen) {
  await page.click(`#labels button:nth-child(${wanted.label + 1})`);
  await page.click('#train');
  await page.waitForFunction(() => document.getElementById('learned').textContent);
  seen.learned = await page.textContent('#learned');
  await draw(page, wanted, seen);
}

async function fill(page, {numbers}, seen) {
  const inputs = page.locator('#inputs input');
  for (const [i, value] of numbers.entries()) await inputs.nth(i).fill(`${value}`);
  await page.click('#predict');
  seen.output = (await page.locator('#outputs .share').allTextContents()).map(Number);
}

async function differentiate(page, wanted, seen) {
  seen.gradients = await page.evaluate(async ({xs, dys, training}) => {
    if (tf.getBackend() !== 'webgl') throw new Error(`the backend is ${tf.getBackend()}`);
    const url = new URL('model.json', document.baseURI).href;
    const {weights} = (await (await fetch(url)).json()).userDefinedMetadata.gpulayers;
    const model = await tf.loadLayersModel(url);
    const [x, dy] = [tf.variable(tf.tensor(xs[0])), tf.tensor(dys[0])];
    const byName = new Map(model.layers.flatMap((layer) => layer.weights).map((w) => [w.originalName, w.read()]));
    const trained = weights.filter((w) => w.trainable).map((w) => ({...w, variable: byName.get(w.variable)}));
    let y;
    const {grads} = tf.variableGrads(() => {
      y = tf.keep(model.apply(x, {training}));
      return tf.sum(tf.mul(y, dy));
    }, [x, ...trained.map((w) => w.variable)]);
    const own = ({transpose, shape}, g) => tf.reshape(transpose ? tf.transpose(g, transpose) : g, shape).arraySync();
    const found = trained.map((w) => [w.name, own(w, grads[w.variable.name])]);
    return {y: y.arraySync(), dx: grads[x.name].arraySync(), weights: Object.fromEntries(found)};
  }, wanted);
}
