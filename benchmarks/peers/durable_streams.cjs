// The reference server of the Durable Streams protocol, in memory, one process.
//     node durable_streams.cjs <directory where it is installed>
const { createRequire } = require("node:module")
const { DurableStreamTestServer } = createRequire(process.argv[2] + "/")("@durable-streams/server")

new DurableStreamTestServer({ port: 0, host: "127.0.0.1" })
  .start()
  .then((url) => console.log(`ready on ${url}`))
