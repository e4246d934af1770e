/* Prompts → token ids, and token ids → text, by vocabulary.json. For Node 18 and browsers.

    const codec = new Codec(vocabulary);        // the parsed vocabulary.json
    const row = parsePrompt(codec, "once [MASK:3] a time", 64);    // -1: to be generated
    const text = codec.decode(ids);

The same as text_codec.py and spelling.py, which describe it, except that no library is used: its
prompts become the fewest tokens that spell them.
*/

export const MASK = -1; // in a row: a token to be generated
const NO_MERGE = 2 ** 31;
const SPACES = "\\t-\\r\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const WORD_SPACES = `[ \\x1c-\\x1f${SPACES}]`; // the white space of Python
const WORD = new RegExp(`${WORD_SPACES}{0,64}${WORD_SPACES.replace("[", "[^")}{0,64}`, "uy");
const GPT2_WORD = new RegExp(
  "'(?:[stmd]|re|ve|ll)| ?\\p{L}+| ?\\p{N}+" +
    `| ?[^ ${SPACES}\\p{L}\\p{N}]+|[ ${SPACES}]+(?![^ ${SPACES}])|[ ${SPACES}]+`,
  "gu",
);
const LONE_SURROGATE = /\p{Surrogate}/u;

/** No tokens spell a character of a text; `at` is its index, in code points. */
export class NotKept extends Error {
  constructor(at) {
    super(`character ${at}: the tokenizer has no tokens for it`);
    this.at = at;
  }
}

/** The tokenizer of an exported folder. Strings of bytes have characters below 256. */
export class Codec {
  constructor(vocabulary) {
    this.vocabulary = vocabulary;
    this.kind = vocabulary.kind;
    this.maskId = vocabulary.mask_id;
    this.numIds = Math.max(vocabulary.vocab_size, this.maskId + 1);
    this.hasText = vocabulary.inside !== null;
    this.names = new Map([[vocabulary.pad_id, ""], [vocabulary.bos_id, ""]]);
    this.names.set(vocabulary.eos_id, "[EOS]").set(this.maskId, "[MASK]");
    if (this.hasText) this.#setSurfaces();
  }

  #setSurfaces() {
    const { inside, first, drops_first_space, unspelled, symbols } = this.vocabulary;
    const isUnspelled = new Set(unspelled);
    this.inside = inside;
    this.first = drops_first_space ? inside.map((s) => s.replace(/^ /, "")) : [...inside];
    for (const [i, surface] of Object.entries(first)) this.first[i] = surface;
    this.byBytes = new Map();
    this.byFirst = new Map();
    inside.forEach((surface, i) => {
      if (isUnspelled.has(i)) return;
      if (surface) this.byBytes.set(surface, i);
      if (this.first[i] || surface === " ") this.byFirst.set(this.first[i], i);
    });
    this.longest = 1;
    for (const surface of [...this.byBytes.keys(), ...this.byFirst.keys()]) {
      this.longest = Math.max(this.longest, surface.length);
    }
    this.ids = new Map([...this.byBytes, ...Object.entries(symbols)]);
    this.innerPairs = new Set();
    for (const token of this.ids.keys()) {
      for (let i = 0; i + 1 < token.length; i++) this.innerPairs.add(token.slice(i, i + 2));
    }
  }

  #checkHasText() {
    if (!this.hasText) {
      throw new Error(`the tokenizer (${this.kind}) needs its own library: use token ids`);
    }
  }

  /** Text of `ids`, without BOS and PAD, with EOS as [EOS] and the mask as [MASK].
   *  bosIsGiven: false if a BOS at the beginning was generated: no text begins after it. */
  decode(ids, { bosIsGiven = true } = {}) {
    this.#checkHasText();
    let [out, run, begins] = ["", [], true];
    Array.from(ids).forEach((i, n) => {
      if (!(Number.isInteger(i) && 0 <= i && i < this.numIds)) {
        throw new Error(`token id ${i} is not in 0..${this.numIds - 1}`);
      }
      if (this.names.has(i)) {
        out += this.#text(run, begins) + this.names.get(i);
        [run, begins] = [[], n === 0 && i === this.vocabulary.bos_id && bosIsGiven];
      } else {
        run.push(i);
      }
    });
    return out + this.#text(run, begins);
  }

  #text(run, begins) {
    const surfaces = run.map((i, n) => (begins && n === 0 ? this.first : this.inside)[i]);
    return fromBytes(surfaces.join(""), this.vocabulary.each_byte);
  }

  /** Ids that decode to exactly this part of a text. begins: it is the beginning of the text.
   *  Throws NotKept if the tokenizer cannot spell a character. */
  encode(text, { begins = true } = {}) {
    this.#checkHasText();
    checkUnicode(text);
    if (!text) return [];
    const encoder = this.vocabulary.encoder;
    if (encoder === "characters") return this.#ofCharacters(text);
    if (encoder === "gpt2") {
      const words = text.match(GPT2_WORD).map((word) => this.#merged([...toBytes(word)]));
      return words.flat().map((symbol) => this.ids.get(symbol));
    }
    this.#warn();
    return this.#fewest(Array.from(text), begins);
  }

  #warn() {
    if (this.hasWarned) return;
    this.hasWarned = true;
    console.error(
      "prompts become the fewest tokens that spell them, which may differ from those of the " +
        `training data: the package ${this.vocabulary.library.package} is not used in JavaScript`,
    );
  }

  #ofCharacters(text) {
    let [ids, at, chunk] = [[], 0, []];
    const flush = () => {
      for (const symbol of this.#merged(chunk)) {
        const parts = this.ids.has(symbol) ? [symbol] : [...symbol];
        if (!parts.every((part) => this.ids.has(part))) throw new NotKept(at);
        for (const part of parts) ids.push(this.ids.get(part));
        at += numCharacters(symbol);
      }
    };
    for (const symbol of Array.from(text, toBytes)) {
      if (chunk.length && !this.innerPairs.has(chunk.at(-1).at(-1) + symbol[0])) {
        flush();
        chunk = [];
      }
      chunk.push(symbol);
    }
    flush();
    return ids;
  }

  #rank(left, right) {
    const i = this.ids.get(left + right) ?? NO_MERGE;
    const lengths = this.vocabulary.left;
    return i !== NO_MERGE && lengths && lengths[i] !== left.length ? NO_MERGE : i;
  }

  /** Merges the adjacent pair of the lowest rank, the leftmost of equal ones, while any merge. */
  #merged(symbols) {
    const ranks = symbols.slice(1).map((right, i) => this.#rank(symbols[i], right));
    for (;;) {
      let at = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[at]) at = i;
      if (!ranks.length || ranks[at] === NO_MERGE) return symbols;
      symbols.splice(at, 2, symbols[at] + symbols[at + 1]);
      ranks.splice(at, 1);
      for (let i = Math.max(0, at - 1); i <= at && i < ranks.length; i++) {
        ranks[i] = this.#rank(symbols[i], symbols[i + 1]);
      }
    }
  }

  /** The fewest tokens for each word of `characters`. */
  #fewest(characters, begins) {
    const ids = [];
    for (let at = 0; at < characters.length; ) {
      const rest = characters.slice(at, at + 128).join("");
      WORD.lastIndex = 0;
      const word = WORD.exec(rest)[0];
      ids.push(...this.#shortest(toBytes(word), at, begins && !ids.length));
      at += Array.from(word).length;
    }
    return ids;
  }

  #shortest(data, start, begins) {
    // For each byte: [number of tokens so far, the last token, its start].
    const best = new Array(data.length + 1).fill(null);
    if (begins) {
      for (const [surface, i] of this.byFirst) {
        if (data.startsWith(surface)) best[surface.length] = [1, i, -1];
      }
    } else {
      best[0] = [0, -1, -1];
    }
    for (let at = 0; at < data.length; at++) {
      if (!best[at]) continue;
      const count = best[at][0] + 1;
      for (let end = at + 1; end <= Math.min(data.length, at + this.longest); end++) {
        const i = this.byBytes.get(data.slice(at, end));
        if (i !== undefined && (!best[end] || best[end][0] > count)) best[end] = [count, i, at];
      }
    }
    if (!best[data.length]) {
      const last = Math.max(0, best.findLastIndex((found) => found));
      throw new NotKept(start + numCharacters(data.slice(0, last + 1)) - 1);
    }
    const ids = [];
    for (let at = data.length; at >= 0 && best[at][0]; at = best[at][2]) ids.push(best[at][1]);
    return ids.reverse();
  }
}

/** UTF-8, each byte as a character below 256. */
function toBytes(text) {
  return Array.from(new TextEncoder().encode(text), (b) => String.fromCharCode(b)).join("");
}

/** The text of UTF-8. eachByte: each invalid byte becomes U+FFFD, not each incomplete character. */
function fromBytes(data, eachByte) {
  const bytes = Uint8Array.from(data, (character) => character.charCodeAt(0));
  const decoder = (fatal) => new TextDecoder("utf-8", { ignoreBOM: true, fatal });
  const text = decoder(false).decode(bytes);
  if (!eachByte || !text.includes("\ufffd")) return text;
  const [strict, out] = [decoder(true), []];
  for (let at = 0; at < bytes.length; ) {
    const length = bytes[at] < 0x80 ? 1 : bytes[at] < 0xe0 ? 2 : bytes[at] < 0xf0 ? 3 : 4;
    try {
      out.push(strict.decode(bytes.subarray(at, at + length)));
      at += length;
    } catch {
      out.push("\ufffd");
      at += 1;
    }
  }
  return out.join("");
}

function numCharacters(data) {
  let count = 0;
  for (const byte of data) count += (byte.charCodeAt(0) & 0xc0) !== 0x80;
  return count;
}

function checkUnicode(text) {
  const at = Array.from(text).findIndex((character) => LONE_SURROGATE.test(character));
  if (at >= 0) throw new Error(`must be Unicode, but character ${at} is a lone surrogate`);
}

/** The tokens of a text with [MASK] and [MASK:n] in it: ids, MASK where one is to be generated. A
 *  text without [MASK] is continued: MASKs follow, up to `length`. Throws an Error of one line. */
export function parsePrompt(codec, text, length) {
  try {
    checkUnicode(text);
    return rowOf(codec, text, length);
  } catch (error) {
    throw new Error(`prompt ${JSON.stringify(text.slice(0, 40))}: ${error.message}`);
  }
}

function rowOf(codec, text, length) {
  const spans = masksOf(text).map(([start, stop, count]) => {
    if (!/^0*[1-9][0-9]{0,5}$/.test(count)) {
      const span = JSON.stringify(text.slice(start, stop).slice(0, 80));
      throw new Error(`${span}: must be [MASK], or [MASK:n] with n in 1..999999`);
    }
    return [start, stop, Number(count)];
  });
  let [row, at] = [[], 0];
  const check = (count) => {
    if (count > length) {
      throw new Error(`has ${count} tokens or more: must have at most ${length} (--length)`);
    }
  };
  for (const [start, stop, count] of spans) {
    row = row.concat(partOf(codec, text, at, start, !row.length));
    check(row.length + count);
    row = row.concat(new Array(count).fill(MASK));
    at = stop;
  }
  row = row.concat(partOf(codec, text, at, text.length, !row.length));
  check(row.length);
  if (!spans.length) row = row.concat(new Array(length - row.length).fill(MASK));
  if (!row.includes(MASK)) throw new Error("must have at least one token to generate");
  return row;
}

/** [start, stop, text after the colon] of each [MASK] and [MASK:n]. */
function masksOf(text) {
  const [open, spans] = ["[MASK", []];
  let at = 0;
  for (let start; (start = text.indexOf(open, at)) >= 0; ) {
    at = start + open.length;
    if (text[at] === "]") {
      at += 1;
      spans.push([start, at, "1"]);
    } else if (text[at] === ":") {
      const stop = text.indexOf("]", at);
      if (stop < 0) break;
      spans.push([start, stop + 1, text.slice(at + 1, stop)]);
      at = stop + 1;
    }
  }
  return spans;
}

function partOf(codec, text, start, stop, begins) {
  const part = text.slice(start, stop);
  try {
    return codec.encode(part, { begins });
  } catch (error) {
    if (!(error instanceof NotKept)) throw error;
    const character = Array.from(part)[error.at];
    const behind = Array.from(text.slice(start)).slice(error.at + 1).join("");
    const isSpace = /\s/.test(character) && behind.trimStart().startsWith("[MASK");
    const advice = isSpace
      ? "leave it out: the token in place of [MASK] can add a space itself"
      : "write what it can spell";
    const at = Array.from(text.slice(0, start)).length + error.at;
    const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    throw new Error(
      `character ${at}, ${JSON.stringify(character)} (U+${code}), must be kept as it is, but the ` +
        `tokenizer (${codec.kind}) has no tokens for it there; ${advice}`,
    );
  }
}

/** What the scripts print: texts, several of them under headings; or a JSON list per row.
 *  firstIsKnown: for each row, whether its first token is of the prompt. */
export function show(codec, rows, firstIsKnown, { asIds = false } = {}) {
  if (!asIds && !codec.hasText) {
    console.error(`the tokenizer (${codec.kind}) needs its own library: printing ids`);
    asIds = true;
  }
  if (asIds) return rows.map((row) => `[${Array.from(row).join(", ")}]`).join("\n");
  const texts = rows.map((row, b) => codec.decode(row, { bosIsGiven: firstIsKnown[b] }));
  if (texts.length === 1) return texts[0];
  return texts.map((text, n) => `--- text ${n} ${"-".repeat(60)}\n${text}`).join("\n");
}
