// Vectors: base64 of little-endian float32, and cosines.

export function floats(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

export function base64(vectors) {
  const parts = vectors.map((vector) => new Uint8Array(vector.buffer, vector.byteOffset, vector.byteLength));
  return btoa(parts.map((bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join("")).join(""));
}

const dot = (one, other) => one.reduce((sum, value, place) => sum + value * other[place], 0);

export const cosine = (one, other) => dot(one, other) / Math.sqrt(dot(one, one) * dot(other, other));

export const mean = (vectors) => vectors[0].map((_, place) => vectors.reduce((sum, vector) => sum + vector[place], 0) / vectors.length);

// Return the coordinates of a vector on a plane {mean, axes}.
export const project = (vector, { mean: origin, axes }) => axes.map((axis) => axis.reduce((sum, value, place) => sum + value * (vector[place] - origin[place]), 0));

// Return a vector of unit length in the direction of another.
export function unit(vector) {
  const length = Math.sqrt(dot(vector, vector)) || 1;
  return vector.map((value) => value / length);
}
