/* node run_onnx.mjs "A prompt" "once [MASK:3] a time": texts, by ONNX Runtime in JavaScript.

Needs Node 18 and one of the packages onnxruntime-node (npm install onnxruntime-node) and
onnxruntime-web. `node run_onnx.mjs --help` lists the options. In a browser: fetch the files, make
the sessions with onnxruntime-web, and call `generate` of decode_loop.mjs as `main` does.
*/

import { realpathSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

import { generate, Network } from "./decode_loop.mjs";
import { checked } from "./schedule_esolm.mjs";
import { Codec, MASK, parsePrompt, show } from "./text_codec.mjs";

const FOLDER = path.dirname(fileURLToPath(import.meta.url));
const WEIGHTS = "weights.safetensors";
const HELP = `node run_onnx.mjs [OPTIONS] [PROMPT]...

A prompt is continued; one with [MASK] or [MASK:n] is filled in. Without prompts, texts from
nothing. By default, config.json decides.

  --num_texts=N      texts of each prompt (1)
  --seed=N           seed of the draws (0)
  --length=N         tokens of a text, prompt included
  --alpha_0=X        share of the tokens that the diffusion phase generates
  --schedule=NAME    ancestral, strided, shuffled_strided, left_to_right or blockwise
  --steps=N          steps of the diffusion phase; 0 = one token per step
  --temperature=X    0 = the most probable token
  --top_k=N          number of most probable tokens to draw from; 0 = all
  --top_p=X          probability mass of nucleus sampling; 1 = off
  --ids              print JSON lists of token ids`;

const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;
const isCount = (least) => (x) => Number.isInteger(x) && x >= least;
const RULES = {
  num_texts: [isCount(1), "an integer of at least 1"],
  seed: [(x) => isCount(0)(x) && x < 2 ** 32, "an integer in [0, 2**32)"],
  length: [isCount(1), "an integer of at least 1"],
  alpha_0: [(x) => 0 <= x && x <= 1, "in [0, 1]"],
  steps: [isCount(0), "an integer of at least 0"],
  temperature: [(x) => 0 <= x && x < Infinity, "at least 0"],
  top_k: [isCount(0), "an integer of at least 0"],
  top_p: [(x) => 0 < x && x <= 1, "in (0, 1]"],
};
const SETTINGS = ["alpha_0", "schedule", "steps", "temperature", "top_k", "top_p"];

/** {prompts, and the options that are given}. Throws an Error of one line. */
export function parseOptions(args) {
  const text = Object.fromEntries([...Object.keys(RULES), "schedule"].map((n) => [n, "string"]));
  const types = { ...text, ids: "boolean", help: "boolean" };
  const options = Object.fromEntries(Object.entries(types).map(([n, type]) => [n, { type }]));
  const { values, positionals } = parseArgs({ args, options, allowPositionals: true });
  for (const [name, [isRight, allowed]] of Object.entries(RULES)) {
    if (values[name] === undefined) continue;
    const number = NUMBER.test(values[name]) ? Number(values[name]) : NaN;
    if (!isRight(number)) throw new Error(`--${name}=${values[name]}: must be ${allowed}`);
    values[name] = number;
  }
  return { num_texts: 1, seed: 0, ids: false, ...values, prompts: positionals };
}

/** ONNX Runtime and its name, from the packages of this folder or of the current one. */
function onnxRuntime() {
  for (const name of ["onnxruntime-node", "onnxruntime-web"]) {
    for (const base of [import.meta.url, pathToFileURL(`${process.cwd()}/`)]) {
      const require = createRequire(base);
      try {
        return [require(name), name];
      } catch (error) {
        if (error.code !== "MODULE_NOT_FOUND") throw error;
      }
    }
  }
  throw new Error("needs a package that is not installed: npm install onnxruntime-node");
}

async function makeNetwork(sampling) {
  const [ort, name] = onnxRuntime();
  const graph = path.join(FOLDER, sampling.has_step ? "step.onnx" : "score.onnx");
  let session;
  if (name === "onnxruntime-node") {
    session = await ort.InferenceSession.create(graph);
  } else {
    const data = await readFile(path.join(FOLDER, WEIGHTS));
    const externalData = [{ path: WEIGHTS, data }];
    session = await ort.InferenceSession.create(await readFile(graph), { externalData });
  }
  return new Network(session, ort.Tensor, sampling);
}

async function main(args) {
  const given = parseOptions(args);
  if (given.help) return console.log(HELP);
  const read = async (name) => JSON.parse(await readFile(path.join(FOLDER, name), "utf8"));
  const { sampling } = await read("config.json");
  const codec = new Codec(await read("vocabulary.json"));
  const settings = Object.fromEntries(SETTINGS.map((name) => [name, given[name]]));
  const { length } = checked(sampling, settings, given.length);
  if (sampling.note) console.error(`note: ${sampling.note}`);
  const prompts = given.prompts.map((text) => parsePrompt(codec, text, length));
  if (!prompts.length) prompts.push(new Array(length).fill(MASK));
  const network = await makeNetwork(sampling);
  const [texts, firstIsKnown] = [[], []];
  for (const prompt of prompts) {
    const rows = Array.from({ length: given.num_texts }, () => prompt);
    const row = { rows, seed: given.seed, firstRow: texts.length };
    texts.push(...(await generate({ sampling, settings, network, ...row })));
    firstIsKnown.push(...rows.map((ids) => ids[0] !== MASK));
  }
  console.log(show(codec, texts, firstIsKnown, { asIds: given.ids }));
}

const script = process.argv[1]; // false if this file is imported
if (script && import.meta.url === pathToFileURL(realpathSync(script)).href) {
  main(process.argv.slice(2)).catch((error) => {
    console.error(`error: ${error.message}`);
    process.exit(2);
  });
}
