#include <algorithm>

#include "client/api/handles.h"

namespace cairn {
namespace {

constexpr std::uint64_t kStreamBytes = 4 * kMiB;  // one step of put_stream and get_stream

BucketInfo from_core(const client::BucketSummary& b) {
  return {b.name, b.copies, b.quota_bytes, b.created_unix_nanos, b.keep_last, b.keep_every, b.keep_days};
}

ObjectInfo from_core(const client::ObjectSummary& s) {
  return {s.key, s.size, s.crc, s.created_unix_nanos};
}

Task<client::ObjectSummary> put_all(ClientImpl* impl, std::string bucket, std::string key,
                                    std::span<const std::byte> bytes, bool if_absent) {
  CO_TRY(auto writer,
         co_await client::ObjectWriter::begin(impl->session_, *impl->arena_, std::move(bucket), std::move(key),
                                              if_absent, {impl->options_.chunks_in_flight, impl->timeout()}));
  writer->expect(bytes.size());
  CO_CHECK_OK(co_await writer->write(bytes));
  co_return co_await writer->seal();
}

Task<std::vector<std::byte>> get_all(ClientImpl* impl, std::string bucket, std::string key) {
  CO_TRY(auto opened, co_await client::open_object(impl->session_, bucket, std::move(key), impl->deadline()));
  auto object = std::make_shared<const client::OpenedObject>(std::move(opened));
  std::vector<std::byte> out(object->summary.size);
  CO_CHECK_OK(co_await client::read_object(impl->session_, bucket, object, 0, out, impl->timeout()));
  co_return out;
}

}  // namespace

Result<Client> Client::connect(ClientOptions options) {
  Client client;
  TRY(client.impl_, ClientImpl::start(std::move(options)));
  return client;
}

std::string Client::description() const {
  return impl_
      ->call<std::string>([impl = impl_.get()] {
        return [](std::string text) -> Task<std::string> { co_return text; }(impl->session_->description());
      })
      .value_or("");
}

Result<void> Client::create_bucket(BucketOptions options) {
  return impl_->call<void>([impl = impl_.get(), options] {
    return client::create_bucket(impl->session_,
                                 {options.name, options.copies, options.quota_bytes, 0, options.keep_last,
                                  options.keep_every, options.keep_days},
                                 impl->deadline());
  });
}
Result<BucketInfo> Client::bucket(std::string name) {
  TRY(auto found, impl_->call<client::BucketSummary>([impl = impl_.get(), name] {
    return client::show_bucket(impl->session_, name, impl->deadline());
  }));
  return from_core(found);
}
Result<BucketInfo> Client::set_bucket(std::string name, BucketChange change) {
  TRY(auto found, impl_->call<client::BucketSummary>([impl = impl_.get(), name, change] {
    return client::set_bucket(impl->session_, name, {change.keep_last, change.keep_every, change.keep_days},
                              impl->deadline());
  }));
  return from_core(found);
}
Result<std::vector<BucketInfo>> Client::buckets() {
  TRY(auto found, impl_->call<std::vector<client::BucketSummary>>(
                      [impl = impl_.get()] { return client::list_buckets(impl->session_, impl->deadline()); }));
  std::vector<BucketInfo> out;
  for (const auto& b : found) out.push_back(from_core(b));
  return out;
}
Result<void> Client::remove_bucket(std::string name) {
  return impl_->call<void>(
      [impl = impl_.get(), name] { return client::remove_bucket(impl->session_, name, impl->deadline()); });
}

Future<ObjectInfo> Client::put_async(std::string bucket, std::string key, std::span<const std::byte> bytes,
                                     PutOptions options) {
  auto put =
      impl_->async<client::ObjectSummary>([impl = impl_.get(), bucket, key, bytes,
                                           options] { return put_all(impl, bucket, key, bytes, options.if_absent); },
                                          false);
  return convert<ObjectInfo>(put, [](client::ObjectSummary s) -> Result<ObjectInfo> { return from_core(s); });
}
Result<ObjectInfo> Client::put(std::string bucket, std::string key, std::span<const std::byte> bytes,
                               PutOptions options) {
  if (impl_->on_loop_thread()) return fail(Errc::kInvalid, "put inside a callback: use put_async");
  return put_async(std::move(bucket), std::move(key), bytes, options).get();
}

Result<ObjectInfo> Client::put_stream(std::string bucket, std::string key,
                                      std::function<Result<std::size_t>(std::span<std::byte>)> read,
                                      PutOptions options) {
  auto* impl = impl_.get();
  using Writer = std::shared_ptr<client::ObjectWriter>;
  TRY(Writer writer, impl->call<Writer>([impl, bucket, key, options] {
    return client::ObjectWriter::begin(impl->session_, *impl->arena_, bucket, key, options.if_absent,
                                       {impl->options_.chunks_in_flight, impl->timeout()});
  }));
  // Whatever happens, the writer goes home on the loop.
  struct Home {
    ClientImpl* impl;
    Writer* writer;
    ~Home() { impl->release(std::move(*writer)); }
  } home{impl, &writer};
  std::vector<std::byte> piece(kStreamBytes);
  for (;;) {
    std::size_t filled = 0;
    bool end = false;
    while (filled < piece.size() && !end) {
      TRY(const auto size, read(std::span(piece).subspan(filled)));
      if (size > piece.size() - filled)
        return fail(Errc::kInvalid, "put_stream: `read` returned more than it was given room for");
      filled += size;
      end = size == 0;
    }
    if (filled > 0)
      CHECK_OK(impl->call<void>(
          [writer, bytes = std::span<const std::byte>(piece).first(filled)] { return writer->write(bytes); }, false));
    if (end) break;
  }
  TRY(auto sealed, impl->call<client::ObjectSummary>([writer] { return writer->seal(); }));
  return from_core(sealed);
}

Future<std::vector<std::byte>> Client::get_async(std::string bucket, std::string key) {
  return impl_->async<std::vector<std::byte>>([impl = impl_.get(), bucket, key] { return get_all(impl, bucket, key); });
}
Result<std::vector<std::byte>> Client::get(std::string bucket, std::string key) {
  if (impl_->on_loop_thread()) return fail(Errc::kInvalid, "get inside a callback: use get_async");
  return get_async(std::move(bucket), std::move(key)).get();
}

Result<ObjectInfo> Client::get_stream(std::string bucket, std::string key, std::uint64_t first, std::uint64_t last,
                                      std::function<Result<void>(std::span<const std::byte>)> write) {
  auto* impl = impl_.get();
  TRY(auto opened, impl->call<client::OpenedObject>([impl, bucket, key] {
    return client::open_object(impl->session_, bucket, key, impl->deadline());
  }));
  auto object = std::make_shared<const client::OpenedObject>(std::move(opened));
  // Whatever happens, it goes home on the loop.
  struct ObjectHome {
    ClientImpl* impl;
    std::shared_ptr<const client::OpenedObject>* object;
    ~ObjectHome() { impl->release(std::move(*object)); }
  } home{impl, &object};
  const auto size = object->summary.size;
  if (last == npos) last = size;
  if (first > last || last > size)
    return fail(Errc::kInvalid, "cairn://" + bucket + "/" + key + ": range " + std::to_string(first) + "-" +
                                    std::to_string(last) + " is outside its " + std::to_string(size) + " bytes");
  std::vector<std::byte> piece(std::min(kStreamBytes, last - first));
  while (first < last) {
    const auto part = std::span(piece).first(std::min<std::uint64_t>(piece.size(), last - first));
    CHECK_OK(impl->call<void>([impl, bucket, object, first, part] {
      return client::read_object(impl->session_, bucket, object, first, part, impl->timeout());
    }));
    CHECK_OK(write(part));
    first += part.size();
  }
  return from_core(object->summary);
}

Result<ObjectInfo> Client::stat(std::string bucket, std::string key) {
  TRY(auto opened, impl_->call<client::OpenedObject>([impl = impl_.get(), bucket, key] {
    return client::stat_object(impl->session_, bucket, key, impl->deadline());
  }));
  return from_core(opened.summary);
}
Result<Page<ObjectInfo>> Client::list(std::string bucket, std::string prefix, std::string after, std::uint32_t limit) {
  TRY(auto page, impl_->call<client::ObjectPage>([impl = impl_.get(), bucket, prefix, after, limit] {
    return client::list_objects(impl->session_, bucket, prefix, after, limit, impl->deadline());
  }));
  Page<ObjectInfo> out{{}, page.more};
  for (const auto& o : page.objects) out.items.push_back(from_core(o));
  return out;
}
Result<void> Client::remove(std::string bucket, std::string key) {
  return impl_->call<void>([impl = impl_.get(), bucket, key] {
    return client::remove_object(impl->session_, bucket, key, impl->deadline());
  });
}

}  // namespace cairn
