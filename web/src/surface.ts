// The scene as a mesh of triangles between neighbouring pixels, cut at depth discontinuities.

export interface Lens {
  /** Focal length in pixels of the image. */
  focal: number;
  /** Added to disparities: column of the right view's principal point minus the left's. */
  doffs: number;
}

export interface Surface {
  /** x to the right, y up, z towards the viewer, who stands at 0; the median depth is 1. */
  places: Float32Array;
  /** Position of each vertex in the image, 0 to 1. */
  corners: Float32Array;
  triangles: Uint32Array;
}

const TEAR = 0.08; // relative step of depth between neighbours from which on they are no surface
const FARTHEST = 8; // times the median depth that is shown

export function buildSurface(
  disparity: Float32Array,
  seen: Uint8Array,
  width: number,
  height: number,
  { focal, doffs }: Lens,
): Surface {
  const depth = disparity.map((value, place) => (seen[place] && value + doffs > 0 ? 1 / (value + doffs) : 0));
  const known = depth.filter((value) => value > 0).sort();
  const middle = known[known.length >> 1] || 1;
  const places = new Float32Array(3 * depth.length);
  const corners = new Float32Array(2 * depth.length);
  for (let place = 0; place < depth.length; place++) {
    const x = place % width;
    const y = Math.floor(place / width);
    depth[place] /= middle;
    const z = depth[place];
    places[3 * place] = ((x + 0.5 - width / 2) * z) / focal;
    places[3 * place + 1] = ((height / 2 - y - 0.5) * z) / focal;
    places[3 * place + 2] = -z;
    corners[2 * place] = (x + 0.5) / width;
    corners[2 * place + 1] = (y + 0.5) / height;
  }
  return { places, corners, triangles: connect(depth, width, height) };
}

function connect(depth: Float32Array, width: number, height: number): Uint32Array {
  const triangles = new Uint32Array(6 * (width - 1) * (height - 1));
  let count = 0;
  const add = (a: number, b: number, c: number) => {
    const near = Math.min(depth[a], depth[b], depth[c]);
    const far = Math.max(depth[a], depth[b], depth[c]);
    if (near <= 0 || far > FARTHEST || far - near > TEAR * near) return;
    triangles[count++] = a;
    triangles[count++] = b;
    triangles[count++] = c;
  };
  for (let y = 0; y + 1 < height; y++) {
    for (let x = 0; x + 1 < width; x++) {
      const place = y * width + x;
      add(place, place + width, place + 1);
      add(place + 1, place + width, place + width + 1);
    }
  }
  return triangles.slice(0, count);
}
