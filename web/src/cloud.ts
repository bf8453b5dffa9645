// A 3D surface textured with a photograph, rotated by pointer and keys; WebGL redraws only after changes.

import type { Surface } from "./surface";

const VERTEX = `#version 300 es
in vec3 place;
in vec2 corner;
uniform mat4 view;
out vec2 at;
void main() {
  gl_Position = view * vec4(place, 1.0);
  at = corner;
}`;
const FRAGMENT = `#version 300 es
precision mediump float;
in vec2 at;
uniform sampler2D photograph;
out vec4 colour;
void main() {
  colour = vec4(texture(photograph, at).rgb, 1.0);
}`;

const START = { yaw: 0.2, pitch: 0.08, zoom: 1 };
const STEP = 0.1; // radians of an arrow key
const MOST = 1.4; // radians up and down
const NEAR = 0.02;
const FAR = 40;

export class Cloud {
  private readonly gl: WebGL2RenderingContext | null;
  private readonly program: WebGLProgram | undefined;
  private buffers: WebGLBuffer[] = [];
  private texture: WebGLTexture | null = null;
  private count = 0;
  private lens = 1; // focal length in heights of the picture
  private turn = { ...START };
  private asked = false;

  constructor(private readonly canvas: HTMLCanvasElement) {
    this.gl = canvas.getContext("webgl2", { antialias: true, preserveDrawingBuffer: true });
    if (!this.gl) {
      canvas.setAttribute("aria-label", "The 3D view needs WebGL 2, which this browser does not support.");
      return;
    }
    this.program = link(this.gl);
    this.listen();
    new ResizeObserver(() => this.ask()).observe(canvas);
  }

  /**
   * Show a surface from a little aside of where it was photographed.
   *
   * @param focal Focal length in pixels of the photograph.
   */
  show(surface: Surface, photograph: ImageData, focal: number): void {
    const { gl, program } = this;
    if (!gl || !program) return;
    for (const buffer of this.buffers) gl.deleteBuffer(buffer);
    gl.deleteTexture(this.texture);
    this.buffers = [
      fill(gl, program, "place", surface.places, 3),
      fill(gl, program, "corner", surface.corners, 2),
      upload(gl, gl.ELEMENT_ARRAY_BUFFER, surface.triangles),
    ];
    this.count = surface.triangles.length;
    this.texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, this.texture);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, photograph);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.LINEAR);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_T, gl.CLAMP_TO_EDGE);
    this.lens = focal / photograph.height;
    this.canvas.style.aspectRatio = `${photograph.width} / ${photograph.height}`;
    this.reset();
  }

  reset(): void {
    this.turn = { ...START };
    this.ask();
  }

  private ask(): void {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => {
      this.asked = false;
      this.draw();
    });
  }

  private draw(): void {
    const { gl, program, canvas } = this;
    if (!gl || !program || !canvas.clientWidth) return;
    canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
    canvas.height = Math.round(canvas.clientHeight * devicePixelRatio);
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.enable(gl.DEPTH_TEST);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.useProgram(program);
    const view = look(this.turn, this.lens, canvas.width / canvas.height);
    gl.uniformMatrix4fv(gl.getUniformLocation(program, "view"), false, view);
    gl.drawElements(gl.TRIANGLES, this.count, gl.UNSIGNED_INT, 0);
  }

  private move(yaw: number, pitch: number, zoom = 1): void {
    this.turn.yaw += yaw;
    this.turn.pitch = Math.min(Math.max(this.turn.pitch + pitch, -MOST), MOST);
    this.turn.zoom = Math.min(Math.max(this.turn.zoom * zoom, 0.3), 6);
    this.ask();
  }

  private listen(): void {
    const { canvas } = this;
    const pointers = new Map<number, PointerEvent>();
    const spread = () => {
      const [first, second] = [...pointers.values()];
      return Math.hypot(first.clientX - second.clientX, first.clientY - second.clientY);
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, event);
    });
    canvas.addEventListener("pointermove", (event) => {
      const last = pointers.get(event.pointerId);
      if (!last) return;
      const before = pointers.size === 2 ? spread() : 0;
      pointers.set(event.pointerId, event);
      if (before) this.move(0, 0, spread() / before);
      else this.move((event.clientX - last.clientX) / 200, (event.clientY - last.clientY) / 200);
    });
    for (const name of ["pointerup", "pointercancel"] as const) {
      canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
    }
    canvas.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        this.move(0, 0, Math.exp(-event.deltaY / 500));
      },
      { passive: false },
    );
    canvas.addEventListener("keydown", (event) => {
      const moves: Record<string, [number, number, number?]> = {
        ArrowLeft: [-STEP, 0],
        ArrowRight: [STEP, 0],
        ArrowUp: [0, -STEP],
        ArrowDown: [0, STEP],
        "+": [0, 0, 1.2],
        "-": [0, 0, 1 / 1.2],
      };
      if (event.key === "0") this.reset();
      else if (moves[event.key]) this.move(...moves[event.key]);
      else return;
      event.preventDefault();
    });
  }
}

function link(gl: WebGL2RenderingContext): WebGLProgram {
  const program = gl.createProgram();
  for (const [kind, text] of [
    [gl.VERTEX_SHADER, VERTEX],
    [gl.FRAGMENT_SHADER, FRAGMENT],
  ] as const) {
    const shader = gl.createShader(kind)!;
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  return program;
}

function upload(gl: WebGL2RenderingContext, target: number, values: Float32Array | Uint32Array): WebGLBuffer {
  const buffer = gl.createBuffer();
  gl.bindBuffer(target, buffer);
  gl.bufferData(target, values, gl.STATIC_DRAW);
  return buffer;
}

function fill(gl: WebGL2RenderingContext, program: WebGLProgram, name: string, values: Float32Array, size: number) {
  const buffer = upload(gl, gl.ARRAY_BUFFER, values);
  const place = gl.getAttribLocation(program, name);
  gl.enableVertexAttribArray(place);
  gl.vertexAttribPointer(place, size, gl.FLOAT, false, 0, 0);
  return buffer;
}

/** View matrix, column by column, of a camera that orbits the point at the median depth. */
function look({ yaw, pitch, zoom }: typeof START, lens: number, aspect: number): Float32Array {
  const [cy, sy, cp, sp] = [Math.cos(yaw), Math.sin(yaw), Math.cos(pitch), Math.sin(pitch)];
  const back = 1 / zoom; // distance from the point, which lies at (0, 0, -1)
  // Rows of the rotation: p' = R (p - point) - (0, 0, back).
  const rows = [
    [cy, 0, sy],
    [sp * sy, cp, -sp * cy],
    [-cp * sy, sp, cp * cy],
  ];
  const moved = rows.map((row, place) => row[2] - (place === 2 ? back : 0));
  const [x, y] = [(2 * lens) / aspect, 2 * lens];
  const [scale, shift] = [(FAR + NEAR) / (NEAR - FAR), (2 * FAR * NEAR) / (NEAR - FAR)];
  const columns = [0, 1, 2].map((c) => [x * rows[0][c], y * rows[1][c], scale * rows[2][c], -rows[2][c]]);
  return new Float32Array([...columns.flat(), x * moved[0], y * moved[1], scale * moved[2] + shift, -moved[2]]);
}
