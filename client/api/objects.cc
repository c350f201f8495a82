#include "client/api/handles.h"
#include "client/core/buckets.h"

namespace cairn {
namespace {

BucketInfo from_core(const client::BucketSummary& b) {
  return {b.name,       b.copies,  b.quota_bytes, b.created_unix_nanos, b.keep_last, b.keep_every, b.keep_days,
          b.used_bytes, b.objects, b.steps,       b.reserved_bytes};
}

}  // namespace

ObjectInfo from_core(const client::ObjectSummary& s) {
  return {s.key, s.size, s.crc, s.created_unix_nanos, s.owner.hex()};
}

Result<OwnerId> owner_of_text(std::string_view what, const std::string& text) {
  std::string raw;
  for (std::size_t i = 0; i + 1 < text.size(); i += 2) {
    char* end = nullptr;
    const auto pair = text.substr(i, 2);
    raw += static_cast<char>(std::strtoul(pair.c_str(), &end, 16));
    if (end != pair.c_str() + 2) raw.clear(), i = text.size();
  }
  auto owner = OwnerId::from_bytes(raw);
  if (!owner || text.size() != 32)
    return fail(Errc::kInvalid, std::string(what) + " '" + text + "': must be 32 hexadecimal digits");
  return owner;
}

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
    return client::set_bucket(impl->session_, name,
                              {change.quota_bytes, change.keep_last, change.keep_every, change.keep_days},
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

Result<ObjectInfo> Client::stat(std::string bucket, std::string key) {
  TRY(auto opened, impl_->call<client::OpenedObject>([impl = impl_.get(), bucket, key] {
    return client::stat_object(impl->session_, bucket, key, impl->deadline());
  }));
  return from_core(opened.summary);
}
Result<Listing> Client::list(std::string bucket, ListOptions options) {
  client::ListRequest request{.prefix = options.prefix,
                              .after = options.after,
                              .delimiter = options.delimiter,
                              .token = options.token,
                              .limit = options.limit};
  TRY(auto page, impl_->call<client::ObjectPage>([impl = impl_.get(), bucket, request] {
    return client::list_objects(impl->session_, bucket, request, impl->deadline());
  }));
  Listing out{.items = {}, .prefixes = std::move(page.prefixes), .more = page.more, .next = std::move(page.next)};
  for (const auto& o : page.objects) out.items.push_back(from_core(o));
  return out;
}
Result<Page<ObjectInfo>> Client::list(std::string bucket, std::string prefix, std::string after, std::uint32_t limit) {
  ListOptions options{.prefix = std::move(prefix), .after = std::move(after), .limit = limit};
  TRY(auto listing, list(std::move(bucket), std::move(options)));
  return Page<ObjectInfo>{std::move(listing.items), listing.more};
}
Result<void> Client::remove(std::string bucket, std::string key, RemoveOptions options) {
  std::optional<OwnerId> version;
  if (!options.if_version.empty()) {
    TRY(version, owner_of_text("version", options.if_version));
  }
  return impl_->call<void>([impl = impl_.get(), bucket, key, version] {
    return client::remove_object(impl->session_, bucket, key, version, impl->deadline());
  });
}

}  // namespace cairn
