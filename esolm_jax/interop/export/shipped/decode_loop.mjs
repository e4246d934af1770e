/* Two-phase generation with the ONNX graphs of the folder, on any session of ONNX Runtime: in Node
and in browsers. The same as decode_loop.py.
*/

import { foldIn, gumbel } from "./draws.mjs";
import { checked, checkPasses, planPasses, UNREAD } from "./schedule_esolm.mjs";

const SMALL_TEMPERATURE = 1e-2;
const [MIN_TEMPERATURE, MAX_TEMPERATURE] = [1e-30, 1e30];

/** Token ids [B][L] from rows of one length [B][L], −1 where a token is to be generated.
 *
 *  sampling: config.sampling of config.json. settings: alpha_0, schedule, steps, block_length,
 *  temperature, top_k and top_p that replace its values. network: a Network. seed, firstRow: row b
 *  is drawn from (seed, firstRow + b). Throws an Error of one line. */
export async function generate({ sampling, settings = {}, network, rows, seed = 0, firstRow = 0 }) {
  const s = checked(sampling, settings, rows[0].length);
  const known = rows.map((row) => row.map((token) => token >= 0));
  const { order, passes } = planPasses(s, known, seed, firstRow);
  checkPasses(s, { order, passes });
  const keys = rows.map((_, b) => foldIn([0, seed], firstRow + b));
  const choose = (logits, b, position) => chooseToken(s, logits, foldIn(keys[b], position));
  const byRank = rows.map((row, b) =>
    order[b].map((position) => (row[position] >= 0 ? row[position] : s.mask_id)),
  );
  const found = await runPasses(s, { order, passes }, byRank, choose, network);
  return found.map((tokens, b) => {
    const text = new Array(tokens.length);
    order[b].forEach((position, rank) => (text[position] = tokens[rank]));
    return text;
  });
}

/** Tokens by rank [B][L], from the known ones (masks elsewhere).
 *  choose: (logits Float32Array [V], row, position) → id. */
export async function runPasses(s, { order, passes }, tokens, choose, network) {
  const [batch, length, shift] = [tokens.length, tokens[0].length, s.shift];
  const widths = passes.map(({ start, end }) => Math.max(1, ...end.map((e, b) => e - start[b])));
  // By slot: known tokens, and the positions that they label.
  const known = tokens.map((row) => [...(shift ? [s.start_token] : []), ...row]);
  network.reset(batch, length + Math.max(1, ...widths));
  for (const [n, { start, first, size, end, below }] of passes.entries()) {
    const labels = Labels.empty(batch, widths[n], s.mask_id);
    for (let b = 0; b < batch; b++) {
      for (let slot = start[b]; slot < end[b]; slot++) {
        const token = slot < first[b] + shift ? known[b][slot] : s.mask_id;
        const rank = slot < below[b] ? 0 : Math.floor(slot / s.rank_block);
        labels.set(b, slot - start[b], token, order[b][slot], rank);
      }
    }
    const logits = await network.logits(labels, start);
    for (let b = 0; b < batch; b++) {
      for (let rank = first[b]; rank < first[b] + size[b]; rank++) {
        const row = logits(b, rank - start[b]);
        known[b][rank + shift] = choose(row, b, order[b][rank]);
      }
    }
  }
  return known.map((row) => row.slice(shift, shift + length));
}

/** The labels of the tokens of a pass, [B, W]; padding has the rank UNREAD. */
class Labels {
  static empty(batch, width, maskId) {
    const labels = new Labels();
    const size = batch * width;
    Object.assign(labels, { batch, width });
    labels.token = new Int32Array(size).fill(maskId);
    labels.position = new Int32Array(size);
    labels.rank = new Int32Array(size).fill(UNREAD);
    labels.inContext = new Uint8Array(size).fill(1);
    return labels;
  }

  set(row, column, token, position, rank) {
    const at = row * this.width + column;
    [this.token[at], this.position[at], this.rank[at]] = [token, position, rank];
  }
}

/** The network: step.onnx with a KV cache, or score.onnx. */
export class Network {
  #session;
  #Tensor;
  #sampling;
  #cache;

  /** session: an InferenceSession of step.onnx if sampling.has_step, else of score.onnx.
   *  Tensor: the class of ONNX Runtime. */
  constructor(session, Tensor, sampling) {
    [this.#session, this.#Tensor, this.#sampling] = [session, Tensor, sampling];
  }

  /** Empties the cache: `slots` for each row. */
  reset(batch, slots) {
    if (!this.#sampling.has_step) return;
    const { cache, onnx_cache_dtype: dtype } = this.#sampling;
    const [blocks, groups, width] = cache;
    const dims = [blocks, batch, slots, groups, width];
    const size = dims.reduce((a, b) => a * b);
    const zeros = () => (dtype === "float16" ? new Uint16Array(size) : new Float32Array(size));
    const tensor = () => new this.#Tensor(dtype, zeros(), dims);
    this.#cache = { keys: tensor(), values: tensor() };
  }

  /** A function (row, column) → logits Float32Array [V], for tokens that also read the slots below
   *  `filled` [B] of the cache, to which they are written. */
  async logits(labels, filled) {
    const dims = [labels.batch, labels.width];
    const make = (type, data) => new this.#Tensor(type, data, dims);
    const feeds = {
      token: make("int32", labels.token),
      position: make("int32", labels.position),
      rank: make("int32", labels.rank),
      in_context: make("bool", labels.inContext),
    };
    if (this.#sampling.has_step) {
      feeds.filled = new this.#Tensor("int32", Int32Array.from(filled), [labels.batch]);
      Object.assign(feeds, this.#cache);
    } else if (filled.some((slots) => slots > 0)) {
      throw new Error("score.onnx has no cache: a pass must start at slot 0");
    }
    const outputs = await this.#session.run(feeds);
    if (this.#sampling.has_step) {
      this.#cache = { keys: outputs.keys_out, values: outputs.values_out };
    }
    const [{ data }, size] = [outputs.logits, outputs.logits.dims[2]];
    return (row, column) => {
      const at = (row * labels.width + column) * size;
      return data.slice(at, at + size);
    };
  }
}

/** argmax(filter(logits / temperature) + Gumbel noise) without the mask; `logits` are changed. */
export function chooseToken(s, logits, key) {
  logits[s.mask_id] = -Infinity;
  let scores = logits;
  if (s.temperature > 0) {
    const noise = gumbel(key, logits.length);
    scores = filtered(s, logits).map((logit, i) => logit + noise[i]);
  }
  let best = s.mask_id === 0 ? 1 : 0;
  for (let i = best + 1; i < scores.length; i++) {
    if (scores[i] > scores[best] && i !== s.mask_id) best = i;
  }
  return best;
}

/** Float32Array [V]: logits of the distribution that tokens are drawn from. top_k 0 and top_p 1 are
 *  off; top_k comes first. */
export function filtered(s, logits) {
  const temperature = Math.min(Math.max(s.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE);
  // At low temperatures the logits would overflow.
  const top = temperature < SMALL_TEMPERATURE ? logits.reduce((a, b) => Math.max(a, b)) : 0;
  let out = logits.map((logit) => (logit - top) / temperature);
  if (s.top_k) {
    const rising = out.slice().sort();
    const kth = rising[rising.length - Math.min(s.top_k, rising.length)];
    out = out.map((logit) => (logit < kth ? -Infinity : logit));
  }
  if (s.top_p < 1) {
    const probs = softmax(out);
    const rising = probs.slice().sort();
    let [before, least] = [0, rising.at(-1)];
    for (let i = rising.length - 1; i >= 0 && before < s.top_p; i--) {
      least = rising[i];
      before += rising[i];
    }
    out = out.map((logit, i) => (probs[i] < least ? -Infinity : logit));
  }
  return out;
}

function softmax(logits) {
  const top = logits.reduce((a, b) => Math.max(a, b));
  const exp = Float64Array.from(logits, (logit) => Math.exp(logit - top));
  const total = exp.reduce((a, b) => a + b);
  return exp.map((x) => x / total);
}
