/* Orders, step sizes and passes of two-phase generation, as schedule_esolm.py.

`s` is the `sampling` section of config.json with the settings of generation. Slot j of a row holds
the token of rank j in the order of generation.

left_to_right and strided give the passes of the Python file. The random schedules have the same
distribution, but not the same draws, because theirs are of NumPy's generator. As there, step sizes
depend on the seed and the number of tokens, orders also on the row.
*/

import { foldIn, Generator } from "./draws.mjs";

export const UNREAD = 2 ** 31 - 1; // a rank that no other token reads: of empty slots and padding
const NOISE_EPS = 1e-3; // α_t = α₀ (1 − (1 − ε) t)
const ORDERS = 0; // what a generator draws
const SIZES = 1;

/** A generator of its own for each purpose and number; tokens are drawn from keys of [0, seed]. */
function generator(seed, purpose, number) {
  return new Generator(foldIn(foldIn([1, seed], purpose), number));
}

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const ascending = (numbers) => [...numbers].sort((a, b) => a - b);
const range = (n) => Array.from({ length: n }, (_, i) => i);

/** Half to even, as Python's. */
function round(x) {
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low + (low % 2);
}

/** The first Σ sizes positions in their order (diffusion), then the others left to right. */
function thenLeftToRight(positions, sizes) {
  const n = sum(sizes);
  const order = [...positions.slice(0, n), ...ascending(positions.slice(n))];
  const rest = new Array(positions.length - n).fill(1);
  return { order, sizes: [...sizes, ...rest], diffusion: order.map((_, i) => i < n) };
}

/** `steps` split α from 0 to α₀: Binomial(remaining, p) positions each; 0 = one per step. */
function ancestral(orders, sizesOf, positions, alpha0, steps) {
  if (!steps) {
    const sizes = new Array(orders.binomial(positions.length, alpha0)).fill(1);
    return thenLeftToRight(orders.permutation(positions), sizes);
  }
  const alpha = (i) => alpha0 * (1 - (1 - NOISE_EPS) * (1 - i / steps));
  let [sizes, remaining] = [[], positions.length];
  for (let i = 0; i < steps && remaining; i++) {
    const p = (alpha(i + 1) - alpha(i)) / (1 - alpha(i));
    sizes.push(sizesOf.binomial(remaining, Math.min(Math.max(p, 0), 1)));
    remaining -= sizes.at(-1);
  }
  if (alpha0 === 1) sizes.push(remaining);
  return thenLeftToRight(orders.permutation(positions), sizes.filter((size) => size));
}

/** Order of the unknown positions, step sizes, and which are the diffusion phase's. */
function drawRow(s, unknown, length, seed, row) {
  const sizesOf = (count) => generator(seed, SIZES, count);
  const orders = generator(seed, ORDERS, row);
  if (s.schedule === "left_to_right") return thenLeftToRight(unknown, []);
  if (s.schedule === "ancestral") {
    return ancestral(orders, sizesOf(unknown.length), unknown, s.alpha_0, s.steps);
  }
  if (s.schedule === "strided" || s.schedule === "shuffled_strided") {
    const n = Math.min(s.steps || unknown.length, unknown.length);
    const strides = s.schedule === "strided" ? range(n) : sizesOf(n).permutation(range(n));
    const size = (i) => Math.ceil((unknown.length - i) / n);
    const groups = strides.map((i) => range(size(i)).map((j) => unknown[i + j * n]));
    const sizes = groups.slice(0, round(s.alpha_0 * n)).map((group) => group.length);
    return thenLeftToRight(groups.flat(), sizes);
  }
  const width = s.block_length;
  const blocks = Math.ceil(length / width);
  const parts = range(blocks).map((block) => {
    const here = unknown.filter((position) => Math.floor(position / width) === block);
    const extra = block < s.steps % blocks ? 1 : 0;
    const steps = s.steps && Math.max(1, Math.floor(s.steps / blocks) + extra);
    const ofBlock = sizesOf(here.length + block * unknown.length);
    return ancestral(orders, ofBlock, here, s.alpha_0, steps);
  });
  const joined = (name) => parts.flatMap((part) => part[name]);
  return { order: joined("order"), sizes: joined("sizes"), diffusion: joined("diffusion") };
}

/** The passes for rows with these known positions, booleans [B][L].
 *
 *  Returns {order, passes}. order: [B][L], the position of each rank. passes: objects of start,
 *  first, size, end, below, each [B]: a pass runs the slots [start, end), generates `size` slots
 *  from `first` on, and slots below `below` have rank 0 (with shift 1, slot j holds rank j − 1).
 *  firstRow: the number of the first row among all rows of the seed. */
export function planPasses(s, known, seed, firstRow = 0) {
  const length = known[0].length;
  const [order, rows] = [[], []];
  known.forEach((isKnown, b) => {
    const positions = range(length);
    const given = positions.filter((i) => isKnown[i]);
    const unknown = positions.filter((i) => !isKnown[i]);
    const drawn = drawRow(s, unknown, length, seed, firstRow + b);
    order.push([...given, ...drawn.order]);
    const prefix = given.length + drawn.diffusion.lastIndexOf(true) + 1;
    rows.push(windows(s, given.length, prefix, drawn.sizes, length));
  });
  const count = Math.max(...rows.map(({ passes }) => passes.length));
  const table = range(count).map((i) => rows.map(({ passes, ended }) => passes[i] ?? ended));
  if (rows.some(({ prefill }) => prefill)) {
    // One pass that generates nothing puts the prompt in the cache.
    table.unshift(rows.map(({ prefill }) => ({ ...NONE, first: prefill, end: prefill })));
  }
  const columns = (pass) =>
    Object.fromEntries(Object.keys(NONE).map((name) => [name, pass.map((row) => row[name])]));
  return { order, passes: table.map(columns) };
}

const NONE = { start: 0, first: 0, size: 0, end: 0, below: 0 }; // a pass that runs nothing

/** The passes of a row: `prefill`, how many slots of the prompt are cached first; `passes`, the
 *  windows; `ended`, the pass of a row that has ended. */
function windows(s, numKnown, prefix, sizes, length) {
  const width = s.rank_block;
  const passes = [];
  let [first, before] = [numKnown, numKnown];
  let block = Math.floor(numKnown / width);
  const prefill = s.cached ? numKnown : s.prefix_of_one_rank ? 0 : block * width;
  for (const size of sizes) {
    const pass = { first, size, below: 0 };
    if (s.cached) {
      // A token reads lower ranks only: new tokens and this pass's masks.
      [pass.start, pass.end] = [s.shift ? first : before, first + size];
    } else if (s.prefix_of_one_rank) {
      // Tokens of the diffusion phase read each other.
      [pass.start, pass.end] = [first > prefix ? before : 0, first + size];
      pass.below = Math.min(first, prefix);
    } else {
      // Tokens of a block read each other; the block before a new one is put in the cache.
      const here = Math.floor(first / width);
      pass.start = (here > block ? here - 1 : here) * width;
      pass.end = Math.min((here + 1) * width, length);
      block = here;
    }
    passes.push(pass);
    [before, first] = [first, first + size];
  }
  const below = s.prefix_of_one_rank && !s.cached ? Math.min(first, prefix) : 0;
  return { prefill, passes, ended: { ...NONE, first, below } };
}

/** The settings of generation, `settings` over `defaults`. Throws an Error: unknown, or not allowed
 *  for this family. */
export function checked(defaults, settings, length) {
  const names = ["alpha_0", "schedule", "steps", "block_length", "temperature", "top_k", "top_p"];
  const given = Object.entries(settings).filter(([, value]) => value !== undefined);
  for (const [name] of given) {
    if (!names.includes(name)) throw new Error(`${name}: must be one of ${names.join(", ")}`);
  }
  const s = { ...defaults, ...Object.fromEntries(given), length: length ?? defaults.length };
  const fixed = defaults.fixed_alpha_0;
  const rules = [
    ["alpha_0", fixed === null || fixed === s.alpha_0, fixed],
    ["alpha_0", 0 <= s.alpha_0 && s.alpha_0 <= 1, "in [0, 1]"],
    ["schedule", s.schedules.includes(s.schedule), `one of ${s.schedules.join(", ")}`],
    ["steps", s.steps >= 0 && !(s.one_token && s.steps), "at least 0 (ar: 0)"],
    ["length", 1 <= s.length && s.length <= s.max_length, `in [1, ${s.max_length}]`],
    ["temperature", 0 <= s.temperature && s.temperature < Infinity, "at least 0"],
    ["top_p", 0 < s.top_p && s.top_p <= 1, "in (0, 1]"],
    ["top_k", s.top_k >= 0, "at least 0"],
  ];
  for (const [name, isRight, allowed] of rules) {
    if (!isRight) throw new Error(`${name}=${s[name]}: must be ${allowed}`);
  }
  s.schedule = s.replaced_schedules[s.schedule] ?? s.schedule;
  if (s.schedule === "ancestral" && s.length > s.trained_length) s.schedule = "blockwise";
  if (s.schedule === "left_to_right") s.steps = 0;
  return s;
}

/** Throws an Error if the family cannot generate in this order. */
export function checkPasses(s, { order, passes }) {
  if (s.shift && order.some((row) => row.some((position, slot) => position !== slot))) {
    throw new Error("the prompt: an autoregressive model continues a prompt at the start");
  }
  if (s.cached || s.prefix_of_one_rank) return;
  const width = s.rank_block;
  const block = (slot) => Math.floor(slot / width);
  const crosses = passes.some(({ first, size }) =>
    first.some((slot, b) => size[b] && slot + size[b] > (block(slot) + 1) * width),
  );
  const leaves = order.some((row) => row.some((i, slot) => block(i) !== block(slot)));
  if (crosses || leaves) {
    throw new Error(`the prompt: the model generates blocks of ${width} tokens, in order`);
  }
}
