// A client made from the protos alone: node client.js ROUTER STORE ADAPTER_DIRECTORY PROTO_PATH...
// uploads the adapter under its directory's name and asks it once with Generate, once with
// StreamGenerate. The last paths are where imports are looked up.
"use strict";
const { createHash } = require("node:crypto");
const { readFileSync } = require("node:fs");
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const CHUNK_BYTES = 1 << 20;
const DEADLINE_MS = 120_000;
const [router, store, directory, ...includeDirs] = process.argv.slice(2);
const files = ["lorry/v1/inference_service.proto", "lorry/v1/adapter_service.proto"];
const definition = protoLoader.loadSync(files, {
  includeDirs,
  defaults: true, // what is not on the wire is "" or 0, as in other languages
  longs: String, // a uint64 may be more than a number holds
  oneofs: true, // event.event names the field that is set
});
const { v1 } = grpc.loadPackageDefinition(definition).lorry;
const options = () => ({ deadline: Date.now() + DEADLINE_MS });

const CRC32C = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? (byte >>> 1) ^ 0x82f63b78 : byte >>> 1;
  return byte;
});

function crc32c(data) {
  let crc = ~0;
  for (const byte of data) crc = (crc >>> 8) ^ CRC32C[(crc ^ byte) & 0xff];
  return ~crc >>> 0;
}

function unary(client, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, new grpc.Metadata(), options(), (error, response) =>
      error ? reject(error) : resolve(response));
  });
}

async function upload(adapters, adapterId) {
  const weights = readFileSync(path.join(directory, "adapter_model.safetensors"));
  const { uploadId } = await unary(adapters, "CreateUpload", {
    adapterId,
    configJson: readFileSync(path.join(directory, "adapter_config.json"), "utf8"),
    weightsBytes: weights.length,
    weightsSha256: createHash("sha256").update(weights).digest(),
  });
  return new Promise((resolve, reject) => {
    const call = adapters.UploadAdapter(new grpc.Metadata(), options(), (error, response) =>
      error ? reject(error) : resolve(response));
    call.write({ start: { uploadId, offset: 0 } });
    for (let offset = 0; offset < weights.length; offset += CHUNK_BYTES) {
      const data = weights.subarray(offset, offset + CHUNK_BYTES);
      call.write({ chunk: { offset, data, crc32c: crc32c(data) } });
    }
    call.end();
  });
}

async function streamed(inference, request) {
  let text = "";
  for await (const event of inference.StreamGenerate(request, new grpc.Metadata(), options())) {
    if (event.event === "chunk") text += event.chunk.text;
  }
  return text;
}

async function main() {
  const credentials = grpc.credentials.createInsecure();
  const inference = new v1.InferenceService(router, credentials);
  const adapters = new v1.AdapterService(store, credentials);
  const adapterId = path.basename(directory);
  const { adapter } = await upload(adapters, adapterId);
  console.log(adapter.name);
  const spec = {
    adapter: `adapters/${adapterId}`,
    prompt: "banana>",
    sampling: { temperature: 0 },
    stopping: { maxTokens: 16 },
  };
  console.log((await unary(inference, "Generate", { spec })).text);
  console.log(await streamed(inference, { spec }));
  inference.close();
  adapters.close();
}

main().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
