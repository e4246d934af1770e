/* Answers the questions of tests/interop/test_shipped_javascript.py: JSON on stdin and stdout.

node shipped.mjs FOLDER    # of the shipped files
*/

import { readFileSync } from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const load = (name) => import(pathToFileURL(path.join(process.argv[2], name)).href);
const { Codec, parsePrompt } = await load("text_codec.mjs");
const { foldIn, Generator, gumbel } = await load("draws.mjs");
const { checked, checkPasses, planPasses, UNREAD } = await load("schedule_esolm.mjs");
const { filtered, generate, Network } = await load("decode_loop.mjs");
const { parseOptions } = await load("run_onnx.mjs");

/** The result, or the message of an Error; of NotKept its `at`. */
function tried(make) {
  try {
    return make();
  } catch (error) {
    return error.at ?? { error: error.message };
  }
}

function ofCodec({ vocabulary, texts, ids, prompts }) {
  const codec = new Codec(vocabulary);
  return {
    encoded: texts.map(([text, begins]) => tried(() => codec.encode(text, { begins }))),
    decoded: ids.map(([run, bosIsGiven]) => tried(() => codec.decode(run, { bosIsGiven }))),
    rows: prompts.map(([text, length]) => tried(() => parsePrompt(codec, text, length))),
  };
}

function ofSchedule({ s, known, seed }) {
  const plan = planPasses(s, known, seed);
  return { ...plan, refused: tried(() => checkPasses(s, plan)) ?? null };
}

const VOCAB = 7;

const logit = (sum, v) => ((sum * (v + 3) + v * v) % 31) / 4;

/** In place of a session, a network of two layers: the sum of token · (position + 1) over what a
 *  token reads, and the sum of these sums. The cache holds what both layers read. */
class Session {
  async run({ token, position, rank, in_context, keys, values, filled }) {
    const [batch, width] = token.dims;
    const made = { data: new Float32Array(batch * width * VOCAB), dims: [batch, width, VOCAB] };
    const slots = keys?.dims[2];
    const caches = [keys, values].map((cache) => cache && { ...cache, data: cache.data.slice() });
    for (let b = 0; b < batch; b++) {
      const past = keys ? filled.data[b] : 0;
      if (keys && past + width > slots) throw new Error("the cache is too small");
      const labels = Array.from({ length: width }, (_, t) => b * width + t);
      let layer = labels.map((i) => token.data[i] * (position.data[i] + 1));
      for (const cache of caches) {
        cache?.data.set(layer, b * slots + past);
        layer = labels.map((i) => {
          const isSeen = (j) => rank.data[j] <= rank.data[i] && in_context.data[j];
          const seen = layer.filter((_, t) => isSeen(labels[t]));
          const old = cache ? cache.data.subarray(b * slots, b * slots + past) : [];
          return [...seen, ...old].reduce((x, y) => x + y, 0) % 1009;
        });
      }
      labels.forEach((i, t) => {
        for (let v = 0; v < VOCAB; v++) made.data[i * VOCAB + v] = logit(layer[t], v);
      });
    }
    return { logits: made, keys_out: caches[0], values_out: caches[1] };
  }
}

class Tensor {
  constructor(type, data, dims) {
    Object.assign(this, { type, data, dims });
  }
}

async function ofLoop({ sampling, settings, rows, seed, firstRow }) {
  const network = new Network(new Session(), Tensor, sampling);
  return generate({ sampling, settings, network, rows, seed, firstRow });
}

function ofRandom({ seed, rows, length, alpha_0, trials, p }) {
  const s = { schedule: "ancestral", steps: 0, alpha_0, cached: true, rank_block: 1 };
  const known = Array.from({ length: rows }, () => new Array(length).fill(false));
  const generator = new Generator([seed, 1]);
  return {
    orders: planPasses(s, known, seed).order,
    binomial: Array.from({ length: rows }, () => generator.binomial(trials, p)),
  };
}

const asked = JSON.parse(readFileSync(0, "utf8"));
const answers = {
  codecs: asked.codecs.map(ofCodec),
  schedules: asked.schedules.map(ofSchedule),
  keys: asked.keys.map(([key, number]) => foldIn(key, number)),
  gumbel: asked.gumbel.map(([key, size]) => Array.from(gumbel(key, size))),
  filtered: asked.filtered.map(([s, row]) =>
    Array.from(filtered(s, Float32Array.from(row)), (x) => (x === -Infinity ? null : x)),
  ),
  loops: await Promise.all(asked.loops.map(ofLoop)),
  random: ofRandom(asked.random),
  checked: asked.checked.map(([defaults, settings, length]) =>
    tried(() => checked(defaults, settings, length)),
  ),
  options: asked.options.map((args) => tried(() => parseOptions(args))),
  unread: UNREAD,
};
process.stdout.write(JSON.stringify(answers));
