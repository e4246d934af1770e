/* Random draws: JAX's generator, Threefry-2x32. A key is a pair of 32-bit numbers. */

const ROTATIONS = Uint8Array.of(13, 15, 26, 6, 17, 29, 16, 24);
const TINY = 2 ** -126; // the smallest normal float32
// Of the last setBlock. Reused, because memory for each of 2 V blocks takes five times as long.
const block = new Int32Array(2);
const keys = new Int32Array(3);

/** Sets `block` of a key and the counter [0, index]. */
function setBlock(key, index) {
  keys[0] = key[0];
  keys[1] = key[1];
  keys[2] = key[0] ^ key[1] ^ 0x1bd11bda;
  let a = keys[0];
  let b = (index + keys[1]) | 0;
  for (let i = 0; i < 5; i++) {
    for (let j = 0; j < 4; j++) {
      const rotation = ROTATIONS[4 * (i % 2) + j];
      a = (a + b) | 0;
      b = a ^ ((b << rotation) | (b >>> (32 - rotation)));
    }
    a = (a + keys[(i + 1) % 3]) | 0;
    b = (b + keys[(i + 2) % 3] + i + 1) | 0;
  }
  block[0] = a;
  block[1] = b;
}

/** The key of a key and a number below 2**32. */
export function foldIn(key, number) {
  setBlock(key, number);
  return [block[0] >>> 0, block[1] >>> 0];
}

/** Standard Gumbel noise, Float32Array [size], exact in the upper tail. */
export function gumbel(key, size) {
  const noise = new Float32Array(size);
  for (let i = 0; i < size; i++) {
    const high = uniform23(key, i);
    const low = uniform23(key, size + i);
    const fine = Math.fround(Math.fround(high + low * 2 ** -23) + TINY);
    noise[i] = -Math.log(-Math.log1p(-(high >= 0.5 ? high : fine)));
  }
  return noise;
}

/** A multiple of 2**-23 in [0, 1). */
function uniform23(key, index) {
  setBlock(key, index);
  return ((block[0] ^ block[1]) >>> 9) * 2 ** -23;
}

/** Draws for orders and step sizes, one after the other. */
export class Generator {
  #key;
  #count = 0;

  constructor(key) {
    this.#key = key;
  }

  /** A number in [0, 1), a multiple of 2**-53. */
  uniform() {
    setBlock(this.#key, this.#count++);
    return ((block[0] >>> 5) * 2 ** 26 + (block[1] >>> 6)) * 2 ** -53;
  }

  /** The items in random order. */
  permutation(items) {
    const out = [...items];
    for (let i = out.length - 1; i > 0; i--) {
      const j = Math.floor(this.uniform() * (i + 1));
      [out[i], out[j]] = [out[j], out[i]];
    }
    return out;
  }

  /** The number of successes in n trials of probability p, by the waits between them. */
  binomial(n, p) {
    if (p > 0.5) return n - this.binomial(n, 1 - p);
    if (p <= 0) return 0;
    const scale = Math.log1p(-p);
    for (let [count, trial] = [0, 0]; ; count++) {
      trial += Math.floor(Math.log(1 - this.uniform()) / scale) + 1;
      if (trial > n) return count;
    }
  }
}
