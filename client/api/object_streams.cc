#include <algorithm>
#include <deque>

#include "client/api/handles.h"
#include "client/core/object_writer.h"
#include "proto/common/checksum.h"

// Bytes of objects, in and out.

namespace cairn {

struct ObjectWriterImpl {
  std::shared_ptr<ClientImpl> client;
  std::shared_ptr<client::ObjectWriter> writer;
  ObjectWriterImpl(std::shared_ptr<ClientImpl> c, std::shared_ptr<client::ObjectWriter> w)
      : client(std::move(c)), writer(std::move(w)) {}
  ObjectWriterImpl(const ObjectWriterImpl&) = delete;
  ~ObjectWriterImpl() {
    client->loop().post([w = std::move(writer)]() mutable { client::ObjectWriter::give_up(std::move(w)); });
  }
};

struct ObjectReaderImpl {
  std::shared_ptr<ClientImpl> client;
  std::string bucket;
  std::shared_ptr<const client::OpenedObject> object;
  ObjectInfo info;
  ~ObjectReaderImpl() { client->release(std::move(object)); }
};

namespace {

constexpr std::uint64_t kStreamBytes = 4 * kMiB;  // one step of put_stream and of a reader's stream
constexpr std::size_t kStreamAhead = 4;           // steps of a reader on their way

Result<client::PutTerms> terms_of(const PutOptions& options) {
  client::PutTerms terms{.if_absent = options.if_absent, .size_bytes = options.size_bytes};
  if (options.if_absent && !options.if_version.empty())
    return fail(Errc::kInvalid, "put: if_absent and if_version exclude each other");
  if (!options.if_version.empty()) {
    TRY(terms.if_version, owner_of_text("version", options.if_version));
  }
  return terms;
}

Task<std::shared_ptr<client::ObjectWriter>> begin(ClientImpl* impl, std::string bucket, std::string key,
                                                  PutOptions options) {
  CO_TRY(const auto terms, terms_of(options));
  co_return co_await client::ObjectWriter::begin(impl->session_, *impl->arena_, std::move(bucket), std::move(key),
                                                 terms, {impl->options_.chunks_in_flight, impl->timeout(), {}});
}

Task<client::ObjectSummary> put_all(ClientImpl* impl, std::string bucket, std::string key,
                                    std::span<const std::byte> bytes, PutOptions options) {
  options.size_bytes = bytes.size();
  CO_TRY(auto writer, co_await begin(impl, std::move(bucket), std::move(key), std::move(options)));
  auto written = co_await writer->write(bytes);
  auto sealed = written ? co_await writer->seal() : Result<client::ObjectSummary>(fail(std::move(written).error()));
  client::ObjectWriter::give_up(std::move(writer));
  co_return std::move(sealed);
}

Error wrong_crc(const std::string& bucket, const client::ObjectSummary& object) {
  return {Errc::kDataLoss, "cairn://" + bucket + "/" + object.key +
                               ": every block matches its CRC, but the whole does not match the object's"};
}

Task<std::vector<std::byte>> get_all(ClientImpl* impl, std::string bucket, std::string key) {
  CO_TRY(auto opened, co_await client::open_object(impl->session_, bucket, std::move(key), impl->deadline()));
  auto object = std::make_shared<const client::OpenedObject>(std::move(opened));
  std::vector<std::byte> out(object->summary.size);
  CO_CHECK_OK(co_await client::read_object(impl->session_, bucket, object, 0, out, impl->timeout()));
  if (crc32c(std::span<const std::byte>(out)) != object->summary.crc)
    co_return fail(wrong_crc(bucket, object->summary));
  co_return out;
}

Task<std::size_t> read_some(ClientImpl* impl, std::string bucket, std::shared_ptr<const client::OpenedObject> object,
                            std::uint64_t offset, std::span<std::byte> out) {
  const auto size = object->summary.size;
  if (offset > size)
    co_return fail(Errc::kInvalid, "cairn://" + bucket + "/" + object->summary.key + ": offset " +
                                       std::to_string(offset) + " is beyond its " + std::to_string(size) + " bytes");
  const auto part = out.first(std::min<std::uint64_t>(out.size(), size - offset));
  CO_CHECK_OK(co_await client::read_object(impl->session_, std::move(bucket), object, offset, part, impl->timeout()));
  co_return part.size();
}

}  // namespace

// ---- Writing

Future<ObjectInfo> Client::put_async(std::string bucket, std::string key, std::span<const std::byte> bytes,
                                     PutOptions options) {
  auto put = impl_->async<client::ObjectSummary>(
      [impl = impl_.get(), bucket, key, bytes, options] { return put_all(impl, bucket, key, bytes, options); }, false);
  return convert<ObjectInfo>(put, [](client::ObjectSummary s) -> Result<ObjectInfo> { return from_core(s); });
}
Result<ObjectInfo> Client::put(std::string bucket, std::string key, std::span<const std::byte> bytes,
                               PutOptions options) {
  if (impl_->on_loop_thread()) return fail(Errc::kInvalid, "put inside a callback: use put_async");
  return put_async(std::move(bucket), std::move(key), bytes, std::move(options)).get();
}

Future<ObjectWriter> Client::create_object_async(std::string bucket, std::string key, PutOptions options) {
  auto begun = impl_->async<std::shared_ptr<client::ObjectWriter>>(
      [impl = impl_.get(), bucket, key, options] { return begin(impl, bucket, key, options); });
  return convert<ObjectWriter>(begun,
                               [impl = impl_](std::shared_ptr<client::ObjectWriter> core) -> Result<ObjectWriter> {
                                 ObjectWriter writer;
                                 writer.impl_ = std::make_shared<ObjectWriterImpl>(impl, std::move(core));
                                 return writer;
                               });
}
Result<ObjectWriter> Client::create_object(std::string bucket, std::string key, PutOptions options) {
  if (impl_->on_loop_thread()) return fail(Errc::kInvalid, "create_object inside a callback: use the _async form");
  return create_object_async(std::move(bucket), std::move(key), std::move(options)).get();
}

Future<void> ObjectWriter::write_async(std::span<const std::byte> bytes) {
  return impl_->client->async<void>([writer = impl_->writer, bytes] { return writer->write(bytes); }, false);
}
Result<void> ObjectWriter::write(std::span<const std::byte> bytes) {
  return impl_->client->call<void>([writer = impl_->writer, bytes] { return writer->write(bytes); }, false);
}
Future<ObjectInfo> ObjectWriter::finish_async() {
  auto sealed = impl_->client->async<client::ObjectSummary>([writer = impl_->writer] { return writer->seal(); });
  return convert<ObjectInfo>(sealed, [](client::ObjectSummary s) -> Result<ObjectInfo> { return from_core(s); });
}
Result<ObjectInfo> ObjectWriter::finish() {
  TRY(const auto sealed,
      impl_->client->call<client::ObjectSummary>([writer = impl_->writer] { return writer->seal(); }));
  return from_core(sealed);
}
Future<void> ObjectWriter::abort_async() {
  return impl_->client->async<void>(
      [client = impl_->client.get(), writer = impl_->writer] { return writer->abort(client->deadline()); });
}
Result<void> ObjectWriter::abort() {
  return impl_->client->call<void>(
      [client = impl_->client.get(), writer = impl_->writer] { return writer->abort(client->deadline()); });
}

Result<ObjectInfo> Client::put_stream(std::string bucket, std::string key,
                                      std::function<Result<std::size_t>(std::span<std::byte>)> read,
                                      PutOptions options) {
  TRY(auto writer, create_object(std::move(bucket), std::move(key), std::move(options)));
  const auto all = [&]() -> Result<ObjectInfo> {
    std::vector<std::byte> piece(kStreamBytes);
    for (bool end = false; !end;) {
      std::size_t filled = 0;
      while (filled < piece.size() && !end) {
        TRY(const auto size, read(std::span(piece).subspan(filled)));
        if (size > piece.size() - filled)
          return fail(Errc::kInvalid, "put_stream: `read` returned more than it was given room for");
        filled += size;
        end = size == 0;
      }
      if (filled > 0) CHECK_OK(writer.write(std::span<const std::byte>(piece).first(filled)));
    }
    return writer.finish();
  };
  auto info = all();
  // Best effort: without it the daemon drops the upload when it has been idle for long.
  if (!info) (void)writer.abort();
  return info;
}

// ---- Reading

Future<std::vector<std::byte>> Client::get_async(std::string bucket, std::string key) {
  return impl_->async<std::vector<std::byte>>([impl = impl_.get(), bucket, key] { return get_all(impl, bucket, key); });
}
Result<std::vector<std::byte>> Client::get(std::string bucket, std::string key) {
  if (impl_->on_loop_thread()) return fail(Errc::kInvalid, "get inside a callback: use get_async");
  return get_async(std::move(bucket), std::move(key)).get();
}

Future<ObjectReader> Client::open_object_async(std::string bucket, std::string key) {
  auto opened = impl_->async<client::OpenedObject>(
      [impl = impl_.get(), bucket, key] { return client::open_object(impl->session_, bucket, key, impl->deadline()); });
  return convert<ObjectReader>(opened, [impl = impl_, bucket](client::OpenedObject object) -> Result<ObjectReader> {
    ObjectReader reader;
    auto info = from_core(object.summary);
    reader.impl_ = std::make_shared<ObjectReaderImpl>(ObjectReaderImpl{
        impl, bucket, std::make_shared<const client::OpenedObject>(std::move(object)), std::move(info)});
    return reader;
  });
}
Result<ObjectReader> Client::open_object(std::string bucket, std::string key) {
  if (impl_->on_loop_thread()) return fail(Errc::kInvalid, "open_object inside a callback: use the _async form");
  return open_object_async(std::move(bucket), std::move(key)).get();
}

const ObjectInfo& ObjectReader::info() const {
  return impl_->info;
}
Future<std::size_t> ObjectReader::read_async(std::uint64_t offset, std::span<std::byte> out) {
  return impl_->client->async<std::size_t>([client = impl_->client.get(), bucket = impl_->bucket,
                                            object = impl_->object, offset,
                                            out] { return read_some(client, bucket, object, offset, out); });
}
Result<std::size_t> ObjectReader::read(std::uint64_t offset, std::span<std::byte> out) {
  if (impl_->client->on_loop_thread()) return fail(Errc::kInvalid, "read inside a callback: use read_async");
  return read_async(offset, out).get();
}

Result<void> ObjectReader::stream(std::uint64_t first, std::uint64_t last,
                                  std::function<Result<void>(std::span<const std::byte>)> write) {
  if (impl_->client->on_loop_thread()) return fail(Errc::kInvalid, "stream inside a callback: use read_async");
  const auto size = impl_->info.size_bytes;
  if (last == npos) last = std::max(first, size);
  if (first > last || last > size)
    return fail(Errc::kInvalid, "cairn://" + impl_->bucket + "/" + impl_->info.key + ": range " +
                                    std::to_string(first) + "-" + std::to_string(last) + " is outside its " +
                                    std::to_string(size) + " bytes");
  const bool whole = first == 0 && last == size;
  struct Piece {
    std::vector<std::byte> bytes;
    Future<std::size_t> done;
  };
  struct Ahead : std::deque<Piece> {
    // Nobody may write into a piece that is gone.
    ~Ahead() {
      for (auto& piece : *this) piece.done.cancel();
      for (auto& piece : *this) (void)piece.done.get();
    }
  } ahead;
  std::uint32_t crc = 0;
  for (auto next = first; next < last || !ahead.empty();) {
    while (next < last && ahead.size() < kStreamAhead) {
      std::vector<std::byte> bytes(std::min(kStreamBytes, last - next));
      const std::span<std::byte> into(bytes);
      ahead.push_back({std::move(bytes), read_async(next, into)});
      next += into.size();
    }
    auto done = ahead.front().done.get();
    const auto piece = std::move(ahead.front().bytes);
    ahead.pop_front();
    CHECK_OK(std::move(done));
    if (whole) crc = crc32c(std::span<const std::byte>(piece), crc);
    if (whole && next == last && ahead.empty() && crc != impl_->info.crc32c)
      return fail(wrong_crc(impl_->bucket, impl_->object->summary));
    CHECK_OK(write(piece));
  }
  return {};
}

Result<ObjectInfo> Client::get_stream(std::string bucket, std::string key, std::uint64_t first, std::uint64_t last,
                                      std::function<Result<void>(std::span<const std::byte>)> write) {
  TRY(auto reader, open_object(std::move(bucket), std::move(key)));
  CHECK_OK(reader.stream(first, last, std::move(write)));
  return reader.info();
}

}  // namespace cairn
