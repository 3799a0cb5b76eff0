// Python in a thread of its own, and each question is one call. It wakes from a snapshot of its memory, taken when
// everything was imported and read; where that cannot be had, it starts from the beginning with the package's bytecode.
import { loadPyodide } from "./pyodide/pyodide.mjs";

const here = (name) => new URL(name, import.meta.url).href;
const options = { indexURL: here("./pyodide/") };

async function bytes(name) {
  const answer = await fetch(here(name));
  if (!answer.ok) throw new Error(`${name} could not be loaded (${answer.status})`);
  return answer;
}

async function unpack(python) {
  python.unpackArchive(await (await bytes("./package.zip")).arrayBuffer(), "zip", { extractDir: "/package" });
  python.runPython("import importlib, sys; importlib.invalidate_caches(); '/package' in sys.path or sys.path.insert(0, '/package')");
}

async function wake() {
  const unpacked = bytes("./python.snapshot").then((answer) => new Response(answer.body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
  const python = await loadPyodide({ ...options, _loadSnapshot: unpacked });
  return { python, reply: python.runPython("reply"), whole: false };
}

async function start() {
  const python = await loadPyodide(options);
  await unpack(python);
  const reply = python.runPython("from fsdl_devinfra.compute.planner import reply; reply");
  reply("answer", ""); // reads the tables, so that the first question is as fast as the next
  return { python, reply, whole: true };
}

// what the snapshot lacks (a module or a table that no question needed before it was taken) is in the package
async function asked(self, call, address) {
  try { return self.reply(call, address); } catch (error) {
    if (self.whole || !/ModuleNotFoundError|FileNotFoundError/.test(error.message)) throw error;
    await unpack(self.python);
    self.whole = true;
    return self.reply(call, address);
  }
}

const started = new URLSearchParams(self.location.search).has("cold") ? start() : wake().catch(start);
self.onmessage = async ({ data: { id, call, address } }) => {
  try {
    const running = await started;
    const begun = performance.now();
    const found = JSON.parse(await asked(running, call, address));
    self.postMessage({ id, ...found, milliseconds: performance.now() - begun, woken: !running.whole });
  } catch (error) {
    self.postMessage({ id, error: String(error.message || error).split("\n").filter(Boolean).pop() });
  }
};
