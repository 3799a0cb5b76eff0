// Python in a thread of its own: the package comes as bytecode, and each question is one call.
import { loadPyodide } from "./pyodide/pyodide.mjs";

async function start() {
  const [python, archive] = await Promise.all([
    loadPyodide({ indexURL: new URL("./pyodide/", import.meta.url).href }),
    fetch(new URL("./package.zip", import.meta.url)).then((answer) => {
      if (!answer.ok) throw new Error(`the package could not be loaded (${answer.status})`);
      return answer.arrayBuffer();
    }),
  ]);
  python.unpackArchive(archive, "zip", { extractDir: "/package" });
  python.runPython("import sys; sys.path.insert(0, '/package')");
  const reply = python.runPython("from fsdl_devinfra.compute.planner import reply; reply");
  reply("answer", ""); // reads the tables, so that the first question is as fast as the next
  return reply;
}

const started = start();
self.onmessage = async ({ data: { id, call, address } }) => {
  try {
    const reply = await started;
    const begun = performance.now();
    const found = JSON.parse(reply(call, address));
    self.postMessage({ id, ...found, milliseconds: performance.now() - begun });
  } catch (error) {
    self.postMessage({ id, error: String(error.message || error).split("\n").filter(Boolean).pop() });
  }
};
