// Runs a file of this bundle by ONNX Runtime's C++ API; images are binary PGM or PPM files of the file's size.
//
//   g++ -std=c++17 -O2 run.cpp -I ONNXRUNTIME/include -L ONNXRUNTIME/lib -lonnxruntime -o run
//   ./run model.onnx sample/input.ppm                    (stereo: sample/left.ppm sample/right.ppm)
//   ./run model.tower.onnx sample/input.ppm              (attribute retrieval; runs model.head.onnx too)
//
// The metadata in the file say how pixels are prepared: x = (pixel / 255 * (high - low) + low - mean) / std.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

struct Image {
  int64_t height = 0, width = 0, channels = 0;
  std::vector<uint8_t> pixels;  // (H, W, C)
};

Image read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int most = 0;
  Image image;
  file >> kind >> image.width >> image.height >> most;
  file.get();
  if (!file || (kind != "P5" && kind != "P6") || most != 255) throw std::runtime_error("no 8-bit PGM or PPM: " + path);
  image.channels = kind == "P6" ? 3 : 1;
  image.pixels.assign(std::istreambuf_iterator<char>(file), {});
  if (int64_t(image.pixels.size()) != image.height * image.width * image.channels) {
    throw std::runtime_error("cut short: " + path);
  }
  return image;
}

// A metadata entry as text; empty if the file has none.
std::string entry(const Ort::Session& session, const char* key) {
  Ort::AllocatorWithDefaultOptions allocator;
  auto metadata = session.GetModelMetadata();
  auto text = metadata.LookupCustomMetadataMapAllocated(key, allocator);
  return text ? text.get() : "";
}

// A list of numbers, such as [0.485, 0.456, 0.406].
std::vector<float> numbers(const std::string& text, std::vector<float> otherwise) {
  if (text.empty()) return otherwise;
  std::vector<float> found;
  const char* place = text.c_str();
  while (*place) {
    char* end = nullptr;
    float value = std::strtof(place, &end);
    if (end == place) {
      ++place;
    } else {
      found.push_back(value);
      place = end;
    }
  }
  return found;
}

// Number of strings in a list such as ["colour", "kind"].
int64_t count_strings(const std::string& list) {
  int64_t quotes = 0;
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i] == '\\') {
      ++i;  // what it escapes is part of a string
    } else if (list[i] == '"') {
      ++quotes;
    }
  }
  return quotes / 2;
}

// Tokens of an image -> embeddings for all attributes, by the head that belongs to the tower.
std::vector<Ort::Value> embed(Ort::Env& env, const Ort::Session& tower, std::string path, const Ort::Value& tokens) {
  const size_t place = path.rfind(".tower.");
  if (place == std::string::npos) throw std::runtime_error("no name of a tower: " + path);
  Ort::Session head(env, path.replace(place, 7, ".head.").c_str(), Ort::SessionOptions());
  if (entry(head, "pair") != entry(tower, "pair")) throw std::runtime_error("of another model: " + path);
  std::vector<int64_t> ids(count_strings(entry(tower, "attributes")));
  std::iota(ids.begin(), ids.end(), 0);
  const int64_t count = ids.size();
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Ort::IoBinding binding(head);
  binding.BindInput("tokens", tokens);
  binding.BindInput("conditions", Ort::Value::CreateTensor<int64_t>(memory, ids.data(), ids.size(), &count, 1));
  binding.BindOutput("embeddings", memory);
  head.Run(Ort::RunOptions(), binding);
  return binding.GetOutputValues();
}

int main(int argc, char** argv) try {
  if (argc < 3) throw std::runtime_error("usage: run MODEL.onnx IMAGE.ppm [IMAGE.ppm]");
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "run");
  Ort::Session session(env, argv[1], Ort::SessionOptions());
  const bool bytes = entry(session, "input_type") == "uint8";
  const auto range = numbers(entry(session, "input_range"), {0, 1});

  Ort::AllocatorWithDefaultOptions allocator;
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const size_t count = session.GetInputCount();
  if (size_t(argc - 2) != count) throw std::runtime_error("give as many images as the file has inputs");
  std::vector<Image> images;
  std::vector<std::vector<float>> values(count);
  std::vector<Ort::Value> inputs;
  std::vector<Ort::AllocatedStringPtr> names;
  std::vector<const char*> input_names;
  for (size_t i = 0; i < count; ++i) images.push_back(read_image(argv[2 + i]));
  for (size_t i = 0; i < count; ++i) {
    Image& image = images[i];
    const int64_t channels = image.channels, pixels = image.height * image.width;
    const auto mean = numbers(entry(session, "mean"), std::vector<float>(channels, 0));
    const auto std = numbers(entry(session, "std"), std::vector<float>(channels, 1));
    names.push_back(session.GetInputNameAllocated(i, allocator));
    input_names.push_back(names.back().get());
    if (bytes) {
      const int64_t shape[] = {1, image.height, image.width, channels};
      inputs.push_back(
          Ort::Value::CreateTensor<uint8_t>(memory, image.pixels.data(), image.pixels.size(), shape, 4));
      continue;
    }
    values[i].resize(image.pixels.size());
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = 0; p < pixels; ++p) {
        const float unit = image.pixels[p * channels + c] / 255.0f;
        values[i][c * pixels + p] = (unit * (range[1] - range[0]) + range[0] - mean.at(c)) / std.at(c);
      }
    }
    const int64_t shape[] = {1, channels, image.height, image.width};
    inputs.push_back(Ort::Value::CreateTensor<float>(memory, values[i].data(), values[i].size(), shape, 4));
  }
  auto output_name = session.GetOutputNameAllocated(0, allocator);
  const char* output_names[] = {output_name.get()};
  auto outputs = session.Run(Ort::RunOptions(), input_names.data(), inputs.data(), count, output_names, 1);
  const bool pair = !entry(session, "pair").empty();
  if (pair) outputs = embed(env, session, argv[1], outputs[0]);

  const auto info = outputs[0].GetTensorTypeAndShapeInfo();
  const size_t size = info.GetElementCount();
  std::printf("%s", pair ? "embeddings" : output_name.get());
  for (int64_t side : info.GetShape()) std::printf(" %lld", static_cast<long long>(side));
  double sum = 0;
  const bool bytes_out = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  for (size_t i = 0; i < size; ++i) {
    sum += bytes_out ? outputs[0].GetTensorData<uint8_t>()[i] : outputs[0].GetTensorData<float>()[i];
  }
  std::printf(", mean %.6f\n", sum / size);
  if (entry(session, "task") == "classify" && entry(session, "num_classes") != "0") {
    const float* scores = outputs[0].GetTensorData<float>();
    std::printf("class %td\n", std::max_element(scores, scores + size) - scores);
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "run: %s\n", error.what());
  return 1;
}
