#include <catch2/catch.hpp>

#include <cstdlib>
#include <cstring>
#include <random>

#include "client/safetensors/safetensors.h"
#include "proto/common/text.h"

using namespace cairn;
using namespace cairn::safetensors;
using format::DType;

namespace {

class MemoryFile : public ByteSource {
 public:
  explicit MemoryFile(std::string bytes) : bytes_(std::move(bytes)) {}
  std::string name() const override { return "m.safetensors"; }
  std::uint64_t size() const override { return bytes_.size(); }
  Result<void> read(std::uint64_t offset, std::span<std::byte> out) override {
    REQUIRE(offset <= bytes_.size());
    REQUIRE(out.size() <= bytes_.size() - offset);
    std::memcpy(out.data(), bytes_.data() + offset, out.size());
    return {};
  }

 private:
  std::string bytes_;
};

std::string length(std::uint64_t value) {
  std::string out;
  for (int i = 0; i < 8; ++i) out += static_cast<char>(value >> (8 * i));
  return out;
}

Result<Header> read(std::string bytes) {
  MemoryFile file(std::move(bytes));
  return read_header(file);
}
Result<Header> read(std::string_view json, std::uint64_t data_bytes) {
  return read(length(json.size()) + std::string(json) + std::string(data_bytes, 'd'));
}

std::string why(std::string_view json, std::uint64_t data_bytes) {
  const auto result = read(json, data_bytes);
  if (result) return "accepted";
  CHECK(result.error().code == Errc::kInvalid);
  CHECK_THAT(result.error().message, Catch::StartsWith("m.safetensors: "));
  return result.error().message;
}

std::string info(std::string_view dtype, std::string_view shape, std::string_view offsets) {
  return R"({"dtype":")" + std::string(dtype) + R"(","shape":)" + std::string(shape) + R"(,"data_offsets":)" +
         std::string(offsets) + "}";
}
std::string one(std::string_view dtype, std::string_view shape, std::string_view offsets) {
  return R"({"x":)" + info(dtype, shape, offsets) + "}";
}

}  // namespace

TEST_CASE("safetensors: files written by the reference implementation are read and written byte for byte", "[client]") {
  for (const std::string& golden : {
           std::string("@\0\0\0\0\0\0\0", 8) + R"({"attn.0":{"dtype":"F32","shape":[1,2,3],"data_offsets":[0,24]}})",
           std::string("H\0\0\0\0\0\0\0", 8) +
               R"({"attn0":{"dtype":"F32","shape":[1,1,2,3],"data_offsets":[0,24]}}       )",
       }) {
    const auto header = read(golden + std::string(24, 'd'));
    REQUIRE(header);
    CHECK(header->tensors.size() == 1);
    CHECK(header->data_offset == golden.size());
    CHECK(header->data_bytes == 24);
    CHECK(*encode_header(*header) == golden);
  }
}

TEST_CASE("safetensors: what is written is read back, with metadata, scalars and empty tensors", "[client]") {
  Header header;
  header.metadata = {{"format", "pt"}, {"z", "caf\xc3\xa9 \"quoted\" \n"}, {"a", ""}};
  header.tensors = {{.name = "scalar", .dtype = DType::kF64, .shape = {}},
                    {.name = "b", .dtype = DType::kBF16, .shape = {3, 5}},
                    {.name = "a\"\\\x01", .dtype = DType::kBF16, .shape = {2}},
                    {.name = "empty", .dtype = DType::kI64, .shape = {4, 0}},
                    {.name = "f4", .dtype = DType::kF4, .shape = {6}},
                    {.name = "flag", .dtype = DType::kBool, .shape = {7}}};
  REQUIRE(lay_out(header));
  // Widest first, by name within one dtype.
  CHECK(header.tensors[0].name == "empty");
  CHECK(header.tensors[1].name == "scalar");
  CHECK(header.tensors[2].name == "a\"\\\x01");
  CHECK(header.tensors[5].name == "flag");
  CHECK(header.data_bytes == 8 + 30 + 4 + 0 + 3 + 7);
  const auto text = *encode_header(header);
  CHECK(text.size() % 8 == 0);
  const auto back = read(text + std::string(header.data_bytes, 'd'));
  REQUIRE(back);
  CHECK(back->tensors == header.tensors);
  CHECK(back->metadata == header.metadata);
  header.tensors.push_back(header.tensors.back());
  CHECK_FALSE(lay_out(header));
  header.tensors = {{.name = "bad\xff", .dtype = DType::kBool, .shape = {1}, .begin = 0, .end = 1}};
  CHECK(encode_header(header).error().code == Errc::kInvalid);
}

TEST_CASE("safetensors: an empty file, one of metadata only, and padding are legal", "[client]") {
  CHECK(read("{}", 0));
  CHECK(read("{}      ", 0));
  CHECK_FALSE(read("{}", 0)->has_metadata);
  CHECK(read(R"({"__metadata__":{}})", 0)->has_metadata);
  CHECK(read(R"({ "__metadata__" : {"a": "b"} }  )", 0)->metadata.size() == 1);
}

TEST_CASE("safetensors: a wrong length, start or end of the header is refused with its reason", "[client]") {
  const auto reason = [](std::string bytes) { return read(std::move(bytes)).error().message; };
  CHECK_THAT(reason("short"), Catch::Contains("HeaderTooSmall"));
  CHECK_THAT(reason(length(0)), Catch::Contains("HeaderTooSmall"));
  CHECK_THAT(reason(length(100'000'001)), Catch::Contains("HeaderTooLarge"));
  CHECK_THAT(reason(length(~0ull)), Catch::Contains("HeaderTooLarge"));
  CHECK_THAT(reason(length(3) + "{}"), Catch::Contains("InvalidHeaderLength"));
  CHECK_THAT(why(" {}", 0), Catch::Contains("InvalidHeaderStart"));
  CHECK_THAT(why("[]", 0), Catch::Contains("InvalidHeaderStart"));
  CHECK_THAT(why("{}\n", 0), Catch::Contains("InvalidHeaderDeserialization"));
  CHECK_THAT(why(std::string("{}\0}", 4), 0), Catch::Contains("NUL"));
  CHECK_THAT(why("{} {}", 0), Catch::Contains("invalid JSON"));
  CHECK_THAT(why("{\"a\":}", 0), Catch::Contains("invalid JSON"));
  CHECK_THAT(why("{\"\xff\":1}", 0), Catch::Contains("invalid JSON or UTF-8"));
}

TEST_CASE("safetensors: duplicate keys are refused wherever they stand", "[client]") {
  const auto x = info("U8", "[1]", "[0,1]");
  CHECK_THAT(why(R"({"x":)" + x + R"(,"x":)" + x + "}", 1), Catch::Contains("duplicate key 'x'"));
  CHECK_THAT(why(R"({"__metadata__":{"a":"1","a":"2"}})", 0), Catch::Contains("duplicate key 'a'"));
  CHECK_THAT(why(R"({"__metadata__":{},"__metadata__":{}})", 0), Catch::Contains("duplicate key '__metadata__'"));
  CHECK_THAT(why(R"({"x":{"dtype":"U8","shape":[1],"dtype":"I8","data_offsets":[0,1]}})", 1),
             Catch::Contains("duplicate key 'dtype'"));
  CHECK_THAT(why(R"({"x":)" + x + R"(,"\u0078":)" + x + "}", 1), Catch::Contains("duplicate key 'x'"));
}

TEST_CASE("safetensors: metadata of anything but text is refused", "[client]") {
  for (const char* bad :
       {R"({"__metadata__":1})", R"({"__metadata__":[]})", R"({"__metadata__":{"a":1}})",
        R"({"__metadata__":{"a":null}})", R"({"__metadata__":{"a":{}}})", R"({"__metadata__":{"a":["b"]}})"})
    CHECK_THAT(why(bad, 0), !Catch::Contains("accepted"));
}

TEST_CASE("safetensors: keys of a tensor that the format does not name are skipped, whatever they hold", "[client]") {
  for (const char* more : {"1", "-1.5", "null", "\"text\"", "[]", "[1,[2,{}]]", R"({"dtype":"F64","shape":[9]})",
                           R"({"data_offsets":[7,8],"deep":[[[[{"a":{"b":1}}]]]]})"}) {
    INFO(more);
    for (const auto& header :
         {R"({"x":{"more":)" + std::string(more) + R"(,"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
          R"({"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"more":)" + std::string(more) + "}}"}) {
      const auto got = read(header, 2);
      REQUIRE(got);
      CHECK(got->tensors ==
            std::vector<TensorInfo>{{.name = "x", .dtype = DType::kU8, .shape = {2}, .begin = 0, .end = 2}});
    }
  }
  const auto with = [](std::string more) {
    return R"({"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2],)" + more + "}}";
  };
  CHECK_THAT(why(with(R"("more":1,"more":2)"), 2), Catch::Contains("duplicate key 'more'"));
  CHECK_THAT(why(with(R"("more":{"a":1,"a":2})"), 2), Catch::Contains("duplicate key 'a'"));
  const auto nested = [&](std::size_t depth) {
    return with("\"more\":" + std::string(depth, '[') + std::string(depth, ']'));
  };
  CHECK(why(nested(30), 2) == "accepted");
  CHECK_THAT(why(nested(31), 2), Catch::Contains("nested too deep"));
}

TEST_CASE("safetensors: a tensor with wrong or missing fields is refused by name", "[client]") {
  CHECK(why(one("U8", "[1]", "[0,1]"), 1) == "accepted");
  for (const std::string& bad : {std::string(R"({"x":{"dtype":"U8","shape":[1]}})"),
                                 std::string(R"({"x":{"shape":[1],"data_offsets":[0,1]}})"),
                                 std::string(R"({"x":{"dtype":"U8","data_offsets":[0,1]}})"),
                                 std::string(R"({"x":{}})"),
                                 std::string(R"({"x":1})"),
                                 std::string(R"({"x":[]})"),
                                 std::string(R"({"x":{"dtype":"U8","shape":[1],"offsets":[0,1],"more":1}})"),
                                 std::string(R"({"x":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}})"),
                                 std::string(R"({"x":{"dtype":8,"shape":[1],"data_offsets":[0,1]}})"),
                                 std::string(R"({"x":{"dtype":"U8","shape":{},"data_offsets":[0,1]}})"),
                                 one("u8", "[1]", "[0,1]"),
                                 one("U8", "1", "[0,1]"),
                                 one("U8", "[-1]", "[0,1]"),
                                 one("U8", "[1.0]", "[0,1]"),
                                 one("U8", "[18446744073709551616]", "[0,1]"),
                                 one("U8", "[[1]]", "[0,1]"),
                                 one("U8", "[\"1\"]", "[0,1]"),
                                 one("U8", "[1]", "[0]"),
                                 one("U8", "[1]", "[0,1,2]"),
                                 one("U8", "[1]", "[]"),
                                 one("U8", "[1]", "[0,1e0]"),
                                 one("U8", "[1]", "0")}) {
    INFO(bad);
    CHECK_THAT(why(bad, 1), Catch::Contains("'x'"));
  }
  std::string many = "[1";
  for (int i = 1; i < 33; ++i) many += ",1";
  CHECK_THAT(why(one("U8", many + "]", "[0,1]"), 1), Catch::Contains("more than 32 dimensions"));
}

TEST_CASE("safetensors: holes, overlaps, trailing and missing bytes are refused: nothing hides in a file", "[client]") {
  const auto two = [](std::string_view a, std::string_view b) {
    return R"({"x":)" + info("U8", "[2]", a) + R"(,"y":)" + info("U8", "[2]", b) + "}";
  };
  CHECK(why(two("[2,4]", "[0,2]"), 4) == "accepted");
  CHECK_THAT(why(two("[0,2]", "[3,5]"), 5), Catch::Contains("'y'") && Catch::Contains("a hole"));
  CHECK_THAT(why(two("[1,3]", "[3,5]"), 5), Catch::Contains("'x'") && Catch::Contains("a hole"));
  CHECK_THAT(why(two("[0,2]", "[1,3]"), 3), Catch::Contains("'y'") && Catch::Contains("an overlap"));
  CHECK_THAT(why(two("[0,2]", "[0,2]"), 2), Catch::Contains("an overlap") && Catch::Contains("InvalidOffset"));
  CHECK_THAT(why(two("[0,2]", "[2,4]"), 5),
             Catch::Contains("MetadataIncompleteBuffer") && Catch::Contains("bytes follow"));
  CHECK_THAT(why(two("[0,2]", "[2,4]"), 3), Catch::Contains("MetadataIncompleteBuffer") && Catch::Contains("missing"));
  CHECK_THAT(why(one("U8", "[0]", "[2,0]"), 2), Catch::Contains("InvalidOffset"));
  CHECK_THAT(why(one("U8", "[3]", "[0,2]"), 2), Catch::Contains("TensorInvalidInfo"));
  CHECK_THAT(why(one("U8", "[0]", "[0,2]"), 2), Catch::Contains("TensorInvalidInfo"));
  // A zero-size tensor may stand anywhere between two others.
  CHECK(read(R"({"e":)" + info("U8", "[0]", "[2,2]") + R"(,"x":)" + info("U8", "[2]", "[0,2]") + R"(,"y":)" +
                 info("U8", "[2]", "[2,4]") + "}",
             4));
}

TEST_CASE("safetensors: sizes that overflow or are not whole bytes are refused", "[client]") {
  CHECK_THAT(why(one("U8", "[4294967296,4294967296]", "[0,0]"), 0), Catch::Contains("ValidationOverflow"));
  CHECK_THAT(why(one("F64", "[288230376151711744]", "[0,0]"), 0), Catch::Contains("ValidationOverflow"));
  CHECK_THAT(why(one("F4", "[3]", "[0,1]"), 1), Catch::Contains("MisalignedSlice"));
  CHECK_THAT(why(one("F6_E2M3", "[2]", "[0,1]"), 1), Catch::Contains("MisalignedSlice"));
  CHECK(why(one("F6_E2M3", "[4]", "[0,3]"), 3) == "accepted");
  CHECK(why(one("F4", "[2]", "[0,1]"), 1) == "accepted");
}

TEST_CASE("safetensors: control bytes of a name, and bytes that are not UTF-8, never reach a message", "[client]") {
  CHECK(valid_utf8(why("{\"\xff\xfe\":1}", 0)));
  CHECK(valid_utf8(why("{\"a\":1\xff}", 0)));
  CHECK(valid_utf8(parse_index("i\xff", "{\"weight_map\":{\"a\":\"\xff\"}}").error().message));
  const auto message = why(R"({"\u001b[31m\n":1})", 0);
  CHECK(message.find('\x1b') == message.npos);
  CHECK(message.find('\n') == message.npos);
}

TEST_CASE("safetensors: deep nesting is refused without being followed", "[client]") {
  std::string deep = R"({"x":)";
  for (int i = 0; i < 100'000; ++i) deep += "[";
  for (int i = 0; i < 100'000; ++i) deep += "]";
  CHECK_THAT(why(deep + "}", 0), Catch::Contains("'x'"));
}

TEST_CASE("safetensors: 30,000 tensors are read", "[client]") {
  Header header;
  for (int i = 0; i < 30'000; ++i)
    header.tensors.push_back(
        {.name = "model.layers." + std::to_string(i) + ".weight", .dtype = DType::kU8, .shape = {2, 2}});
  REQUIRE(lay_out(header));
  const auto back = read(*encode_header(header) + std::string(header.data_bytes, 'd'));
  REQUIRE(back);
  CHECK(back->tensors == header.tensors);
}

TEST_CASE("safetensors: damaged headers are refused or mean what they say, never a crash", "[client]") {
  const char* given = std::getenv("CAIRN_TEST_SEED");
  const auto seed = given ? std::strtoull(given, nullptr, 10) : 7;
  INFO("CAIRN_TEST_SEED=" << seed);
  std::mt19937_64 random(seed);
  Header header;
  header.metadata = {{"format", "pt"}};
  header.tensors = {{.name = "a", .dtype = DType::kF32, .shape = {2, 3}},
                    {.name = "b", .dtype = DType::kU8, .shape = {}}};
  REQUIRE(lay_out(header));
  const auto good = *encode_header(header) + std::string(header.data_bytes, 'd');
  for (int round = 0; round < 20'000; ++round) {
    auto bad = good;
    for (auto n = random() % 3 + 1; n-- > 0;) {
      const auto at = random() % bad.size();
      switch (random() % 3) {
        case 0:
          bad[at] = static_cast<char>(random());
          break;
        case 1:
          bad.erase(at, random() % 4);
          break;
        default:
          bad.insert(at, bad, random() % bad.size(), random() % 9);
      }
    }
    const auto result = read(bad);
    if (!result) continue;
    std::uint64_t next = 0;
    for (const auto& tensor : result->tensors) {
      REQUIRE(tensor.begin == next);
      next = tensor.end;
    }
    REQUIRE(result->data_offset + next == bad.size());
  }
}

TEST_CASE("safetensors: the index of a sharded folder is read, and written back equal", "[client]") {
  const auto index = parse_index(
      "i",
      R"({"metadata":{"total_size":12,"more":[1,{"a":2}]},"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}})");
  REQUIRE(index);
  CHECK(index->total_size == 12);
  CHECK(index->weight_map.at("b") == "m-2.safetensors");
  CHECK(parse_index("i", encode_index(*index))->weight_map == index->weight_map);
  CHECK(parse_index("i", encode_index(*index))->total_size == 12);
  for (const char* no_total : {R"({"weight_map":{}})", R"({"metadata":{},"weight_map":{}})",
                               R"({"metadata":{"total_size":1.5},"weight_map":{}})"})
    CHECK_FALSE(parse_index("i", no_total)->total_size);
  for (const char* bad :
       {R"({})", R"([])", R"({"weight_map":[]})", R"({"weight_map":{"a":1}})", R"({"weight_map":{"a":"x","a":"y"}})",
        R"({"weight_map":{"a":"../x"}})", R"({"weight_map":{"a":".."}})", R"({"weight_map":{"a":""}})",
        R"({"weight_map":{"a":"/etc/x"}})", R"({"weight_map":{"a":"x\u0000"}})", R"({"weight_map":{}} x)"}) {
    INFO(bad);
    CHECK(parse_index("i", bad).error().code == Errc::kInvalid);
  }
}
