// What /metrics said over the last hour: every scrape at first, thinned out as it ages, small enough to be kept over a reload.

const SPAN_S = 3700;
const THIN = [[960, 30], [310, 10]]; // older than so many seconds: one scrape in so many seconds
const LOOK_BACK_S = 9.5; // of rates and percentiles, if no other is asked for
const BREAK_S = 45; // a longer pause is a break: nothing is known of it
const MOST_CHARACTERS = 2e6;
const STAGES = /^total/;
const WANTED = /^(lvm_(requests_total|request_seconds_.*|batch_.*|queue_rows|in_flight_.*|limit_rows|input_drift|card_cosine|live_distance_(sum|count)|live_rank_bucket|live_coverage)|process_(resident_memory_bytes|cpu_seconds_total))$/;

const isWanted = (name, labels) => WANTED.test(name) && (name !== "lvm_request_seconds_bucket" || STAGES.test(labels.stage));

export class History {
  constructor() {
    this.keys = []; // [name, labels]: what the values of a scrape stand for
    this.scrapes = []; // {at: seconds since 1970, values}
    this.places = new Map(); // by name and labels as text
    this.found = new Map(); // places by what was looked for
    this.made = new Map(); // by look-back, the stretch up to a scrape
  }

  // Add what `parse` of prometheus.js returns.
  add(at, samples) {
    const values = [];
    for (const [name, family] of samples) {
      for (const { labels, value } of family) if (isWanted(name, labels)) values[this.#place(name, labels)] = value;
    }
    this.scrapes = this.scrapes.filter((one) => one.at < at); // a clock that was set back
    this.scrapes.push({ at, values });
    this.#thin(at);
  }

  #place(name, labels) {
    const key = `${name} ${JSON.stringify(labels)}`;
    if (!this.places.has(key)) {
      this.places.set(key, this.keys.push([name, labels]) - 1);
      this.found.clear();
    }
    return this.places.get(key);
  }

  #thin(now) {
    let taken = null;
    this.scrapes = this.scrapes.filter(({ at }) => {
      const [, step] = THIN.find(([age]) => now - at > age) ?? [0, 0];
      const slot = step ? `${step} ${Math.floor(at / step)}` : null;
      const isDouble = slot !== null && slot === taken;
      taken = slot;
      return !isDouble && now - at <= SPAN_S;
    });
  }

  // Return the places of the samples whose labels fit.
  find(name, wanted = {}) {
    const key = `${name} ${JSON.stringify(wanted)}`;
    if (!this.found.has(key)) this.found.set(key, this.#search(name, Object.entries(wanted)));
    return this.found.get(key);
  }

  #search(name, wanted) {
    const fits = ([known, labels]) => known === name && wanted.every(([label, value]) => labels[label] === value);
    return this.keys.flatMap((key, place) => (fits(key) ? [place] : []));
  }

  labels(name, label) {
    return [...new Set(this.find(name).map((place) => this.keys[place][1][label]))];
  }

  // Return each scrape of the last `seconds` as a stretch, with the scrape `lookBack` seconds before it.
  stretches(seconds, lookBack = LOOK_BACK_S) {
    const from = (this.scrapes.at(-1)?.at ?? 0) - seconds;
    if (!this.made.has(lookBack)) this.made.set(lookBack, new WeakMap());
    const made = this.made.get(lookBack);
    return this.scrapes.flatMap((later, place) => (later.at >= from ? [this.#stretch(made, this.#before(place, lookBack), later)] : []));
  }

  // What an old stretch says does not change, so it is kept.
  #stretch(made, earlier, later) {
    if (made.get(later)?.began !== earlier.at) made.set(later, new Stretch(this, earlier, later));
    return made.get(later);
  }

  // Return all that is known of the last `seconds` as one stretch, from after the last break on.
  whole(seconds) {
    const later = this.scrapes.at(-1);
    const first = this.scrapes.findIndex(({ at }, place) => at >= later.at - seconds && !this.#hasBreak(place));
    return new Stretch(this, this.scrapes[first], later);
  }

  #hasBreak(place) {
    return this.scrapes.some(({ at }, one) => one > place && at - this.scrapes[one - 1].at > BREAK_S);
  }

  #before(place, lookBack) {
    let earlier = place;
    while (earlier > 0 && this.scrapes[place].at - this.scrapes[earlier].at < lookBack && this.scrapes[earlier].at - this.scrapes[earlier - 1].at <= BREAK_S) earlier -= 1;
    return this.scrapes[earlier];
  }

  // Return the history as text: the keys, then each scrape as the values that changed; null means none. The oldest go first if it is too long.
  toText() {
    const text = JSON.stringify({ keys: this.keys, scrapes: changes(this.scrapes) });
    if (text.length <= MOST_CHARACTERS || this.scrapes.length < 2) return text;
    const shorter = Object.assign(new History(), { keys: this.keys, scrapes: this.scrapes.slice(this.scrapes.length >> 1) });
    return shorter.toText();
  }

  // Return the history that `toText` wrote; an empty one if it is no such text.
  static fromText(text) {
    const history = new History();
    try {
      const { keys, scrapes } = JSON.parse(text);
      for (const [name, labels] of keys) history.#place(name, labels);
      history.scrapes = unchanged(scrapes);
    } catch {
      return new History();
    }
    return history;
  }
}

function changes(scrapes) {
  let known = [];
  return scrapes.map(({ at, values }) => {
    const changed = [];
    for (let place = 0; place < Math.max(values.length, known.length); place += 1) {
      if (values[place] !== known[place]) changed.push(place, Number.isFinite(values[place]) ? values[place] : null);
    }
    known = values;
    return [Math.round(at * 10) / 10, changed];
  });
}

function unchanged(scrapes) {
  let values = [];
  return scrapes.map(([at, changed]) => {
    if (!Number.isFinite(at) || !Array.isArray(changed)) throw new TypeError("no scrape");
    values = [...values];
    for (let one = 0; one < changed.length; one += 2) values[changed[one]] = changed[one + 1] ?? undefined;
    return { at, values };
  });
}

// What came between two scrapes; null where there is nothing to say.
export class Stretch {
  constructor(history, earlier, later) {
    [this.history, this.earlier, this.later, this.at] = [history, earlier.values, later.values, later.at];
    [this.began, this.seconds, this.known] = [earlier.at, later.at - earlier.at, new Map()];
  }

  // Return what `make(this)` returns, or what it returned for this key before.
  once(key, make) {
    if (!this.known.has(key)) this.known.set(key, make(this));
    return this.known.get(key);
  }

  // A level at the end of the stretch, summed over the samples that fit.
  level(name, wanted) {
    const found = this.history.find(name, wanted).flatMap((place) => this.later[place] ?? []);
    return found.length ? found.reduce((sum, value) => sum + value, 0) : null;
  }

  // By how much a counter rose, summed over the samples that fit. A counter that fell was reset, and began at 0.
  rise(name, wanted) {
    const known = this.history.find(name, wanted).filter((place) => this.later[place] !== undefined);
    if (!this.seconds || !known.length) return null;
    return known.reduce((sum, place) => sum + this.#riseOf(place), 0);
  }

  #riseOf(place) {
    const [later, earlier] = [this.later[place], this.earlier[place] ?? 0];
    return later < earlier ? later : later - earlier;
  }

  rate(name, wanted) {
    const more = this.rise(name, wanted);
    return more === null ? null : more / this.seconds;
  }

  // A histogram of the values observed in between, {edges, counts, count, sum}; counts are cumulative.
  histogram(name, wanted) {
    const places = this.history.find(`${name}_bucket`, wanted).filter((place) => this.later[place] !== undefined);
    if (!this.seconds || !places.length) return null;
    const wasReset = places.some((place) => this.later[place] < (this.earlier[place] ?? 0));
    const sums = new Map();
    for (const place of places) {
      const edge = edgeOf(this.history.keys[place][1].le);
      sums.set(edge, (sums.get(edge) ?? 0) + this.later[place] - (wasReset ? 0 : (this.earlier[place] ?? 0)));
    }
    const edges = [...sums.keys()].sort((one, other) => one - other);
    const counts = edges.map((edge) => sums.get(edge));
    return { edges, counts, count: counts.at(-1), sum: this.rise(`${name}_sum`, wanted) };
  }

  mean(name, wanted, scale = 1) {
    const [sum, count] = ["sum", "count"].map((part) => this.rise(`${name}_${part}`, wanted));
    return count ? (scale * sum) / count : null;
  }
}

const edgeOf = (text) => (text === "+Inf" ? Infinity : Number(text));
