// A client made from the protos alone: client ROUTER STORE ADAPTER_DIRECTORY uploads the adapter
// under its directory's name and asks it once with Generate, once with StreamGenerate.
#include <grpcpp/grpcpp.h>
#include <openssl/sha.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>

#include "lorry/v1/adapter_service.grpc.pb.h"
#include "lorry/v1/inference_service.grpc.pb.h"

namespace {

constexpr size_t kChunkBytes = 1 << 20;
constexpr auto kDeadline = std::chrono::seconds(120);

void Check(const grpc::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.error_message());
}

std::unique_ptr<grpc::ClientContext> NewContext() {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(std::chrono::system_clock::now() + kDeadline);
  return context;
}

std::string ReadFile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string Sha256(const std::string& data) {
  std::string digest(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(data.data()), data.size(),
         reinterpret_cast<unsigned char*>(digest.data()));
  return digest;
}

uint32_t Crc32c(const std::string& data) {
  uint32_t crc = ~0u;
  for (unsigned char byte : data) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? (crc >> 1) ^ 0x82f63b78u : crc >> 1;
  }
  return ~crc;
}

std::string CreateUpload(lorry::v1::AdapterService::Stub& adapters, const std::string& adapter_id,
                         const std::string& config, const std::string& weights) {
  lorry::v1::CreateUploadRequest request;
  request.set_adapter_id(adapter_id);
  request.set_config_json(config);
  request.set_weights_bytes(weights.size());
  request.set_weights_sha256(Sha256(weights));
  lorry::v1::CreateUploadResponse response;
  Check(adapters.CreateUpload(NewContext().get(), request, &response));
  return response.upload_id();
}

std::string SendWeights(lorry::v1::AdapterService::Stub& adapters, const std::string& upload_id,
                        const std::string& weights) {
  auto context = NewContext();
  lorry::v1::UploadAdapterResponse response;
  auto writer = adapters.UploadAdapter(context.get(), &response);
  lorry::v1::UploadAdapterRequest start;
  start.mutable_start()->set_upload_id(upload_id);
  bool writing = writer->Write(start);
  for (size_t offset = 0; writing && offset < weights.size(); offset += kChunkBytes) {
    lorry::v1::UploadAdapterRequest request;
    auto* chunk = request.mutable_chunk();
    chunk->set_offset(offset);
    chunk->set_data(weights.substr(offset, kChunkBytes));
    chunk->set_crc32c(Crc32c(chunk->data()));
    writing = writer->Write(request);
  }
  writer->WritesDone();
  Check(writer->Finish());
  return response.adapter().name();
}

lorry::v1::GenerationSpec Question(const std::string& adapter_id) {
  lorry::v1::GenerationSpec spec;
  spec.set_adapter("adapters/" + adapter_id);
  spec.set_prompt("banana>");
  spec.mutable_sampling()->set_temperature(0);
  spec.mutable_stopping()->set_max_tokens(16);
  return spec;
}

std::string Generate(lorry::v1::InferenceService::Stub& inference,
                     const lorry::v1::GenerationSpec& spec) {
  lorry::v1::GenerateRequest request;
  *request.mutable_spec() = spec;
  lorry::v1::GenerateResponse response;
  Check(inference.Generate(NewContext().get(), request, &response));
  return response.text();
}

std::string StreamGenerate(lorry::v1::InferenceService::Stub& inference,
                           const lorry::v1::GenerationSpec& spec) {
  auto context = NewContext();
  lorry::v1::StreamGenerateRequest request;
  *request.mutable_spec() = spec;
  auto reader = inference.StreamGenerate(context.get(), request);
  std::string text;
  for (lorry::v1::StreamGenerateResponse event; reader->Read(&event);) {
    if (event.has_chunk()) text += event.chunk().text();
  }
  Check(reader->Finish());
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: client ROUTER STORE ADAPTER_DIRECTORY\n";
    return 2;
  }
  const std::filesystem::path directory = argv[3];
  const std::string adapter_id = directory.filename();
  const auto credentials = grpc::InsecureChannelCredentials();
  auto inference = lorry::v1::InferenceService::NewStub(grpc::CreateChannel(argv[1], credentials));
  auto adapters = lorry::v1::AdapterService::NewStub(grpc::CreateChannel(argv[2], credentials));
  try {
    const std::string weights = ReadFile(directory / "adapter_model.safetensors");
    const std::string config = ReadFile(directory / "adapter_config.json");
    const std::string upload_id = CreateUpload(*adapters, adapter_id, config, weights);
    std::cout << SendWeights(*adapters, upload_id, weights) << '\n';
    std::cout << Generate(*inference, Question(adapter_id)) << '\n';
    std::cout << StreamGenerate(*inference, Question(adapter_id)) << '\n';
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
